# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Objects are whole or not there, and a store that cannot be used is a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation.transport.store.objects import DamagedObjectError, Objects, StoreError
from helpers.lagging import World


def objects_in(world: World, patience: float = 60.0) -> Objects:
    return Objects("lagging://run", patience, **world.options())


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def objects(world: World) -> Objects:
    return objects_in(world)


# Whole or not there


def test_what_was_put_is_there(objects: Objects) -> None:
    objects.put("a/b", b"content")
    assert objects.is_there("a/b") and objects.get("a/b") == b"content"


def test_what_was_not_put_is_not(objects: Objects) -> None:
    assert not objects.is_there("a/b") and objects.get("a/b") is None


def test_a_payload_without_a_marker_is_nothing(world: World, objects: Objects) -> None:
    objects.put("a", b"content")
    world.put("run/a.json", None)
    assert not objects.is_there("a") and objects.get("a") is None


def test_the_payload_is_written_before_the_marker(world: World, objects: Objects) -> None:
    objects.put("a", b"content")
    assert list(world.versions) == ["run/a.bin", "run/a.json"]


@given(st.integers(0, 200))
def test_a_marker_that_is_half_written_is_nothing(length: int) -> None:
    world = World()
    objects = objects_in(world)
    objects.put("a", b"content")
    whole = world.files["run/a.json"]
    world.put("run/a.json", whole[: min(length, len(whole) - 1)])
    assert not objects.is_there("a") and objects.get("a") is None


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"sha256": 1, "size": 7}', b'{"sha256": "x", "size": true}', b"\xff"]
)
def test_something_else_in_place_of_a_marker_is_nothing(world: World, objects: Objects, content: bytes) -> None:
    objects.put("a", b"content")
    world.put("run/a.json", content)
    assert objects.get("a") is None


def test_a_payload_that_is_seen_after_its_marker_is_waited_for(world: World, objects: Objects) -> None:
    objects.put("a", b"content")
    world.put("run/a.bin", None)

    def sleep(seconds: float) -> None:
        world.sleep(seconds)
        if world.now > 3:
            world.put("run/a.bin", b"content")

    objects.files.sleep = sleep
    assert objects.get("a") == b"content" and world.slept == sorted(world.slept)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"contemt", "a.bin has 7 bytes of another content, but was written with 7"),
        (b"cont", "a.bin has 4 bytes of another content, but was written with 7"),
        (b"content and more", "a.bin has 16 bytes of another content, but was written with 7"),
        (None, "a.bin is not there, but was written with 7"),
    ],
    ids=["another", "shorter", "longer", "missing"],
)
def test_a_damaged_payload_is_refused(world: World, objects: Objects, payload: bytes | None, message: str) -> None:
    objects.put("a", b"content")
    world.put("run/a.bin", payload)
    with pytest.raises(DamagedObjectError, match=message):
        objects.get("a")
    assert sum(world.slept) < 10


def test_the_same_twice_is_no_harm(world: World, objects: Objects) -> None:
    objects.put("a", b"content")
    before = world.files
    objects.put("a", b"content")
    assert world.files == before


@given(st.binary(max_size=100), st.randoms(use_true_random=False))
def test_what_is_seen_late_is_whole_or_not_there(content: bytes, draw: Any) -> None:
    world = World(lag=2.0, draw=draw, failure=0.2)
    objects = objects_in(world)
    objects.put("a", content)
    for _ in range(5):
        assert objects.get("a") in (content, None)
    world.settle()
    assert objects.get("a") == content


