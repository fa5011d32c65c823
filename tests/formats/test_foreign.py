"""Golden bytes, round trips and hostile inputs of other programs' steering-vector files."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import BlockNotFound, InputError, VectorFileError
from vectors.formats.control_vector import control_vector_bytes, numbering, read_control_vector
from vectors.formats.foreign import Calibration, Foreign, calibrated
from vectors.formats.gguf import Kind, write_gguf
from vectors.formats.kinds import FORMATS, choose, detect, read_foreign
from vectors.formats.native import write_vector
from vectors.formats.persona import persona_bytes, read_persona, read_persona_pt
from vectors.formats.svec import read_svec, svec_bytes
from vectors.types import SteeringVector

BASE = "ab" * 32


def vector(blocks: tuple[int, ...] = (0, 1, 2, 3), width: int = 5) -> SteeringVector:
    rng = torch.Generator().manual_seed(3)
    directions = {b: torch.randn(width, generator=rng) for b in blocks}
    return SteeringVector(
        BASE,
        {b: v / v.norm() for b, v in directions.items()},
        {b: 2.0 + b for b in blocks},
        blocks[len(blocks) // 2],
        {"method": "mean-difference"},
    )


def same_directions(found: Foreign, given: SteeringVector, blocks: list[int]) -> None:
    """The file's strength 1 is the vector's dose 1, at the same blocks."""
    assert sorted(found.directions) == blocks
    for block in blocks:
        assert torch.equal(found.directions[block], given.addition(block, 1.0))


# -- golden bytes and numberings ----------------------------------------------------------------


def plain(shifted: bool) -> bytes:
    """A file as repeng or llama.cpp's generator writes it: one direction, nothing of ours."""
    kind = Kind.INT32 if shifted else Kind.UINT32
    return write_gguf(
        [
            ("general.architecture", Kind.STRING, "controlvector"),
            ("controlvector.model_hint", Kind.STRING, "llama"),
            ("controlvector.layer_count", kind, 1),
        ],
        {"direction.7": torch.tensor([3.0, 4.0])},
    )


def test_golden_bytes_of_a_control_vector() -> None:
    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    head = (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 3)
        + text(b"general.architecture") + struct.pack("<I", 8) + text(b"controlvector")
        + text(b"controlvector.model_hint") + struct.pack("<I", 8) + text(b"llama")
        + text(b"controlvector.layer_count") + struct.pack("<II", 4, 1)
        + text(b"direction.7") + struct.pack("<IQIQ", 1, 2, 0, 0)
    )  # fmt: skip
    head += bytes(-len(head) % 32)
    data = bytes.fromhex("00004040 00008040") + bytes(24)
    assert plain(shifted=False) == head + data
    assert plain(shifted=True) == head.replace(
        struct.pack("<II", 4, 1) + text(b"direction.7"),
        struct.pack("<II", 5, 1) + text(b"direction.7"),
    ) + data  # fmt: skip


