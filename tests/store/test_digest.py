"""The digest of a base: what changes it, what does not, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vectors.errors import ModelNotSupported
from vectors.store import Checkpoint, base_digest, digest

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
}


def single(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(folder: Path, where: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in set(where.values()):
        save_file({n: TENSORS[n] for n in where if where[n] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_it_is_the_merkle_root(tmp_path: Path) -> None:
    rows = [
        ["a", "F32", [], hashlib.sha256(bytes.fromhex("0000c03f")).hexdigest()],
        [
            "b.weight",
            "BF16",
            [2, 3],
            hashlib.sha256(bytes.fromhex("0000803f004040408040a040")).hexdigest(),
        ],
        ["empty", "F32", [0, 3], hashlib.sha256(b"").hexdigest()],
    ]
    expected = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert base_digest(single(tmp_path)) == expected


def test_sharding_and_other_files_do_not_change_it(tmp_path: Path) -> None:
    one = single(tmp_path / "one")
    (one / "config.json").write_text("{}")
    where = {"a": "x-1.safetensors", "b.weight": "x-2.safetensors", "empty": "x-1.safetensors"}
    assert base_digest(one) == base_digest(sharded(tmp_path / "two", where))


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor(1.5000001)},
        {"a": torch.tensor([1.5])},
        {"a": torch.tensor(1.5).to(torch.float16)},
        {"more": torch.zeros(1)},
    ],
    ids=["value", "shape", "dtype", "name"],
)
def test_any_change_of_the_weights_changes_it(tmp_path: Path, change: dict) -> None:
    assert base_digest(single(tmp_path / "1")) != base_digest(
        single(tmp_path / "2", {**TENSORS, **change})
    )


def test_the_cache_saves_hashing_and_notices_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = single(tmp_path), tmp_path / ".cache.json"
    first = base_digest(folder, cache)
    with monkeypatch.context() as patched:
        patched.setattr(digest, "_rows", lambda _: pytest.fail("hashed again"))
        assert base_digest(folder, cache) == first
    changed = {**TENSORS, "a": torch.tensor(2.5)}
    single(folder, changed)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert base_digest(folder, cache) == base_digest(single(tmp_path / "fresh", changed)) != first
    cache.write_text("{")
    assert base_digest(folder, cache) != first
    assert base_digest(folder, tmp_path / "nowhere" / "cache.json") != first


def test_a_checkpoint_is_a_mapping(tmp_path: Path) -> None:
    checkpoint = Checkpoint(single(tmp_path))
    assert set(checkpoint) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint[name].dtype == tensor.dtype
    with pytest.raises(KeyError):
        checkpoint["none"]


def test_folders_without_good_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match="has neither"):
        base_digest(tmp_path)
    whole = (single(tmp_path / "cut") / "model.safetensors").read_bytes()
    for bad in (whole[:-1], b"", whole[:20], b"\x80\x04" + whole):
        (tmp_path / "cut" / "model.safetensors").write_bytes(bad)
        with pytest.raises(ModelNotSupported, match="not a whole safetensors file"):
            base_digest(tmp_path / "cut")


def test_indices_that_lie_are_refused(tmp_path: Path) -> None:
    where = dict.fromkeys(TENSORS, "x.safetensors")
    folder = sharded(tmp_path / "s", where)
    index = folder / "model.safetensors.index.json"
    for weight_map, words in (
        ({**where, "a": "../x.safetensors"}, "no safetensors file beside it"),
        ({**where, "ghost": "x.safetensors"}, "each tensor"),
        ({**where, "ghost": "y.safetensors"}, "not a whole safetensors file"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelNotSupported, match=words):
            base_digest(folder)
    index.write_text("[]")
    with pytest.raises(ModelNotSupported, match="not a valid index"):
        base_digest(folder)
