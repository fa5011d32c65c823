"""Entries of the library, out to other programs' files and in from them."""

from workbench.exchange.incoming import import_entry
from workbench.exchange.outgoing import export_entry

__all__ = ["export_entry", "import_entry"]