def test_the_bytes_are_those_of_the_usual_library(tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.7", np.array([3, 4], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert file.read_bytes() == plain(shifted=False)
    ours = tmp_path / "ours.gguf"
    ours.write_bytes(control_vector_bytes(vector(), [1, 3], "llama"))
    read = gguf.GGUFReader(ours)
    assert read.get_field("controlvector.layer_count").contents() == 2
    assert [t.name for t in read.tensors] == ["direction.1", "direction.3"]
    assert np.array_equal(read.tensors[1].data, vector().addition(3, 1.0).numpy())


def test_one_file_under_both_numberings() -> None:
    # direction.7 was read at the output of block 7 by repeng, and of block 6 by the generator.
    assert list(read_control_vector(plain(False), "f").directions) == [7]
    assert list(read_control_vector(plain(True), "f", shifted=True).directions) == [6]
    assert numbering(plain(False), "f") == "gguf"
    assert numbering(plain(True), "f") == "gguf-shifted"


def test_what_llama_cpp_does_with_a_file_is_what_we_do() -> None:
    # llama.cpp lays direction.k at row k - 1 and adds row il - 1 after block il.
    file = read_control_vector(control_vector_bytes(vector(), [1, 2, 3], "llama"), "f")
    rows = {k - 1: v for k, v in file.directions.items()}
    for block in (1, 2, 3):
        assert torch.equal(rows[block - 1], vector().addition(block, 1.0))


def test_persona_row_is_a_hidden_state() -> None:
    # Row i is hidden_states[i], the output of block i - 1; row 0 is the embedding.
    rows = torch.arange(1.0, 9).reshape(4, 2)
    found = read_persona(safetensors.torch.save({"any": rows}), "f")
    assert {b: v.tolist() for b, v in found.directions.items()} == {
        0: [3.0, 4.0],
        1: [5.0, 6.0],
        2: [7.0, 8.0],
    }
    assert found.layers == 3
    assert "row 0" in found.notes[0]


def test_svec_layer_is_the_block_it_was_read_at() -> None:
    data = json.dumps(
        {
            "model_type": "llama",
            "directions": {"0": [1, 2.5], "3": [[0.5, -1e-3]]},
            "explained_variances": {"0": 0.5, "3": 0.25},
        }
    ).encode()
    found = read_svec(data, "f")
    assert {b: v.tolist() for b, v in found.directions.items()} == {
        0: [1.0, 2.5],
        3: [0.5, pytest.approx(-1e-3)],
    }
    assert found.model == "llama"
    assert "input" in found.notes[0]


# -- round trips --------------------------------------------------------------------------------


def shifted(v: SteeringVector) -> bytes:
    return control_vector_bytes(v, sorted(v.directions), "llama", shifted=True)


ROUND: dict[str, tuple[Callable[[SteeringVector], bytes], Callable[[bytes], Foreign]]] = {
    "gguf": (
        lambda v: control_vector_bytes(v, [b for b in sorted(v.directions) if b], "llama"),
        lambda data: read_control_vector(data, "f"),
    ),
    "gguf-shifted": (shifted, lambda data: read_control_vector(data, "f", shifted=True)),
    "svec": (
        lambda v: svec_bytes(v, sorted(v.directions), "llama"),
        lambda data: read_svec(data, "f"),
    ),
    "persona": (persona_bytes, lambda data: read_persona(data, "f")),
}


@pytest.mark.parametrize("format", ROUND)
def test_round_trip_keeps_every_addition(format: str) -> None:
    write, read = ROUND[format]
    found = read(write(vector()))
    same_directions(found, vector(), [1, 2, 3] if format == "gguf" else [0, 1, 2, 3])
    assert found.format == format
    assert write(vector()) == write(vector())


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(sorted(ROUND)),
    blocks=st.sets(st.integers(1, 60), min_size=1, max_size=5),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_any_vector_round_trips(format: str, blocks: set[int], width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    raw = {b: torch.randn(width, generator=rng) + 1e-3 for b in blocks}
    given = SteeringVector(
        BASE, {b: v / v.norm() for b, v in raw.items()}, {b: 0.1 + b for b in blocks}, min(blocks)
    )
    write, read = ROUND[format]
    same_directions(read(write(given)), given, sorted(blocks))


def test_our_own_files_carry_their_calibration() -> None:
    given = vector()
    for found in (
        read_control_vector(control_vector_bytes(given, [1, 2, 3]), "f"),
        read_persona(persona_bytes(given), "f", {"workbench-persona": Calibration.of(given).text()}),
    ):  # fmt: skip
        assert found.carried is not None
        back = calibrated(found, found.carried, "f")
        assert (back.base, back.best_block) == (given.base, given.best_block)
        assert back.info["method"] == "mean-difference"
        for block in found.directions:
            assert back.mean_norms[block] == given.mean_norms[block]
            assert torch.allclose(back.directions[block], given.directions[block], atol=1e-7)
            dose = back.info["imported"]["strength_one_is_dose"][str(block)]
            assert dose == pytest.approx(1.0)


def test_a_calibration_that_no_longer_fits_is_not_believed() -> None:
    given = vector((1, 2))
    whole = control_vector_bytes(given, [1, 2])
    raw = given.addition(2, 1.0).numpy().tobytes()
    scaled = whole.replace(raw, (given.addition(2, 1.0) * 3).numpy().tobytes())
    assert scaled != whole
    found = read_control_vector(scaled, "f")
    assert found.carried is None
    assert "calibration" in found.notes[-1]


def test_calibrating_states_the_dose_of_strength_one() -> None:
    found = read_control_vector(plain(False), "f")
    given = Calibration(base=BASE, best_block=7, mean_norms={7: 20.0})
    made = calibrated(found, given, "f", {"dose_unit": "measured"})
    assert made.info["imported"]["strength_one_is_dose"] == {"7": 0.25}
    assert torch.allclose(made.addition(7, 0.25), torch.tensor([3.0, 4.0]))
    with pytest.raises(BlockNotFound, match=r"blocks \[7\]"):
        calibrated(found, Calibration(base=BASE, best_block=7, mean_norms={6: 1.0}), "f")
    with pytest.raises(BlockNotFound, match="block 6"):
        calibrated(found, Calibration(base=BASE, best_block=6, mean_norms={7: 1.0}), "f")


# -- hostile inputs -----------------------------------------------------------------------------


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def gguf(name: str = "direction.1", tensor: torch.Tensor | None = None, **more: Any) -> bytes:
    values = [
        ("general.architecture", Kind.STRING, more.get("architecture", "controlvector")),
        ("controlvector.layer_count", Kind.UINT32, 1),
    ]
    return write_gguf(values, {name: torch.ones(2) if tensor is None else tensor})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "names more"),
        (b"GGML" + bytes(20), "not a GGUF"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "little-endian"),
        (header(tensors=1 << 62), "names more"),
        (header(values=1 << 62), "names more"),
        (header(values=1) + struct.pack("<Q", 1 << 62), "names more"),
        (header(values=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99), "type 99"),
        (
            header(values=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 60),
            "names more",
        ),
        (
            header(values=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 1 << 60),
            "list of lists",
        ),
        (gguf()[:-33], "beyond them"),
        (gguf().replace(b"direction.1", b"direction.x"), "'direction.x'"),
        (gguf("weight"), "'weight'"),
        (gguf("direction.01"), "'direction.01'"),
        (gguf("direction.999999"), "'direction.999999'"),
        (gguf(architecture="llama"), "not a control vector"),
        (gguf(tensor=torch.tensor([1.0, float("nan")])), "not finite"),
        (gguf(tensor=torch.tensor([1.0, float("inf")])), "not finite"),
        (gguf(tensor=torch.zeros(3)), "no direction but zeros"),
        (header(), "not a control vector"),
    ],
)
def test_hostile_control_vectors(data: bytes, words: str) -> None:
    with pytest.raises(VectorFileError) as caught:
        read_control_vector(data, "given.gguf")
    assert "given.gguf" in str(caught.value) and words in str(caught.value)
    assert str(caught.value).endswith(".")


