# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Names of clients: those that cannot stand in files and logs are refused before anything starts, all others work
everywhere.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.client.store import ClientStore
from fed_trainer.output.record import read_record
from fed_trainer.trainers.refusals.data import check_clients


GOOD = [
    "ward 7", "a/b", "../up", "/root", "a\\b", "c:d", "con", ".hidden", "end.", "*?<>|\"'", "%2F", "{x}", "-r", "Zoë", "日本", "🏥", "a" * 300,
    "a" * 299 + "b", "é" * 90,
]  # fmt: skip
BAD = {
    "": "is empty",
    " \u3000": "is empty",
    "\udc80": "half of a surrogate pair",
    "ward\ud83d": "half of a surrogate pair",
    "a\x00b": "control character or a line break",
    "a\nb": "control character or a line break",
    "a\tb": "control character or a line break",
    "\x1b[31mred": "control character or a line break",
    "a\x85b": "control character or a line break",
    "a\u2028b": "control character or a line break",
}
ALIKE = [("Ward", "ward"), ("Zoe\u0308", "Zo\u00eb"), ("ZO\u00cb", "zoe\u0308"), ("stra\u00dfe", "STRASSE")]


@pytest.fixture
def args(tmp_path):
    return FederatedConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", per_device_train_batch_size=2)


def data(*names):
    dataset = Dataset.from_dict({"prompt": ["a"] * 2, "completion": ["b"] * 2})
    return dict.fromkeys(("first", *names), dataset)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_name_that_cannot_be_written_is_refused(name, args):
    with pytest.raises(ValueError, match=f"{BAD[name]}.*Give the client another name") as caught:
        check_clients(data(name), args)
    str(caught.value).encode()  # the message can be printed


@pytest.mark.parametrize("name", [3, None, ("a",), b"a"], ids=ascii)
def test_a_name_that_is_no_string_is_refused_wherever_it_stands(name, args):
    with pytest.raises(ValueError, match="but names of clients are strings"):
        check_clients(data(name), args)


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=ascii)
def test_names_that_differ_only_in_case_or_composition_are_refused(one, other, args):
    with pytest.raises(ValueError, match="differ only in upper and lower case or in how letters are composed"):
        check_clients(data(one, other), args)
    check_clients(data(one), args)
    check_clients(data(other), args)


def test_all_other_names_have_files_of_their_own(args, tmp_path):
    check_clients(data(*GOOD), args)
    store = ClientStore(tmp_path / "store")
    for number, name in enumerate(GOOD):
        store.write(name, {"local": {"w": torch.full((1,), number)}}, round=1, counted=None)
    for number, name in enumerate(GOOD):
        assert store.read(name, counted=1)["local"]["w"].item() == number
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(GOOD)
    for one, other in itertools.combinations(files, 2):
        assert one.parent == tmp_path / "store" and one.name.casefold() != other.name.casefold()
        assert len(one.name.encode()) <= 255


def test_a_run_with_unusual_names(tiny_model_dir, make_clients, tmp_path):
    clients = dict(zip(GOOD, itertools.repeat(make_clients(1, 4)["client_0"]), strict=False))
    args = FederatedConfig(
        str(tmp_path / "out"), num_rounds=1, max_steps=1, max_length=32, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", gradient_checkpointing=False, keep_optimizer_state=True,
    )  # fmt: skip
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    FederatedTrainer(str(tiny_model_dir), args, clients, peft_config=peft_config).train()
    record = read_record(tmp_path / "out")
    assert record["rounds"][0]["clients"].keys() == set(GOOD) and record["rounds"][0]["refused"] == {}
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert {f"clients/{name}/loss" for name in GOOD} <= {key for entry in log for key in entry}
