"""One spelling for every JSON value, so that equal values have equal digests."""

from __future__ import annotations

import hashlib
import json

from vectors.errors import InputError

__all__ = ["canonical_json", "sha256"]


def canonical_json(value: object, what: str = "The value") -> bytes:
    """Return `value` as ASCII JSON with sorted keys and no spaces.

    Raises:
        InputError: something in `value` that JSON cannot carry, NaN and infinity included.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if "\\ud" in text:
            # Half of a pair of surrogates, as in names of files that are no UTF-8, is read by nobody.
            json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} cannot be written as JSON ({error}); use only finite numbers, text, true, "
            "false, null, lists, and mappings with text keys."
        ) from error
    return text.encode("ascii")


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()
