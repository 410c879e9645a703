# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fed_trainer.client import store as client_store
from fed_trainer.client.store import ClientStore
from fed_trainer.output.client_files import check_owner
from fed_trainer.output.disk import DamagedFileError, file_digest
from helpers.comparison import same
from helpers.runs import flip_bit


LAST = 99  # whatever was written has counted
ALL = {"a": LAST, "b": LAST}


def state(value):
    return {"layer.0.weight": torch.full((2, 3), float(value)), "head/bias": torch.tensor([value])}


def files_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def test_what_a_client_keeps_comes_back_by_part_bit_for_bit(tmp_path):
    store = ClientStore(tmp_path / "clients")
    assert store.read("a", LAST) == {}
    kept = {"local": state(1), "objective": {"control.weight": torch.randn(4).bfloat16()}}
    store.write("a", kept, 1, LAST)
    store.settle({})
    found = store.read("a", LAST)
    assert found.keys() == kept.keys()
    assert all(same(found[part], kept[part]) for part in kept)
    assert store.read("b", LAST) == {}


@pytest.mark.parametrize("client", ["ward/3 (night)", "..", "klinik-ä-" + "x" * 300, "a.b", "A%2F"])
def test_any_name_of_a_client_is_a_file_of_its_own_inside_the_folder(tmp_path, client):
    store = ClientStore(tmp_path / "clients")
    store.write("other", {"local": state(2)}, 1, LAST)
    store.settle({})
    store.write(client, {"local": state(1)}, 1, LAST)
    store.settle({})
    assert same(store.read(client, LAST)["local"], state(1))
    assert same(store.read("other", LAST)["local"], state(2))
    assert len(files_of(tmp_path / "clients")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


def test_long_names_with_the_same_beginning_do_not_meet(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("x" * 300 + "1", {"local": state(1)}, 1, LAST)
    store.settle({})
    store.write("x" * 300 + "2", {"local": state(2)}, 1, LAST)
    store.settle({})
    assert same(store.read("x" * 300 + "1", LAST)["local"], state(1))


def test_a_client_that_keeps_nothing_leaves_no_file(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": {}}, 1, LAST)
    store.settle({})
    assert not (tmp_path / "clients").exists()


def test_a_checkpoint_costs_no_copies_and_is_not_changed_by_later_rounds(tmp_path):
    store, checkpoint = ClientStore(tmp_path / "clients"), tmp_path / "checkpoint"
    store.write("a", {"local": state(1)}, 1, None)
    store.write("b", {"local": state(1)}, 1, None)
    store.settle({})
    digests = store.link_into(checkpoint, {"a": 1, "b": 1})
    assert files_of(checkpoint) == sorted(digests) == ["a.safetensors", "b.safetensors"]
    assert os.stat(checkpoint / "a.safetensors").st_nlink == 2
    store.write("a", {"local": state(2)}, 2, 1)
    store.write("c", {"local": state(2)}, 2, None)
    store.settle({})
    assert same(store.read("a", 2)["local"], state(2))
    store.restore(checkpoint, digests)
    assert same(store.read("a", 1)["local"], state(1))
    assert store.read("c", 2) == {}, "a client of a round that is undone"
    store.restore(tmp_path / "absent", {})
    assert store.read("a", 1) == {}


def test_what_was_written_holds_once_its_round_is_said_to_have_counted(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": state(1)}, 1, None)
    store.write("a", {"local": state(2)}, 2, 1)
    store.write("b", {"local": state(2)}, 2, None)
    store.settle({})
    for reader in (store, ClientStore(tmp_path / "clients")):
        assert same(reader.read("a", 1)["local"], state(1)), "the second round broke off, or left it out"
        assert same(reader.read("a", 2)["local"], state(2))
        assert reader.read("a", None) == reader.read("b", None) == reader.read("b", 1) == {}
    assert store.link_into(tmp_path / "first", {"a": 1}).keys() == {"a.safetensors"}
    assert check_owner(tmp_path / "first" / "a.safetensors") == ("a", 1)
    assert store.link_into(tmp_path / "second", {"a": 2, "b": 2}).keys() == {"a.safetensors", "b.safetensors"}
    assert check_owner(tmp_path / "second" / "a.safetensors") == ("a", 2)

    store.write("a", {"local": state(3)}, 3, 1)  # so the second round has not counted
    store.write("b", {"local": {}}, 3, 2)
    assert files_of(tmp_path / "clients") == ["a@1.safetensors", "a@3.safetensors", "b@2.safetensors"]
    assert same(store.read("a", 3)["local"], state(3))
    assert same(store.read("b", 3)["local"], state(2)), "it had nothing new to keep"
    store.write("b", {"local": {}}, 4, None)
    assert store.read("b", 4) == {}, "what it kept has never counted"
    store.settle({"a": 3})
    assert files_of(tmp_path / "clients") == ["a@3.safetensors"]
    store.settle({"a": 2})
    assert files_of(tmp_path / "clients") == [] and ClientStore(tmp_path / "clients").read("a", 3) == {}


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuses(source, target):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuses)
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": state(1)}, 1, LAST)
    store.settle({})
    digests = store.link_into(tmp_path / "checkpoint", {"a": 1})
    store.clear()
    store.restore(tmp_path / "checkpoint", digests)
    assert same(store.read("a", LAST)["local"], state(1))


# What is damaged, and whose it is


def store_of(folder, rounds=2):
    """Clients "a" and "b" of two rounds; "b" has the same sizes."""
    store = ClientStore(folder)
    for round in range(1, rounds + 1):
        for client in ("a", "b"):
            store.write(client, {"local": state(10 * round + len(client) + ord(client))}, round, LAST)
        store.settle({})
    return store


def directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "flipped": (flip_bit, "a@2.safetensors is not what was written"),
    "cut off": (lambda path: os.truncate(path, 20), "a@2.safetensors is not what was written"),
    "empty": (lambda path: path.write_bytes(b""), "a@2.safetensors is not what was written"),
    "gone": (Path.unlink, r"a@2.safetensors cannot be read \(FileNotFoundError\)"),
    "a directory": (directory, r"a@2.safetensors cannot be read \(IsADirectoryError\)"),
    "another client's": (
        lambda path: path.write_bytes(path.with_name("b@2.safetensors").read_bytes()),
        "a@2.safetensors holds what client 'b' kept in round 2, not 'a' in round 2",
    ),
    "older": (
        lambda path: path.write_bytes(path.with_name("older").read_bytes()),
        "a@2.safetensors holds what client 'a' kept in round 1, not 'a' in round 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("process", ["that wrote it", "another"])
def test_a_damaged_file_is_noticed_when_it_is_read(tmp_path, damage, process):
    store = store_of(tmp_path / "clients", rounds=1)
    shutil.copy(tmp_path / "clients" / "a@1.safetensors", tmp_path / "older")
    store = store_of(tmp_path / "clients")
    shutil.copy(tmp_path / "older", tmp_path / "clients" / "older")
    reader = store if process == "that wrote it" else ClientStore(tmp_path / "clients")
    assert reader.read("a", LAST) and reader.read("b", LAST)
    act, expected = DAMAGES[damage]
    act(tmp_path / "clients" / "a@2.safetensors")
    with pytest.raises(
        DamagedFileError, match=f"What client 'a' keeps is damaged, in .*: {expected}. `train\\(resume"
    ):
        reader.read("a", LAST)
    assert reader.read("b", LAST)


@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone", "another client's"])
def test_what_was_written_since_the_last_checkpoint_is_compared_before_it_enters_one(tmp_path, damage):
    store = store_of(tmp_path / "clients")
    DAMAGES[damage][0](tmp_path / "clients" / "a@2.safetensors")
    with pytest.raises(DamagedFileError, match="What client 'a' keeps"):
        store.link_into(tmp_path / "checkpoint", ALL)


def test_files_are_hashed_when_they_are_written_and_at_their_first_checkpoint_alone(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        client_store, "file_digest", lambda path, **how: hashed.append(path.name) or file_digest(path, **how)
    )
    store = store_of(tmp_path / "clients")
    first = store.link_into(tmp_path / "first", ALL)
    assert sorted(hashed) == ["a@2.safetensors", "b@2.safetensors"]
    store.write("b", {"local": state(7)}, 3, LAST)
    store.settle({})
    second = store.link_into(tmp_path / "second", ALL)
    assert sorted(hashed) == ["a@2.safetensors", "b@2.safetensors", "b@3.safetensors"]
    assert first["a.safetensors"] == second["a.safetensors"] and first["b.safetensors"] != second["b.safetensors"]
    os.truncate(tmp_path / "first" / "a.safetensors", 20)  # the live file too, through the hard link
    with pytest.raises(DamagedFileError, match=r"What client 'a' keeps is damaged: a@2\.safetensors is not"):
        store.link_into(tmp_path / "third", ALL)


def test_the_same_state_is_the_same_file(tmp_path):
    contents = set()
    for index in range(8):
        store_of(tmp_path / str(index))
        contents.add((tmp_path / str(index) / "a@2.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("has_links", [True, False])
def test_what_enters_a_checkpoint_is_on_the_disk(tmp_path, monkeypatch, has_links):
    def refuses(source, target):
        raise OSError("not supported")

    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    if not has_links:
        monkeypatch.setattr(os, "link", refuses)
    store_of(tmp_path / "clients").link_into(tmp_path / "checkpoint", ALL)
    assert {path.stat().st_ino for path in [tmp_path / "checkpoint", *(tmp_path / "checkpoint").iterdir()]} <= synced


@pytest.mark.parametrize("client", ["a", "ward/3 (night)", "x" * 300])
def test_a_file_says_whose_it_is_and_of_which_round(tmp_path, client):
    store = ClientStore(tmp_path / "clients")
    store.write(client, {"local": state(1)}, 4, LAST)
    store.settle({})
    (path,) = (tmp_path / "clients").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        (owner,) = file.metadata().values()
    assert json.loads(owner) == {"client": client, "round": 4}
    assert check_owner(path) == (client, 4)
    other = path.with_name("other.safetensors")
    os.replace(path, other)
    with pytest.raises(DamagedFileError, match=r"other\.safetensors holds what client"):
        check_owner(other)


@pytest.mark.parametrize("content", [None, "", "[]", '{"a@2.safetensors": 3}'])
def test_without_an_index_nothing_is_guessed(tmp_path, content):
    store = store_of(tmp_path / "clients")
    path = tmp_path / "clients" / "index.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DamagedFileError, match="index.json' is not what was written"):
        store.read("a", LAST)
    store.clear()
    assert not (tmp_path / "clients").exists(), "but it is known what runs have written"


# What is not ours

FOREIGN = {
    "a text": lambda folder: (folder / "notes.txt").write_text("of the user"),
    "a folder": lambda folder: (folder / "models").mkdir(),
    "weights": lambda folder: save_file({"x": torch.ones(1)}, folder / "model.safetensors"),
    "weights with the name of a client": lambda folder: save_file({"x": torch.ones(1)}, folder / "c.safetensors"),
    "weights of a client under another name": lambda folder: save_file(
        {"x": torch.ones(1)}, folder / "c.safetensors", metadata={"client": "d"}
    ),
    "a folder with the name of a client": lambda folder: (folder / "c.safetensors").mkdir(),
}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("is_marked", [False, True])
def test_a_folder_with_something_foreign_is_refused_and_left_as_it_is(tmp_path, foreign, is_marked):
    folder = tmp_path / "clients"
    if is_marked:
        store_of(folder)
    folder.mkdir(exist_ok=True)
    FOREIGN[foreign](folder)
    before = sorted(folder.iterdir())
    for act in (lambda store: store.clear(), lambda store: store.restore(tmp_path / "absent", {})):
        with pytest.raises(FileExistsError, match="clients' holds what no run has written .*Move that away"):
            act(ClientStore(folder))
        assert sorted(folder.iterdir()) == before


def test_all_that_runs_have_written_is_removed_also_if_they_died(tmp_path):
    folder = tmp_path / "clients"
    store = store_of(folder)
    store.write("a", {"local": state(3)}, 3, LAST)
    os.truncate(folder / "b@2.safetensors", 3)  # of which the index still knows
    (folder / ".index.json.tmp").write_text("{")
    ClientStore(folder).clear()
    assert not folder.exists()
    folder.mkdir()  # and died before it was marked
    ClientStore(folder).clear()
    assert not folder.exists()


def test_files_of_the_first_versions_are_removed_if_a_run_died_while_it_took_them_over(tmp_path, monkeypatch):
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "clients"
    checkpoint.mkdir()
    save_file({"local/x": torch.ones(2)}, checkpoint / "a.safetensors", metadata={"client": "a"})
    digests = {"a.safetensors": file_digest(checkpoint / "a.safetensors")}
    store = ClientStore(folder)

    def dies() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_index", dies)
    with pytest.raises(KeyboardInterrupt):
        store.restore(checkpoint, digests)
    assert files_of(folder) == ["a@0.safetensors"]
    again = ClientStore(folder)
    again.restore(checkpoint, digests)
    assert same(again.read("a", LAST)["local"], {"x": torch.ones(2)})