def test_more_hostile_control_vectors() -> None:
    values = [("general.architecture", Kind.STRING, "controlvector")]
    with pytest.raises(VectorFileError, match="widths"):
        read_control_vector(
            write_gguf(values, {"direction.1": torch.ones(2), "direction.2": torch.ones(3)}), "f"
        )
    half = bytearray(gguf())
    place = half.index(b"direction.1") + 11 + 4 + 8
    half[place : place + 4] = struct.pack("<I", 1)
    with pytest.raises(VectorFileError, match="type 1"):
        read_control_vector(bytes(half), "f")
    half[place - 8 : place] = struct.pack("<Q", 1 << 61)
    half[place : place + 4] = bytes(4)
    with pytest.raises(VectorFileError, match="beyond them"):
        read_control_vector(bytes(half), "f")
    with pytest.raises(VectorFileError, match=r"direction\.0"):
        read_control_vector(gguf("direction.0"), "f", shifted=True)
    with pytest.raises(BlockNotFound, match="block 0"):
        control_vector_bytes(vector(), [0, 1])
    odd = write_gguf(
        [*values, ("general.alignment", Kind.UINT32, 3)], {"direction.1": torch.ones(2)}
    )
    with pytest.raises(VectorFileError, match="alignment"):
        read_control_vector(odd, "f")
    twice = write_gguf([*values, *values], {"direction.1": torch.ones(2)})
    with pytest.raises(VectorFileError, match="twice"):
        read_control_vector(twice, "f")


def svec(**change: Any) -> bytes:
    file = {"model_type": "llama", "directions": {"1": [1.0, 2.0]}, "explained_variances": {}}
    return json.dumps({**file, **change}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a valid .svec"),
        (svec()[:-1], "not a valid .svec"),
        (b"[" * 100_000, "not a valid .svec"),
        (b"\xff\xfe{}", "not a valid .svec"),
        (b"{}", "model_type"),
        (svec(directions={"1": [1.0, float("nan")]}), "NaN"),
        (svec(directions={"1": [1e999]}), "Infinity"),
        (b'{"model_type":"x","directions":{"1":[1e999]}}', "finite"),
        (b'{"model_type":"x","directions":{"1":[1],"1":[2]}}', "twice"),
        (svec(directions={"1": "abc"}), "directions.1"),
        (svec(directions={"1": [True]}), "directions.1"),
        (svec(directions={"-1": [1.0]}), "'-1'"),
        (svec(directions={"../1": [1.0]}), "'../1'"),
        (svec(directions={"1": [[1.0], [2.0]]}), "a plane"),
        (svec(directions={"1": [1.0], "2": [1.0, 2.0]}), "widths"),
        (svec(directions={}), "no direction"),
        (svec(directions={"1": []}), "shape"),
        (svec(directions={"1": [1e300]}), "not finite"),
    ],
)
def test_hostile_svec(data: bytes, words: str) -> None:
    with pytest.raises(VectorFileError) as caught:
        read_svec(data, "given.svec")
    assert "given.svec" in str(caught.value) and words in str(caught.value)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def packed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/never-made-by-a-vector",)


