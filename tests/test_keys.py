"""The home's signing key: made once, for its owner alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from vectors.errors import InputError, OutOfSpace
from vectors.store.signatures import public_key
from workbench.keys import KEY_FILE, named_key, own_key, signing_key
from workbench.settings import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path / "home")


def test_it_is_made_once(home: Home) -> None:
    assert own_key(home) == "" and not home.keys.exists()
    key = public_key(signing_key(home))
    assert key == public_key(signing_key(home)) == own_key(home)
    assert (home.keys / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert home.keys.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.keys.iterdir()] == [KEY_FILE]


def test_what_others_can_read_proves_nothing(home: Home) -> None:
    signing_key(home)
    (home.keys / KEY_FILE).chmod(0o640)
    with pytest.raises(InputError, match=r"can be read by others.*chmod 600"):
        signing_key(home)


@pytest.mark.parametrize("data", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_key_is_a_sentence(home: Home, data: bytes) -> None:
    signing_key(home)
    (home.keys / KEY_FILE).write_bytes(data)
    with pytest.raises(InputError, match="is damaged or has a password"):
        signing_key(home)


def test_another_kind_of_key_is_a_sentence(home: Home) -> None:
    signing_key(home)
    rsa = generate_private_key(65537, 1024)
    data = rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (home.keys / KEY_FILE).write_bytes(data)
    with pytest.raises(InputError, match="no Ed25519 key"):
        signing_key(home)


def test_a_folder_that_cannot_be(home: Home) -> None:
    home.keys.write_text("")
    with pytest.raises(OutOfSpace, match="keys"):
        signing_key(home)


def test_a_key_is_named_by_its_digits_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "their.pub"
    file.write_text("AB" * 32 + "\n")
    assert named_key(str(file)) == named_key("ab" * 32) == "ab" * 32
    with pytest.raises(InputError, match="no key file"):
        named_key(str(tmp_path / "nobody.pub"))
    with pytest.raises(InputError, match="no public key"):
        named_key("their")
