"""The paths of our routes, for those who ask; importing this imports no server."""

__all__ = ["CAPTURES", "HELLO", "OURS", "RECEIPTS"]

OURS = "/workbench/"
HELLO = "/workbench/hello"
RECEIPTS = "/workbench/receipts"
CAPTURES = "/workbench/captures"
