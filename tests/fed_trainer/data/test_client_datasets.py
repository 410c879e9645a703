# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients that are rows of one dataset, and a trainer that looks at those of a round only."""

from __future__ import annotations

import copy
from types import MappingProxyType

import datasets
import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig

from fed_trainer import FederatedConfig, FederatedTrainer, dirichlet_partition, iid_partition, read_record
from fed_trainer.client import data as client_data
from fed_trainer.data.client_datasets import ClientDatasets, column_by_client, one_of_each_source, rows_by_client


@pytest.fixture
def clients():
    return ClientDatasets(Dataset.from_dict({"x": [0, 1, 2, 3, 4]}), {"b": np.array([4, 0]), "a": np.array([2])})


def test_it_is_used_like_a_dictionary(clients):
    assert list(clients) == ["a", "b"]
    assert {name: rows["x"][:] for name, rows in clients.items()} == {"a": [2], "b": [4, 0]}
    assert "a" in clients and "c" not in clients
    assert {"a": 0}.keys() <= clients.keys()
    assert isinstance(dict(clients)["b"], Dataset)
    assert repr(clients) == "ClientDatasets(2 clients, 3 rows of ['x'])"
    assert clients == copy.copy(clients) == ClientDatasets(clients.dataset, {"a": [2], "b": [4, 0]})
    assert clients != ClientDatasets(clients.dataset, {"a": [2], "b": [0, 4]})
    with pytest.raises(KeyError):
        clients["c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": [0, 5]}, "Client 'a' has rows from 0 to 5, but those of the dataset are 0 to 4"),
        ({"a": [-1]}, "Client 'a' has rows from -1 to -1"),
        ({3: [0]}, "The client 3 is named by a int: use '3'"),
    ],
)
def test_what_is_no_split_is_refused(rows, message, clients):
    with pytest.raises(ValueError, match=message):
        ClientDatasets(clients.dataset, rows)


def test_sizes_and_columns_are_those_of_a_dictionary(clients):
    for same in (clients, dict(clients)):
        assert rows_by_client(same) == {"a": 1, "b": 2}
        assert {name: list(values) for name, values in column_by_client(same, "x")} == {"a": [2], "b": [4, 0]}
    assert list(one_of_each_source(clients)) == ["a"]
    assert list(one_of_each_source(dict(clients))) == ["a", "b"]


@pytest.fixture
def rows(make_clients, tmp_path):
    """The rows of `make_clients` in a file, as `load_dataset` leaves them."""
    datasets.concatenate_datasets(list(make_clients(3, 16).values())).save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(tmp_path / "rows")


def trainer_of(clients, folder, model, **settings):
    eval_dataset = settings.pop("eval_dataset", None)
    settings = {"num_rounds": 2, "max_steps": 1, "per_device_train_batch_size": 2, "max_length": 32, **settings}
    args = FederatedConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, label_column="topic", **settings
    )
    return FederatedTrainer(
        model=str(model),
        args=args,
        train_dataset=clients,
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
    )


def test_a_run_is_the_same_as_with_a_dictionary(rows, tiny_model_dir, tmp_path):
    clients = dirichlet_partition(rows, 4, alpha=1.0, column="topic", min_examples=2)
    results = []
    for number, same in enumerate((clients, dict(reversed(list(clients.items()))))):
        trainer = trainer_of(same, tmp_path / str(number), tiny_model_dir, clients_per_round=2)
        trainer.train()
        record = read_record(tmp_path / str(number))
        results.append((record["clients"], [entry["train_loss"] for entry in record["rounds"]]))
    assert results[0] == results[1]
    assert sum(client["composition"].get("sums", 0) for client in results[0][0].values()) == 16


def test_only_the_datasets_of_sampled_clients_are_made(rows, tiny_model_dir, tmp_path, monkeypatch):
    made = []
    look_up = ClientDatasets.__getitem__

    def counted(self, client):
        made.append(client)
        return look_up(self, client)

    monkeypatch.setattr(ClientDatasets, "__getitem__", counted)
    trainer = trainer_of(iid_partition(rows, 20), tmp_path / "run", tiny_model_dir, clients_per_round=2)
    trainer.train()
    sampled = {client for round in (1, 2) for client in trainer.sampler.sample(round)}
    assert set(made) <= sampled | {"client_00"}  # whose columns are looked at


def test_the_clients_prepared_last_stay_in_memory(rows, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(client_data, "KEPT_PREPARED", 3)
    trainer = trainer_of(iid_partition(rows, 6), tmp_path / "run", tiny_model_dir, clients_per_round=2)
    names = list(trainer._clients)
    first = trainer.client.data.prepared(names[0])
    for name in names[1:3]:
        trainer.client.data.prepared(name)
    assert trainer.client.data.prepared(names[0]) is first
    trainer.client.data.prepared(names[3])
    assert list(trainer.client.data._prepared) == [names[2], names[0], names[3]]
    again = trainer.client.data.prepared(names[1])
    assert (
        again["input_ids"][:] == trainer._prepare_client_dataset(trainer._clients[names[1]], names[1])["input_ids"][:]
    )


def test_a_round_of_many_clients_keeps_them_all(rows, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(client_data, "KEPT_PREPARED", 1)
    trainer = trainer_of(iid_partition(rows, 6), tmp_path / "run", tiny_model_dir)
    for name in trainer._clients:
        trainer.client.data.prepared(name)
    assert list(trainer.client.data._prepared) == list(trainer._clients)


def test_clients_of_one_dataset_are_evaluated_by_client(rows, tiny_model_dir, tmp_path):
    clients = iid_partition(rows, 3)
    trainer = trainer_of(clients, tmp_path / "run", tiny_model_dir, aggregation="fedsa_lora", eval_dataset=clients)
    assert trainer.eval_dataset is clients and not trainer._prepared_held_out  # nothing has been looked at yet
    trainer.evaluate()
    assert list(trainer.client_evaluation) == list(clients)
    as_dictionary = trainer_of(
        clients, tmp_path / "run", tiny_model_dir, aggregation="fedsa_lora", eval_dataset=dict(clients)
    )
    as_dictionary.evaluate()
    assert list(trainer._prepared_held_out) == list(clients)
    losses = [
        [figures["eval_loss"] for figures in each.client_evaluation.values()] for each in (trainer, as_dictionary)
    ]
    assert losses[0] == losses[1]


def test_held_out_data_that_is_no_clients_may_be_any_mapping(rows, tiny_model_dir, tmp_path):
    sets = MappingProxyType({"first": rows.select(range(8)), "second": rows.select(range(8, 16))})
    trainer = trainer_of(iid_partition(rows, 3), tmp_path / "run", tiny_model_dir, eval_dataset=sets)
    assert {"eval_first_loss", "eval_second_loss"} <= trainer.evaluate().keys()


def test_held_out_data_of_which_nothing_is_left_is_named(rows, tiny_model_dir, tmp_path, caplog):
    clients = iid_partition(rows, 3)
    long = rows.map(lambda row: {"prompt": row["prompt"] * 20})
    held_out = dict(clients) | {"client_1": long.select(range(4))}
    trainer = trainer_of(clients, tmp_path / "run", tiny_model_dir, aggregation="fedsa_lora", eval_dataset=held_out)
    trainer.evaluate()
    assert "Of the held-out data of client 'client_1' nothing is left" in caplog.text
    assert trainer.client_evaluation["client_1"] == {} and trainer.client_means.num_clients["eval_loss"] == 2
