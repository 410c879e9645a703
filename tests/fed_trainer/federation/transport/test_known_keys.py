# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The list of those who are trusted."""

from __future__ import annotations

import re

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation.transport import known_keys
from fed_trainer.federation.transport.keys import Identity, KeyFileError, PublicIdentity
from fed_trainer.federation.transport.known_keys import KnownKeys, UntrustedKeyError
from helpers.boards import identity_of


WARD_1, WARD_2 = identity_of("ward-1").public, identity_of("ward-2").public


@pytest.fixture
def path(tmp_path):
    return tmp_path / "known"


def test_a_list_is_read(path):
    path.write_text(f"# those of the study\n\n{WARD_1}\r\n   \n{WARD_2}")
    known = KnownKeys(path)
    assert known.names == ["ward-1", "ward-2"]
    assert known.key_of("ward-1") == known.accept(WARD_1) == WARD_1
    with pytest.raises(UntrustedKeyError, match="No key of 'ward-3' is known here: add its public line to .*known"):
        known.key_of("ward-3")


def test_an_unknown_key_is_refused_with_what_to_add(path):
    path.write_text(f"{WARD_1}\n")
    with pytest.raises(UntrustedKeyError, match=re.escape(WARD_2.fingerprint)) as error:
        KnownKeys(path).accept(WARD_2)
    assert str(error.value).endswith(str(WARD_2)) and path.read_text() == f"{WARD_1}\n"


def other_key(*, signing: bool, encryption: bool) -> PublicIdentity:
    other = identity_of("ward-1", attempt=1).public
    return PublicIdentity(
        "ward-1", other.signing if signing else WARD_1.signing, other.encryption if encryption else WARD_1.encryption
    )


@pytest.mark.parametrize("accept_first", [False, True])
@pytest.mark.parametrize("signing, encryption", [(True, True), (True, False), (False, True)])
def test_another_key_of_a_known_site_is_refused(path, accept_first, signing, encryption):
    path.write_text(f"{WARD_1}\n")
    other = other_key(signing=signing, encryption=encryption)
    with pytest.raises(UntrustedKeyError, match=f"{other.fingerprint}, but {WARD_1.fingerprint} is known"):
        KnownKeys(path, accept_first).accept(other)
    assert path.read_text() == f"{WARD_1}\n"


@given(names=st.lists(st.sampled_from([f"ward-{number}" for number in range(8)]), max_size=12))
def test_the_first_key_of_a_name_is_the_only_one(names, tmp_path_factory):
    """In any order, in any number of processes: here each key is shown to one that has just begun."""
    path = tmp_path_factory.mktemp("known") / "known"
    first: dict[str, PublicIdentity] = {}
    for attempt, name in enumerate(names):
        offered = identity_of(name, attempt).public
        if name in first:
            with pytest.raises(UntrustedKeyError, match="is known"):
                KnownKeys(path, accept_first=True).accept(offered)
        else:
            first[name] = KnownKeys(path, accept_first=True).accept(offered)
    if first:
        known = KnownKeys(path)
        assert {name: known.key_of(name) for name in known.names} == first


def test_two_processes_add_to_one_list(path):
    path.write_text("# begun by hand")  # without a line feed
    one, two = KnownKeys(path, accept_first=True), KnownKeys(path, accept_first=True)
    one.accept(WARD_1)
    two.accept(WARD_2)
    assert path.read_text() == f"# begun by hand\n{WARD_1}\n{WARD_2}\n"
    with pytest.raises(UntrustedKeyError, match="Somebody else uses its name"):
        two.accept(identity_of("ward-1", attempt=1).public)
    assert two.accept(WARD_1) == WARD_1


def test_what_another_process_has_added_since_counts(path):
    late = KnownKeys(path, accept_first=True)
    KnownKeys(path, accept_first=True).accept(WARD_1)
    with pytest.raises(UntrustedKeyError, match=f"but {WARD_1.fingerprint} is known"):
        late.accept(identity_of("ward-1", attempt=1).public)
    assert late.accept(WARD_1) == WARD_1 and path.read_text() == f"{WARD_1}\n"


def test_a_key_belongs_to_one_name(path):
    known = KnownKeys(path, accept_first=True)
    known.accept(WARD_1)
    with pytest.raises(UntrustedKeyError, match="'ward-3' shows the key of 'ward-1', and a key belongs to one name"):
        known.accept(PublicIdentity("ward-3", WARD_1.signing, WARD_2.encryption))
    assert path.read_text() == f"{WARD_1}\n"


def test_a_link_stays_a_link(tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    KnownKeys(tmp_path / "link", accept_first=True).accept(WARD_1)
    assert (tmp_path / "link").is_symlink() and path.read_text() == f"{WARD_1}\n"


LISTS = {
    "a line that is none": (f"{WARD_1}\nward-2 abc\n".encode(), "Line 2 of", "A public line is"),
    "a name twice": (f"{WARD_1}\n\n{identity_of('ward-1', 1).public}\n".encode(), "Line 3 of", "names 'ward-1', too"),
    "a key twice": (f"{WARD_1}\n{WARD_1}x\n".encode(), "Line 2 of", "has the key of 'ward-1'"),
    "not UTF-8": (b"\n\xff\n", "Line 2 of", "utf-8"),
}


@pytest.mark.parametrize("accept_first", [False, True])
@pytest.mark.parametrize("content, line, reason", LISTS.values(), ids=LISTS)
def test_a_malformed_list_is_refused_with_its_line(path, content, line, reason, accept_first):
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=f"{line} .*known' cannot be used: .*{reason}"):
        KnownKeys(path, accept_first)


def test_private_keys_are_no_list(path):
    identity = Identity.create(path, "ward-1")
    with pytest.raises(KeyFileError, match="Line 1 of") as error:
        KnownKeys(path)
    assert identity.name not in str(error.value)


def test_a_list_that_is_not_there_is_named(path):
    with pytest.raises(KeyFileError, match=r"known' cannot be read \(No such file"):
        KnownKeys(path)
    path.write_text("a file, where a folder should be")
    with pytest.raises(KeyFileError, match=r"known/known' cannot be written \("):
        KnownKeys(path / "known", accept_first=True).accept(WARD_1)


def test_a_list_that_is_too_long_is_refused(path, monkeypatch):
    monkeypatch.setattr(known_keys, "MOST_BYTES", 100)
    path.write_text(f"{WARD_1}\n")
    with pytest.raises(KeyFileError, match="is no list of keys: it has more than 100 bytes"):
        KnownKeys(path)


def test_nobody_waits_for_a_lock_for_ever(path, monkeypatch):
    monkeypatch.setattr(known_keys, "LOCK_SECONDS", 0.01)
    known = KnownKeys(path, accept_first=True)
    with FileLock(f"{path}.lock"), pytest.raises(KeyFileError, match="Another process has held"):
        known.accept(WARD_1)
    assert not path.exists()
