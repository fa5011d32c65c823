"""Signed attestations: whose word a verdict or an evaluation is, and whether it was changed since.

A signature is an attestation of its own, of the kind `signature`, beside the one that it signs. What is
signed is that one's object, byte for byte: canonical JSON that holds the digest of the entry, so that it
cannot be moved to another entry. Ed25519 (RFC 8032), keys and signatures as lower-case hex digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import InputError, SignatureInvalid, StoreCorrupt
from vectors.store.manifests import Digest

__all__ = [
    "KIND",
    "SIGNED",
    "Signature",
    "check_key",
    "proof",
    "public_key",
    "sign",
    "signatures_in",
]

KIND = "signature"
SIGNED = ("verdict", "evaluation")
"""The kinds of attestations that are a person's word; the others can be made again by anybody."""
KEY = re.compile(r"[0-9a-f]{64}")

Bytes = Callable[[str], bytes]


class _Payload(BaseModel):
    """What an attestation of the kind `signature` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["ed25519"]
    attestation: Digest
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True)
class Signature:
    """One signature on one entry's attestation.

    Args:
        attestation: the object that it signs; empty where the signature itself cannot be read.
        kind: of that attestation; empty where the entry has no such attestation.
        key: the public key that it names.
        created: when it came to this library.
        holds: whether the key's owner signed exactly these bytes.
        words: what is wrong, as a sentence; empty where it holds.
    """

    attestation: str
    kind: str
    key: str
    created: str
    holds: bool
    words: str = ""


def public_key(private: Ed25519PrivateKey) -> str:
    """The public key as 64 hex digits."""
    return private.public_key().public_bytes_raw().hex()


def check_key(text: str) -> str:
    """Return a public key, or raise InputError where the text is none."""
    key = text.strip().lower()
    if not KEY.fullmatch(key):
        raise InputError(
            f"{text.strip()[:80]!r} is no public key; it has 64 hex digits, and 'workbench library "
            "sign' prints yours."
        )
    return key


def sign(private: Ed25519PrivateKey, attestation: str, data: bytes) -> dict[str, Any]:
    """The payload that signs the attestation in the object `attestation`, whose bytes are `data`."""
    return {
        "algorithm": "ed25519",
        "attestation": attestation,
        "key": public_key(private),
        "signature": private.sign(data).hex(),
    }


def signatures_in(found: Sequence[Mapping[str, Any]], read: Bytes) -> list[Signature]:
    """Check the signatures among an entry's attestations, the oldest first.

    Args:
        found: all attestations of one entry, as `Library.attestations` gives them.
        read: gives an object's bytes, and raises StoreCorrupt where they are damaged.
    """
    kinds = {row["attested"]["object"]: row["attested"]["kind"] for row in found}
    return [_checked(row, kinds, read) for row in found if row["attested"]["kind"] == KIND]


def proof(
    who: str, found: Sequence[Mapping[str, Any]], signatures: Sequence[Signature], key: str = ""
) -> list[Signature]:
    """Return a signature that holds for the newest attestation of each kind that is signed.

    Args:
        who: the entry, in words.
        found: its attestations.
        signatures: what `signatures_in` says of them.
        key: whose signature is asked for; empty is anybody's.

    Raises:
        InputError: the entry has nothing that could be signed.
        SignatureInvalid: one of them has no signature, a broken one, or only another key's.
    """
    newest = {row["attested"]["kind"]: row["attested"]["object"] for row in found}
    wanted = {kind: newest[kind] for kind in SIGNED if kind in newest}
    if not wanted:
        raise InputError(f"{who} has no verdict and no evaluation, so there is nothing to sign.")
    return [_proof(who, kind, stored, signatures, key) for kind, stored in wanted.items()]


def _proof(
    who: str, kind: str, stored: str, signatures: Sequence[Signature], key: str
) -> Signature:
    own = [s for s in signatures if s.attestation == stored]
    good = [s for s in own if s.holds]
    for one in good:
        if key in ("", one.key):
            return one
    broken = [s for s in own if not s.holds] or [s for s in signatures if not s.holds]
    if good:
        raise SignatureInvalid(
            f"The {kind} of {who} is signed by {', '.join(s.key[:16] for s in good)}, and not by "
            f"the key {key[:16]}; ask who they are, or leave the key out."
        )
    if broken:
        raise SignatureInvalid(broken[0].words)
    raise SignatureInvalid(
        f"Nobody signed the newest {kind} of {who} ({stored[:12]}); 'workbench library sign' "
        "does so with your key."
    )


def _checked(row: Mapping[str, Any], kinds: Mapping[str, str], read: Bytes) -> Signature:
    created = row["attested"]["created"]
    try:
        payload = _Payload.model_validate({k: v for k, v in row.items() if k != "attested"})
    except ValidationError:
        words = "A signature has content that this version does not know; update the workbench."
        return Signature("", "", "", created, False, words)
    kind = kinds.get(payload.attestation, "")
    words = _wrong(payload, kind, read)
    return Signature(payload.attestation, kind, payload.key, created, not words, words)


def _wrong(payload: _Payload, kind: str, read: Bytes) -> str:
    short = f"the signature of the key {payload.key[:16]}"
    if not kind:
        return (
            f"What {short} signs ({payload.attestation[:12]}) is no attestation of this entry; it "
            "was changed since, or left behind, so ask its owner for both."
        )
    try:
        data = read(payload.attestation)
    except StoreCorrupt as error:
        return str(error)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(payload.key)).verify(
            bytes.fromhex(payload.signature), data
        )
    except (InvalidSignature, ValueError):
        return (
            f"In {short}, the {kind} {payload.attestation[:12]} is not what was signed, or another "
            "key signed it; do not rely on it."
        )
    return ""
