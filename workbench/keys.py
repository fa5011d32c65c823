"""The home's signing key: made when it is first needed, readable by its owner alone."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from vectors.errors import InputError, OutOfSpace
from vectors.formats.atomic import disk_errors, sync_file, sync_folder, temporary
from vectors.paths import expanded
from vectors.store.signatures import check_key, public_key
from workbench.settings import Home

__all__ = ["KEY_FILE", "named_key", "own_key", "signing_key"]

KEY_FILE = "ed25519.pem"
OTHERS = 0o077


def signing_key(home: Home) -> Ed25519PrivateKey:
    """The private key of the home, PKCS #8 in PEM; a new one where there is none.

    Raises:
        InputError: a file that is no Ed25519 key, or one that others can read.
        OutOfSpace: it cannot be written.
    """
    path = home.keys / KEY_FILE
    if not path.exists():
        _make(path)
    return _read(path)


def own_key(home: Home) -> str:
    """The home's public key; empty where it has none yet."""
    path = home.keys / KEY_FILE
    return public_key(_read(path)) if path.exists() else ""


def named_key(text: str) -> str:
    """A public key from 64 hex digits, or from a file that holds them.

    Raises:
        InputError: neither.
    """
    path = expanded(text)
    try:
        if path.is_file():
            return check_key(path.read_text(errors="replace"))
    except OSError as error:
        raise InputError(f"The key file {path} cannot be read ({error.strerror}).") from error
    if "/" in text or text.endswith((".pem", ".pub", ".txt")):
        raise InputError(f"There is no key file {path}; give one, or a key of 64 hex digits.")
    return check_key(text)


def _make(path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    data = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with disk_errors(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with temporary(path.parent, 0o600) as (file, half):
            file.write(data)
            sync_file(file)
            try:
                os.link(half, path)  # of two processes that make a key, one wins
            except FileExistsError:
                return
        sync_folder(path.parent)


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise OutOfSpace(
            f"The signing key {path} cannot be read ({error.strerror}); run as its owner."
        ) from error
    if mode & OTHERS:
        raise InputError(
            f"The signing key {path} can be read by others, so it proves nothing; make a new one "
            f"(move this one away), or run 'chmod 600 {path}' if you trust them."
        )
    try:
        found = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"The signing key {path} is damaged or has a password ({type(error).__name__}); put it "
            "back from a copy, or move it away, and a new one is made."
        ) from error
    if not isinstance(found, Ed25519PrivateKey):
        raise InputError(
            f"The signing key {path} is no Ed25519 key; move it away, and one is made."
        )
    return found