def test_nothing_is_listed_to_find_an_object(world: World, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    def ls(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("listed")

    monkeypatch.setattr("helpers.lagging.LaggingFileSystem.ls", ls)
    objects.put("a", b"content")
    assert objects.get("a") == b"content" and not objects.is_there("b")


def test_a_note_in_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(str(tmp_path))
    objects.write_note("note", {"number": 1})

    def move(*args: Any) -> None:
        assert objects.read_note("note") == {"number": 1}
        raise StoreError("stopped")

    monkeypatch.setattr(type(objects.files._fs), "mv", move)
    with pytest.raises(StoreError, match="stopped"):
        objects.write_note("note", {"number": 2})
    assert objects.read_note("note") == {"number": 1}


def test_a_note_in_a_folder_leaves_nothing_beside_it(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "run"))
    for number in range(3):
        objects.write_note("deep/note", {"number": number})
    assert [path.name for path in (tmp_path / "run/deep").iterdir()] == ["note.json"]
    assert json.loads((tmp_path / "run/deep/note.json").read_text()) == {"number": 2}


def test_files_in_memory() -> None:
    objects = Objects("memory://of-test-objects")
    objects.put("a/b", b"content")
    assert objects.get("a/b") == b"content" and objects.files.names("") == ["a"]
    objects.files.delete_folder("a")
    objects.files.delete_folder("a")
    assert objects.get("a/b") is None and objects.files.names("a") == []


# A store that does not answer


def test_a_store_that_does_not_answer_is_tried_again_with_growing_pauses(world: World) -> None:
    objects = objects_in(world, patience=60)
    objects.put("a", b"content")
    world.error = ConnectionError("no route")

    def sleep(seconds: float) -> None:
        world.sleep(seconds)
        if world.now >= 30:
            world.error = None

    objects.files.sleep = sleep
    assert objects.get("a") == b"content"
    assert world.slept == sorted(world.slept) and world.slept[0] == 0.1 and world.slept[-1] == 5.0
    assert len(world.slept) < 15


def test_but_not_for_ever(world: World) -> None:
    objects = objects_in(world, patience=60)
    world.error = ConnectionError("no route")
    with pytest.raises(
        StoreError, match=r"read 'a.json' for 60 seconds \(ConnectionError: no route\). Nothing is lost"
    ):
        objects.get("a")
    assert 60 <= sum(world.slept) <= 65


# Bad input


@pytest.mark.parametrize("act", ["put", "get", "delete", "names", "delete_folder"])
def test_no_rights(world: World, objects: Objects, act: str) -> None:
    objects.put("a/b", b"content")
    world.error = PermissionError("denied")
    acts = {
        "put": lambda: objects.put("a/b", b""),
        "get": lambda: objects.get("a/b"),
        "delete": lambda: objects.files.delete("a/b.bin"),
        "names": lambda: objects.files.names("a"),
        "delete_folder": lambda: objects.files.delete_folder("a"),
    }
    with pytest.raises(StoreError, match=r"'lagging://run' does not let this process .* Ask for the right to"):
        acts[act]()
    assert not world.slept


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_rights_in_a_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="does not let this process write 'a.bin'"):
        Objects(str(tmp_path)).put("a", b"")


def test_no_credentials(world: World, objects: Objects) -> None:
    world.error = type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
    with pytest.raises(StoreError, match="Unable to locate credentials.*look whether its credentials are set"):
        objects.get("a")
    assert not world.slept


@pytest.mark.parametrize(
    "error", [ValueError("Invalid endpoint: x"), type("ParamValidationError", (Exception,), {})("x")]
)
def test_what_no_time_helps_against(world: World, objects: Objects, error: Exception) -> None:
    world.error = error
    with pytest.raises(StoreError, match="cannot be used"):
        objects.get("a")
    assert not world.slept


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    objects = Objects(str(tmp_path / "file"))
    for act in (lambda: objects.get("a"), lambda: objects.put("a", b"")):
        with pytest.raises(StoreError, match="Give a folder of its own as the address"):
            act()


def test_a_store_that_only_reads() -> None:
    with pytest.raises(StoreError, match=r"'data:run' cannot be used to write 'a.bin'.*Give another address"):
        Objects("data:run").put("a", b"")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere://run", "cannot be opened.*nowhere.*Give a folder, or an address that fsspec knows"),
        ("s3://", "is no place of its own"),
        ("memory://", "is no place of its own"),
        ("simplecache::memory://run", "it chains file systems"),
    ],
)
def test_a_wrong_address(address: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Objects(address)


def test_options_that_a_file_system_does_not_know() -> None:
    with pytest.raises(StoreError, match="cannot be opened.*missing 1 required"):
        Objects("lagging://run", storage_options={"endpoint": "x"})


@pytest.mark.parametrize(
    ("address", "how"),
    [
        ("s3://bucket/run", r"`pip install 'peft-scl\[s3\]'` installs it"),
        ("gs://bucket/run", r"`pip install 'peft-scl\[gcs\]'` installs it"),
        ("abfs://box/run", "Install it, or give another address"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, address: str, how: str) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Install it to access this")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(StoreError, match=rf"needs a package that is not installed \(Install it.*\)\. {how}"):
        Objects(address)
