"""Signed attestations: what holds, what does not, and that no identity ever changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from vectors.errors import InputError, SignatureInvalid, StoreCorrupt
from vectors.formats.canonical import canonical_json
from vectors.store import Library
from vectors.store.signatures import check_key, public_key
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
ME, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


@pytest.fixture
def judged(library: Library, vector: Make) -> Library:
    """A vector with a verdict, an evaluation and a count, none of them signed."""
    digest = library.save_vector("kind", vector()).digest
    library.attest(digest, "verdict", {"passed": True})
    library.attest(digest, "evaluation", {"margin": 1.5})
    library.attest(digest, "magnitudes", {"scope": "global"})
    return library


def test_verdicts_and_evaluations_are_signed_once(judged: Library) -> None:
    before = judged.get("kind")
    made = judged.sign("kind", ME)
    assert [(s.kind, s.key, s.holds) for s in made] == [
        ("verdict", public_key(ME), True),
        ("evaluation", public_key(ME), True),
    ]
    assert judged.sign("kind", ME) == [] and len(judged.sign("kind", OTHER)) == 2
    assert len(judged.signatures("kind")) == 4
    assert judged.get("kind") == before and judged.passed() == {before.digest: True}
    assert judged.attestations(before.digest, "verdict")[-1]["passed"] is True
    assert [s.kind for s in judged.verify_signature("kind", public_key(OTHER))] == [
        *("verdict", "evaluation")
    ]
    assert judged.fsck().clean


def test_what_is_signed_is_the_object_as_the_format_says(judged: Library) -> None:
    """A reader that knows docs/formats.md alone."""
    judged.sign("kind", ME)
    digest = judged.get("kind").digest
    payload = judged.attestations(digest, "signature")[0]
    signed = canonical_json(
        {"digest": digest, "kind": "verdict", "payload": {"passed": True}, "files": {}}
    )
    assert judged.objects.read(payload["attestation"]) == signed
    assert payload["algorithm"] == "ed25519"
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(payload["key"])).verify(
        bytes.fromhex(payload["signature"]), signed
    )


def test_nothing_is_signed(judged: Library, vector: Make) -> None:
    with pytest.raises(SignatureInvalid, match="Nobody signed the newest verdict of 'kind'"):
        judged.verify_signature("kind")
    judged.save_vector("bare", vector(3))
    for work in (lambda: judged.sign("bare", ME), lambda: judged.verify_signature("bare")):
        with pytest.raises(InputError, match="no verdict and no evaluation"):
            work()


def test_a_newer_verdict_is_not_covered_by_an_older_signature(judged: Library) -> None:
    judged.sign("kind", ME)
    judged.attest(judged.get("kind").digest, "verdict", {"passed": False})
    with pytest.raises(SignatureInvalid, match="Nobody signed the newest verdict"):
        judged.verify_signature("kind")
    judged.sign("kind", ME)
    assert judged.verify_signature("kind")


def test_a_changed_attestation(judged: Library) -> None:
    judged.sign("kind", ME)
    digest = judged.get("kind").digest
    old = judged.attestations(digest, "verdict")[0]["attested"]["object"]
    changed = {"digest": digest, "kind": "verdict", "payload": {"passed": False}, "files": {}}
    stored = judged.objects.write(canonical_json(changed))
    with judged._database.change() as db:
        db.execute("UPDATE attestations SET object = ? WHERE object = ?", (stored, old))
    with pytest.raises(SignatureInvalid, match="is no attestation of this entry; it was changed"):
        judged.verify_signature("kind")
    # A forger who also points the signature at the changed verdict gets no further.
    forged = dict(judged.attestations(digest, "signature")[0], attestation=stored)
    del forged["attested"]
    judged.attest(digest, "signature", forged)
    with pytest.raises(SignatureInvalid, match="is not what was signed, or another key signed it"):
        judged.verify_signature("kind")
    assert [s.holds for s in judged.signatures("kind")] == [False, True, False]


def test_changed_bytes_are_found_by_their_name(judged: Library) -> None:
    judged.sign("kind", ME)
    stored = judged.attestations(judged.get("kind").digest, "verdict")[0]["attested"]["object"]
    path = judged.objects.path(stored)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    with pytest.raises(StoreCorrupt):
        judged.verify_signature("kind")


def test_a_wrong_key(judged: Library) -> None:
    judged.sign("kind", ME)
    with pytest.raises(SignatureInvalid, match=f"not by the key {public_key(OTHER)[:16]}"):
        judged.verify_signature("kind", public_key(OTHER))
    # Another's key written over the signer's does not make it another's word.
    digest = judged.get("kind").digest
    stolen = dict(judged.attestations(digest, "signature")[0], key=public_key(OTHER))
    del stolen["attested"]
    judged.attest(digest, "signature", stolen)
    with pytest.raises(SignatureInvalid, match="not by the key"):
        judged.verify_signature("kind", public_key(OTHER))
    assert judged.verify_signature("kind", public_key(ME))


@pytest.mark.parametrize(
    "change",
    [
        {"key": "zz"},
        {"key": None},
        {"algorithm": "none"},
        {"signature": "00" * 63},
        {"attestation": "../../x"},
        {"more": 1},
    ],
    ids=json.dumps,
)
def test_a_signature_that_is_none(judged: Library, change: dict[str, object]) -> None:
    judged.sign("kind", ME)
    digest = judged.get("kind").digest
    good = judged.attestations(digest, "signature")[0]
    del good["attested"]
    payload = {k: v for k, v in {**good, **change}.items() if v is not None}
    judged.attest(digest, "signature", payload)
    last = judged.signatures("kind")[-1]
    assert not last.holds and last.words.endswith(".")
    assert judged.verify_signature("kind"), "the good ones still hold"


def test_a_key_that_is_no_point_of_the_curve(judged: Library) -> None:
    digest = judged.get("kind").digest
    stored = judged.attestations(digest, "verdict")[0]["attested"]["object"]
    for key in ("00" * 32, "ff" * 32):
        judged.attest(
            digest,
            "signature",
            {"algorithm": "ed25519", "attestation": stored, "key": key, "signature": "00" * 64},
        )
    assert [s.holds for s in judged.signatures("kind")] == [False, False]


def test_signatures_travel(judged: Library, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="push and pull need obstore")
    judged.sign("kind", ME)
    judged.push(str(tmp_path / "copy"))
    other = Library(tmp_path / "other")
    other.pull(str(tmp_path / "copy"))
    assert [s.kind for s in other.verify_signature("kind", public_key(ME))] == [
        *("verdict", "evaluation")
    ]


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "ab" * 33])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(InputError, match="is no public key"):
        check_key(text)
    assert check_key(f" {'AB' * 32}\n") == "ab" * 32
