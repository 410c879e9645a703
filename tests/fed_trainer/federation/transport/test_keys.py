# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The keys of a site: the private file and the public line."""

from __future__ import annotations

import importlib
import os
import re
import stat
import sys
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation import transport
from fed_trainer.federation.transport.keys import Identity, KeyFileError, PublicIdentity, make_keys
from helpers.boards import identity_of


SITE_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200).filter(
    lambda name: name == name.strip() and name.isprintable()
)


@given(name=SITE_NAMES)
def test_a_public_line_says_who_it_is(name):
    public = identity_of(name).public
    line = str(public)
    assert "\n" not in line and PublicIdentity.parse(line) == PublicIdentity.parse(f"  {line}\r\n") == public


@given(name=SITE_NAMES)
def test_a_file_of_keys_is_read_as_it_was_written(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "key.json"
    made = Identity.create(path, name)
    assert Identity.load(path) == made and made.public.name == name
    assert len({made.signing, made.encryption, made.public.signing, made.public.encryption}) == 4


def test_make_keys(tmp_path):
    public = make_keys(tmp_path / "ward-1.key", "ward-1")
    assert public == Identity.load(tmp_path / "ward-1.key").public
    assert re.fullmatch(r"fed-ed25519 [A-Za-z0-9+/]{86}== ward-1", str(public))
    assert re.fullmatch(r"([0-9a-f]{4}-){7}[0-9a-f]{4}", public.fingerprint)
    assert public.fingerprint == Identity.load(tmp_path / "ward-1.key").fingerprint


def test_a_fingerprint_is_of_both_keys():
    public, other = identity_of("ward-1").public, identity_of("ward-2").public
    mixed = [PublicIdentity("x", one.signing, two.encryption) for one in (public, other) for two in (public, other)]
    assert len({each.fingerprint for each in mixed}) == 4


def test_private_keys_are_not_shown():
    identity = identity_of("ward-1")
    assert repr(identity) == "Identity(name='ward-1')"


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
class TestModes:
    def test_only_the_owner_can_read_a_file_of_keys(self, tmp_path):
        before = os.umask(0)
        try:
            make_keys(tmp_path / "ward-1.key", "ward-1")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "ward-1.key").stat().st_mode) == 0o600

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601])
    def test_a_file_that_others_can_use_is_refused(self, tmp_path, mode):
        path = tmp_path / "ward-1.key"
        make_keys(path, "ward-1")
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=f"by others \\(mode {mode:04o}\\): run `chmod 600 "):
            Identity.load(path)
        path.chmod(0o400)
        assert Identity.load(path).name == "ward-1"


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "ward-1.key"
    made = Identity.create(path, "ward-1")
    with pytest.raises(KeyFileError, match="keys are never overwritten"):
        make_keys(path, "ward-1")
    assert Identity.load(path) == made
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(KeyFileError, match="keys are never overwritten"):
        make_keys(tmp_path / "link", "ward-1")
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path):
    with pytest.raises(KeyFileError, match=r"missing/ward-1.key' cannot be written \(No such file"):
        make_keys(tmp_path / "missing" / "ward-1.key", "ward-1")
    with pytest.raises(KeyFileError, match=r"ward-1.key' cannot be read \(No such file"):
        Identity.load(tmp_path / "ward-1.key")


def test_half_a_file_is_deleted(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left on device"):
        make_keys(tmp_path / "ward-1.key", "ward-1")
    assert not list(tmp_path.iterdir())


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "without the last brace": lambda text: text.rstrip()[:-1],
    "another format": lambda text: text.replace("version 1", "version 2"),
    "a list": lambda text: f"[{text}]",
    "a public line": lambda text: str(identity_of("ward-1").public),
    "a key that is no base64": lambda text: re.sub(r'(25519": ")..', r"\1!!", text),
    "a key that is too short": lambda text: re.sub(r'(25519": ")....', r"\1", text),
    "a key that is a number": lambda text: re.sub(r'"ed25519": "[^"]*"', '"ed25519": 5', text),
    "a key in place of the name": lambda text: re.sub(r'"name": "ward-1"(.*?25519": )("[^"]*")', r'"name": [\2]\1\2', text, flags=re.S),
    "nested": lambda text: "[" * 20000,
    "not UTF-8": lambda text: text.replace("ward-1", "ward-\udcff"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_nothing_of_it_is_shown(tmp_path, damage):
    path = tmp_path / "ward-1.key"
    make_keys(path, "ward-1")
    text = path.read_text()
    keys = re.findall(r'25519": "([^"]*)"', text)
    assert len(keys) == 2
    path.write_bytes(DAMAGES[damage](text).encode("utf-8", "surrogateescape"))
    with pytest.raises(KeyFileError, match=r"ward-1.key' holds no private keys of a site") as error:
        Identity.load(path)
    shown = "".join(traceback.format_exception(error.value))
    assert not any(key[8:28] in shown for key in keys)


@pytest.mark.parametrize("name", ["", " ward", "ward ", "a\nb", "a\tb", "a\u2028b", "a" * 201, None, 5])
def test_a_name_that_does_not_fit_into_a_line_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="1 to 200 printable characters"):
        make_keys(tmp_path / "key", name)
    assert not list(tmp_path.iterdir())


LINES = {
    "nothing": ("", "A public line is `fed-ed25519 <base64> <name>`"),
    "a key of ssh": ("ssh-ed25519 AAAAC3Nza ward-1", "A public line is `fed-ed25519 <base64> <name>`"),
    "no name": (str(identity_of("ward-1").public).rpartition(" ")[0], "A public line is"),
    "half a key": (f"fed-ed25519 {'A' * 40} ward-1", "64 bytes in base64, but here are 30: copy all of it"),
    "no base64": ("fed-ed25519 @@@@ ward-1", "base64"),
    "base64 of another spelling": (f"fed-ed25519 {'A' * 85}B== ward-1", "not in the base64"),
    "a key that leads to no secret": (f"fed-ed25519 {'A' * 86}== ward-1", "none that one can encrypt with"),
}


@pytest.mark.parametrize("line, reason", LINES.values(), ids=LINES)
def test_what_is_no_public_line_is_refused(line, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        PublicIdentity.parse(line)


def test_without_the_package_the_extra_is_named_and_the_rest_works(tmp_path, monkeypatch):
    """All modules can be imported without it: a federation without keys does not need it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for module in ("ciphers", "keys", "known_keys", "seal", "introductions", "sealed"):
        monkeypatch.delitem(sys.modules, f"{transport.__name__}.{module}", raising=False)
        monkeypatch.delattr(transport, module, raising=False)
    importlib.import_module(f"{transport.__name__}.sealed")
    keys = importlib.import_module(f"{transport.__name__}.keys")
    with pytest.raises(ImportError, match=re.escape("run `pip install peft-scl[keys]`")):
        keys.make_keys(tmp_path / "key", "ward-1")
    assert not list(tmp_path.iterdir())