def test_a_pt_file_is_read_by_its_name_alone(tmp_path: Path) -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = read_persona_pt(saved(rows.half()), "f")
    assert torch.equal(found.directions[2], rows[3].half().float())
    path = tmp_path / "v.pt"
    path.write_bytes(saved(rows))
    with pytest.raises(VectorFileError, match="persona-pt"):
        detect(path)
    assert read_foreign(path, "persona-pt").layers == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a .pt file"),
        (pickle.dumps([1]), "not a .pt file"),
        (saved(torch.ones(3, 2))[:-30], "not a .pt file"),
        (packed(), "packed"),
        (saved({"a": torch.ones(2, 2)}), "holds a dict"),
        (saved([Bomb()]), "tensor alone"),
        (saved(torch.ones(3)), r"[3]"),
        (saved(torch.ones(1, 3)), r"[1, 3]"),
        (saved(torch.ones(3, 2, dtype=torch.int64)), "int64"),
        (saved(torch.ones(1).expand(1 << 20, 1 << 12)), "far larger"),
        (saved(torch.eye(3).to_sparse()), "float32"),
        (saved(torch.full((3, 2), torch.nan)), "not finite"),
        (saved(torch.zeros(3, 2)), "zeros"),
    ],
)
def test_hostile_pt(data: bytes, words: str) -> None:
    with pytest.raises(VectorFileError) as caught:
        read_persona_pt(data, "given.pt")
    assert "given.pt" in str(caught.value) and words in str(caught.value)
    assert not Path("/tmp/never-made-by-a-vector").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a whole safetensors"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a whole safetensors"),
        (safetensors.torch.save({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}), "2 tensors"),
        (safetensors.torch.save({"a": torch.ones(2)}), "[2]"),
        (safetensors.torch.save({"a": torch.ones(2, 2)})[:-1], "not a whole safetensors"),
    ],
)
def test_hostile_persona(data: bytes, words: str) -> None:
    with pytest.raises(VectorFileError) as caught:
        read_persona(data, "f")
    assert words in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_never_do_worse_than_refuse(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from([*sorted(ROUND), "persona-pt"]))
    if format == "persona-pt":
        whole, read = bytearray(saved(torch.ones(3, 4))), lambda raw: read_persona_pt(raw, "f")
    else:
        write, read = ROUND[format]
        whole = bytearray(write(vector((1, 2))))
    cut = data.draw(st.integers(0, len(whole)))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(whole[: cut if data.draw(st.booleans()) else None]))
    except VectorFileError as error:
        assert str(error).endswith(".")


# -- which format -------------------------------------------------------------------------------


def test_formats_are_detected_and_never_guessed(tmp_path: Path) -> None:
    files = {
        "a.gguf": (control_vector_bytes(vector(), [1]), "gguf"),
        "b.gguf": (plain(True), "gguf-shifted"),
        "c.svec": (svec(), "svec"),
        "d.safetensors": (persona_bytes(vector()), "persona"),
        "no-suffix": (control_vector_bytes(vector(), [1]), "gguf"),
    }
    for name, (data, format) in files.items():
        (tmp_path / name).write_bytes(data)
        assert detect(tmp_path / name) == format
    write_vector(tmp_path / "n.safetensors", vector())
    assert detect(tmp_path / "n.safetensors") == "native"
    doubtful = {
        "x.gguf": (
            write_gguf([("general.architecture", Kind.STRING, "controlvector")], {}),
            "gguf-shifted",
        ),
        "x.safetensors": (safetensors.torch.save({"a": torch.ones(3, 2)}), "--format persona"),
        "x.pt": (saved(torch.ones(3, 2)), "--format persona-pt"),
        "x.bin": (pickle.dumps([1]), "pickle"),
        "x.json": (svec(), "not known"),
        "empty": (b"", "not known"),
    }
    for name, (data, words) in doubtful.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VectorFileError, match=words):
            detect(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VectorFileError, match="not a file"):
        detect(tmp_path / "pipe")
    with pytest.raises(VectorFileError, match="cannot be read"):
        detect(tmp_path / "nothing")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VectorFileError, match="far more"):
        detect(path)


def test_the_suffix_chooses_what_to_write() -> None:
    assert choose("auto", Path("a.GGUF"), "steering-vector").name == "gguf"
    assert choose("auto", Path("a.safetensors"), "steering-vector").name == "native"
    assert choose("persona", Path("a.bin"), "steering-vector").name == "persona"
    for format, path in (("auto", "a.bin"), ("persona-pt", "a.pt"), ("magic", "a.gguf")):
        with pytest.raises(InputError, match="gguf-shifted"):
            choose(format, Path(path), "steering-vector")
    with pytest.raises(InputError):
        choose("gguf", Path("a.gguf"), "task-vector")
    assert all(row.name == name for name, row in FORMATS.items())
