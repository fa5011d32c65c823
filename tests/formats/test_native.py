"""Golden and property tests of the native steering-vector file."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import OutOfSpace, VectorFileError
from vectors.formats import read_vector, vector_bytes, vector_from_bytes, write_vector
from vectors.types import SteeringVector

BASE = "ab" * 32
METADATA = {
    "format": 1,
    "base": BASE,
    "best_block": 2,
    "mean_norms": {"2": 3.5},
    "info": {"method": "mean-difference"},
}


def small() -> SteeringVector:
    return SteeringVector(
        base=BASE,
        directions={10: torch.tensor([0.6, 0.8]), 2: torch.tensor([1.0, 0.0])},
        mean_norms={10: 12.25, 2: 3.5},
        best_block=10,
        info={"method": "mean-difference", "note": "\u00e9", "pairs": 3},
    )


def file(metadata: object = METADATA, **tensors: torch.Tensor) -> bytes:
    given = tensors or {"block.2": torch.tensor([1.0, 0.0])}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return safetensors.torch.save(given, metadata={"workbench": text})


def same(a: SteeringVector, b: SteeringVector) -> bool:
    return (a.base, dict(a.mean_norms), a.best_block, a.info) == (
        b.base,
        dict(b.mean_norms),
        b.best_block,
        b.info,
    ) and all(torch.equal(a.directions[k], b.directions[k]) for k in {*a.directions, *b.directions})


def test_golden_bytes() -> None:
    header = (
        rb'{"__metadata__":{"workbench":"{\"base\":\"' + BASE.encode() + rb"\",\"best_block\":10,"
        rb"\"format\":1,\"info\":{\"method\":\"mean-difference\",\"note\":\"\\u00e9\",\"pairs\":3},"
        rb'\"mean_norms\":{\"10\":12.25,\"2\":3.5}}"},'
        rb'"block.10":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        rb'"block.2":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("9a99193f cdcc4c3f 0000803f 00000000")
    assert vector_bytes(small()) == len(header).to_bytes(8, "little") + header + data


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_vector(path, small())
    assert same(read_vector(path), small())
    assert path.read_bytes() == vector_bytes(read_vector(path))
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.sets(st.integers(0, 200), min_size=1, max_size=4),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    info=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
)  # fmt: skip
def test_any_vector_round_trips(blocks: set[int], width: int, seed: int, info: dict) -> None:
    rng = torch.Generator().manual_seed(seed)
    directions = {b: torch.randn(width, generator=rng) for b in blocks}
    vector = SteeringVector(
        base=BASE,
        directions={b: v / v.norm() for b, v in directions.items()},
        mean_norms={b: 1.0 + b / 7 for b in blocks},
        best_block=min(blocks),
        info=info,
    )
    assert same(vector_from_bytes(vector_bytes(vector)), vector)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_do_worse_than_refuse(data: st.DataObject) -> None:
    whole = bytearray(vector_bytes(small()))
    cut = data.draw(st.integers(0, len(whole)))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        vector_from_bytes(bytes(whole[:cut]))
    except VectorFileError as error:
        assert str(error).endswith(".")


def nan_at(block: str) -> dict[str, torch.Tensor]:
    return {block: torch.tensor([float("nan"), 1.0])}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a whole safetensors file"),
        (vector_bytes(small())[:-1], "not a whole safetensors file"),
        (pickle.dumps({"a": 1}), "pickle"),
        (file(**{"block.2": torch.tensor([1.0, 0.0]).half()}), "type torch.float16"),
        (file(**nan_at("block.2")), "not finite"),
        (file(**{"block.2": torch.zeros(2)}), "must have norm 1"),
        (file(**{"block.2": torch.eye(2)}), "width"),
        (file(**{"block.02": torch.tensor([1.0])}), "'block.02'"),
        (file(**{"weight": torch.tensor([1.0])}), "'weight'"),
        (file(**{"block.3": torch.tensor([1.0])}), "best block 2"),
        (safetensors.torch.save({"block.2": torch.ones(1)}), "no 'workbench' metadata"),
        (file("{"), "not valid"),
        (file("[" * 100_000), "not valid"),
        (file({**METADATA, "format": 2}), "format"),
        (file({**METADATA, "more": 1}), "more"),
        (file({**METADATA, "base": "../x"}), "base"),
        (file({**METADATA, "mean_norms": {}}), "positive mean norm"),
        (file({**METADATA, "mean_norms": {"2": -1.0}}), "positive mean norm"),
        (file({**METADATA, "mean_norms": {"2": float("inf")}}), "mean_norms"),
        (file({**METADATA, "info": {"x": float("nan")}}), "info"),
    ],
)
def test_every_refusal_says_what_which_and_what_to_do(data: bytes, words: str) -> None:
    with pytest.raises(VectorFileError) as caught:
        vector_from_bytes(data, "given.safetensors")
    assert "given.safetensors" in str(caught.value)
    assert words in str(caught.value)


def test_torch_archive_is_called_a_pickle() -> None:
    buffer = io.BytesIO()
    torch.save({"v": torch.ones(2)}, buffer)
    with pytest.raises(VectorFileError, match="pickle"):
        vector_from_bytes(buffer.getvalue())


def test_a_header_whose_length_looks_like_a_pickle_is_read() -> None:
    data = vector_bytes(small())
    length = int.from_bytes(data[:8], "little")
    # Spaces after the header are part of the format; make its length end in 0x80.
    longer = (length // 256 + 1) * 256 + 0x80
    padded = longer.to_bytes(8, "little") + data[8 : 8 + length] + b" " * (longer - length)
    assert same(vector_from_bytes(padded + data[8 + length :]), small())


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    vector = small()
    odd = SteeringVector(vector.base, vector.directions, vector.mean_norms, 10, {"x": float("nan")})
    with pytest.raises(VectorFileError, match="JSON"):
        vector_bytes(odd)
    with pytest.raises(VectorFileError, match="base"):
        vector_bytes(SteeringVector("me", vector.directions, vector.mean_norms, 10))
    with pytest.raises(OutOfSpace, match="nowhere"):
        write_vector(tmp_path / "nowhere" / "v.safetensors", vector)
    with pytest.raises(VectorFileError, match="cannot be read"):
        read_vector(tmp_path / "none.safetensors")
