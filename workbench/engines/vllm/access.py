"""Who may use the server: whoever sends its token."""

from __future__ import annotations

import os
import secrets

__all__ = ["UNKNOWN", "admitted"]

UNKNOWN = "This server needs its token: Authorization: Bearer ..."


def admitted(authorization: str) -> bool:
    """Whether a header holds the server's token, if it has one; as vLLM reads it, `Bearer` in any case."""
    token = os.environ.get("WORKBENCH_TOKEN", "")
    scheme, _, given = authorization.partition(" ")
    return not token or (
        scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), token.encode())
    )
