"""fsck finds every fault, says how to mend it, and moves damage aside without deleting anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard

from vectors.errors import InputError, ShapeMismatch, StoreCorrupt
from vectors.formats.canonical import canonical_json
from vectors.store import Library
from vectors.store.manifests import Manifest
from vectors.tasks import Recipe
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32
ZEROS = {"a": torch.zeros(6, 4, dtype=torch.bfloat16)}


@pytest.fixture
def full(library: Library, vector: Make) -> Library:
    """One entry of each kind, with a verdict."""
    library.save_vector("cheerful", vector(), files={"x.json": b"{}"})
    task = library.save_task("task", BASE, ZEROS, {"a": torch.ones(6, 4).bfloat16()})
    library.save_recipe("recipe", Recipe(base=BASE, terms=((task.digest, 1.0),)))
    entry = library.get("cheerful")
    library.attest(entry.digest, "verdict", {"passed": True}, files={"plot.json": b"[]"})
    return library


def test_a_sound_library_is_clean(full: Library) -> None:
    shares: list[float] = []
    found = full.fsck(lambda share, _: shares.append(share))
    assert found.clean
    assert (found.objects, found.manifests) == (5, 3)
    assert found.bytes == full.total_use()
    assert shares == sorted(shares) and shares[-1] == 1.0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.chmod(0o644)
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_is_found_and_mended(full: Library, vector: Make) -> None:
    entry = full.get("cheerful")
    stored = full.objects.path(entry.manifest.files["vector.safetensors"])
    for at in range(0, stored.stat().st_size * 8, 97):
        flip(stored, at)
        damaged = stored.read_bytes()
        found = full.fsck()
        kinds = [(fault.kind, fault.what) for fault in found.faults]
        assert kinds == [("damaged", stored.name), ("missing", stored.name)]
        assert "save its entry again" in found.faults[0].words
        moved = Path(found.faults[0].moved)
        assert moved.read_bytes() == damaged and not stored.exists()
        with pytest.raises(StoreCorrupt, match="cannot be read"):
            full.load_vector("cheerful")
        full.save_vector("cheerful", vector(), files={"x.json": b"{}"})
        assert full.fsck().clean


def test_truncation_and_absence(full: Library) -> None:
    part = full.get("task").manifest.tensors["a"]
    path = full.objects.path(part.hash)
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreCorrupt, match="damaged"):
        full.tuned_tensor(full.get("task").manifest, "a", ZEROS["a"])
    assert [f.kind for f in full.fsck().faults] == ["damaged", "missing"]
    assert [f.kind for f in full.fsck().faults] == ["missing"]
    full.save_task("task", BASE, ZEROS, {"a": torch.ones(6, 4).bfloat16()})
    assert full.fsck().clean


def test_a_lost_manifest_is_named_by_all_that_need_it(full: Library) -> None:
    digest = full.get("task").digest
    flip(full.manifests.path(digest), 9)
    whats = [(f.kind, f.what) for f in full.fsck().faults]
    assert whats == [("damaged", digest), ("missing", digest), ("missing", "task@1")]


def test_lost_attestations_and_pins(full: Library) -> None:
    full.pin("recipe")
    full.manifests.path(full.get("recipe").digest).unlink()
    (row,) = full.attestations(full.get("cheerful").digest)
    full.objects.path(row["attested"]["files"]["plot.json"]).unlink()
    full.objects.path(row["attested"]["object"])
    words = " ".join(f.words for f in full.fsck().faults)
    assert "A pin keeps" in words and "An attestation of" in words and "'recipe@1' means" in words
    full.objects.path(row["attested"]["object"]).unlink()
    assert any(f.what == row["attested"]["object"] for f in full.fsck().faults)


def test_strays_are_moved_aside(full: Library) -> None:
    for name in ("README", "ab/cd", "ab/" + "0" * 64):
        path = full.objects.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        (fault,) = full.fsck().faults
        assert fault.kind == "stray" and Path(fault.moved).read_text() == name
    (full.objects.root / "README").write_text("again")
    (fault,) = full.fsck().faults
    assert fault.moved.endswith("README.2")


def put(library: Library, **changes: object) -> str:
    """Keep a manifest that says something else than `task`'s does."""
    manifest = json.loads(library.get("task").manifest.to_json())
    manifest["tensors"]["a"] |= changes
    return library.manifests.write(canonical_json(manifest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [6, 5]}, "takes 60 bytes, and its payload holds 48"),
        ({"shape": [2**40, 2**40]}, "its payload holds 48"),
        ({"dtype": "F32"}, "is said to be F32"),
        ({"dtype": "NOPE"}, "has the type 'NOPE', which none has"),
        ({"changed": 25}, "24 elements and says that 25 changed"),
    ],
)
def test_a_manifest_that_lies_is_told(
    full: Library, changes: dict[str, object], words: str
) -> None:
    digest = put(full, **changes)
    faults = full.fsck().faults
    assert [(f.kind, f.what) for f in faults] == [("untrue", digest)] * len(faults)
    assert any(words in f.words for f in faults)
    if "changed" not in changes:
        with pytest.raises((ShapeMismatch, StoreCorrupt)):
            full.tuned_tensor(full.manifests.get(digest), "a", ZEROS["a"])


