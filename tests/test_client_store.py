# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

from fed_trainer.client_store import ClientStore


def state(value):
    return {"layer.0.weight": torch.full((2, 3), float(value)), "head/bias": torch.tensor([value])}


def files_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_what_a_client_keeps_comes_back_by_part_bit_for_bit(tmp_path):
    store = ClientStore(tmp_path / "clients")
    assert store.read("a") == {}
    kept = {"local": state(1), "objective": {"control.weight": torch.randn(4).bfloat16()}}
    store.write("a", kept, 1)
    store.commit()
    found = store.read("a")
    assert found.keys() == kept.keys()
    assert all(equal(found[part], kept[part]) for part in kept)
    assert store.read("b") == {}


@pytest.mark.parametrize("client", ["ward/3 (night)", "..", "klinik-ä-" + "x" * 300, "a.b", "A%2F"])
def test_any_name_of_a_client_is_a_file_of_its_own_inside_the_folder(tmp_path, client):
    store = ClientStore(tmp_path / "clients")
    store.write("other", {"local": state(2)}, 1)
    store.commit()
    store.write(client, {"local": state(1)}, 1)
    store.commit()
    assert equal(store.read(client)["local"], state(1))
    assert equal(store.read("other")["local"], state(2))
    assert len(files_of(tmp_path / "clients")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


def test_long_names_with_the_same_beginning_do_not_meet(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("x" * 300 + "1", {"local": state(1)}, 1)
    store.commit()
    store.write("x" * 300 + "2", {"local": state(2)}, 1)
    store.commit()
    assert equal(store.read("x" * 300 + "1")["local"], state(1))


def test_a_client_that_keeps_nothing_leaves_no_file(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": {}}, 1)
    store.commit()
    assert not (tmp_path / "clients").exists()


def test_a_checkpoint_costs_no_copies_and_is_not_changed_by_later_rounds(tmp_path):
    store, checkpoint = ClientStore(tmp_path / "clients"), tmp_path / "checkpoint"
    store.write("a", {"local": state(1)}, 1)
    store.commit()
    store.write("b", {"local": state(1)}, 1)
    store.commit()
    digests = store.link_into(checkpoint)
    assert os.stat(checkpoint / "a.safetensors").st_nlink == 2
    store.write("a", {"local": state(2)}, 1)
    store.commit()
    store.write("c", {"local": state(2)}, 1)
    store.commit()
    assert equal(store.read("a")["local"], state(2))
    store.restore(checkpoint, digests)
    assert equal(store.read("a")["local"], state(1))
    assert store.read("c") == {}, "a client of a round that is undone"
    store.restore(tmp_path / "absent", {})
    assert store.read("a") == {}


def test_a_round_that_breaks_off_leaves_all_clients_as_they_were(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": state(1)}, 1)
    store.commit()
    store.write("a", {"local": state(2)}, 1)
    store.write("b", {"local": state(2)}, 1)
    assert equal(store.read("a")["local"], state(1))
    assert store.read("b") == {}
    store.discard()
    store.commit()
    assert equal(store.read("a")["local"], state(1))
    assert files_of(tmp_path / "clients") == ["a.safetensors"]


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuses(source, target):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuses)
    store = ClientStore(tmp_path / "clients")
    store.write("a", {"local": state(1)}, 1)
    store.commit()
    digests = store.link_into(tmp_path / "checkpoint")
    store.clear()
    store.restore(tmp_path / "checkpoint", digests)
    assert equal(store.read("a")["local"], state(1))
