"""The paths of our routes, for those who ask; importing this imports no server."""

__all__ = ["HELLO", "RECEIPTS"]

HELLO = "/workbench/hello"
RECEIPTS = "/workbench/receipts"