def test_lies_about_content_and_norm_are_refused(full: Library) -> None:
    lying = full.manifests.get(put(full, content="0" * 64))
    with pytest.raises(StoreCorrupt, match="does not come back as it was saved"):
        full.tuned_tensor(lying, "a", ZEROS["a"])
    for wrong in ({"norm": -1.0}, {"shape": [-6, 4]}, {"hash": "../../etc/passwd"}):
        with pytest.raises(StoreCorrupt, match="does not know"):
            full.manifests.get(put(full, **wrong))


def test_a_payload_that_claims_to_be_huge(full: Library) -> None:
    # 16 MB of zeros in a few hundred bytes, and a frame that claims 2^60 bytes.
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 24))
    for data in (bomb, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + bytes(8)):
        lying = full.manifests.get(put(full, hash=full.objects.write(data)))
        with pytest.raises(StoreCorrupt, match="holds"):
            full.tuned_tensor(lying, "a", ZEROS["a"])
        assert {f.kind for f in full.fsck().faults} == {"untrue"}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 90 << 20) + b"{}",
        struct.pack("<Q", 2) + b"{}" + bytes(8),
        b"",
        b"\x80\x04pickle",
        (lambda h: struct.pack("<Q", len(h)) + h)(
            json.dumps(
                {"block.0": {"dtype": "F32", "shape": [1 << 31, 1 << 33], "data_offsets": [0, 8]}}
            ).encode()
        )
        + bytes(8),
    ],
)
def test_safetensors_headers_that_lie(full: Library, data: bytes) -> None:
    stored = full.objects.write(data)
    lying = Manifest.of(
        kind="steering-vector", base=BASE, files={"vector.safetensors": stored}, info={}
    )
    digest = full.manifests.put(lying)
    with pytest.raises(StoreCorrupt, match="has no valid vector"):
        full.vector_by_digest(digest)
    (fault,) = full.fsck().faults
    assert (fault.kind, fault.what) == ("untrue", digest)


def test_content_of_a_newer_version_is_kept(full: Library) -> None:
    digest = full.manifests.write(canonical_json({"schema": 2, "kind": "recipe"}))
    (fault,) = full.fsck().faults
    assert (fault.kind, fault.what, fault.moved) == ("unknown", digest, "")
    assert digest in full.manifests


def test_names_that_climb_are_no_refs(full: Library) -> None:
    for name in ("../store.db", "..", "a/../../b", "/etc/passwd", "task@../x"):
        for action in (full.get, full.delete, full.restore, full.history):
            with pytest.raises(InputError):
                action(name)


def test_a_broken_database_is_told(full: Library) -> None:
    path = full.root / "store.db"
    for log in full.root.glob("store.db-*"):
        log.unlink()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"damaged"):
        full.list()
    assert "database" in {f.kind for f in full.fsck().faults}
