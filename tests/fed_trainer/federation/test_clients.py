# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer import FederatedConfig
from fed_trainer.federation.sampling import ClientSampler, client_seed
from fed_trainer.trainers.refusals.data import check_clients, check_sft_columns


TEN = [f"client_{index}" for index in range(10)]


def rows(number: int, *columns: str) -> Dataset:
    return Dataset.from_dict({column: ["text"] * number for column in columns or ("text",)})


@pytest.fixture
def make_args(tmp_path: Path):
    def make(**kwargs: Any) -> FederatedConfig:
        return FederatedConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | kwargs)

    return make


# Sampling


def test_sampling_is_a_function_of_seed_and_round() -> None:
    sampled = [ClientSampler(TEN, 4, seed=3).sample(round) for round in range(1, 21)]
    resumed = ClientSampler(TEN, 4, seed=3)
    np.random.seed(1), torch.manual_seed(1), random.seed(1)
    assert [resumed.sample(round) for round in reversed(range(1, 21))] == sampled[::-1]
    assert resumed.sample(7) == resumed.sample(7) == sampled[6]


def test_sampling_differs_by_round_and_seed() -> None:
    sampler = ClientSampler(TEN, 4, seed=3)
    assert len({tuple(sampler.sample(round)) for round in range(1, 31)}) > 20
    other = ClientSampler(TEN, 4, seed=4)
    assert [sampler.sample(round) for round in range(1, 6)] != [other.sample(round) for round in range(1, 6)]
    # seed + round would give this run the other one's clients, one round late
    assert [sampler.sample(round) for round in range(2, 7)] != [other.sample(round) for round in range(1, 6)]


def test_sampling_leaves_the_global_generators_alone() -> None:
    np.random.seed(0), random.seed(0)
    expected = np.random.random(), random.random()
    np.random.seed(0), random.seed(0)
    ClientSampler(TEN, 4, seed=3).sample(1)
    assert (np.random.random(), random.random()) == expected


@pytest.mark.parametrize("seed", [0, 42])
def test_sampling_is_uniform(seed: int) -> None:
    num_rounds, sampled = 2000, 3
    sampler = ClientSampler(TEN, sampled, seed)
    counts = Counter(client for round in range(1, num_rounds + 1) for client in sampler.sample(round))
    expected = num_rounds * sampled / len(TEN)
    # without replacement the counts vary less than multinomial ones, by (1 - sampled / all); 27.9 is the 99.9 %
    # quantile of chi-square with 9 degrees of freedom
    chi_square = sum((counts[client] - expected) ** 2 for client in TEN) / expected / (1 - sampled / len(TEN))
    assert 0.5 < chi_square < 27.9


@given(number=st.integers(1, 40), share=st.floats(0, 1, exclude_min=True), round=st.integers(0, 10**6), data=st.data())
def test_sampled_clients_are_distinct_and_known(number: int, share: float, round: int, data: st.DataObject) -> None:
    clients = [f"client_{index}" for index in range(number)]
    per_round = data.draw(st.sampled_from([None, share, data.draw(st.integers(1, number))]))
    sampler = ClientSampler(clients, per_round, seed=5)
    sampled = sampler.sample(round)
    assert len(sampled) == len(set(sampled)) == sampler.num_sampled >= 1
    assert set(sampled) <= set(clients)
    assert sampled == sorted(sampled)


@given(order=st.permutations(TEN), round=st.integers(1, 50))
def test_order_of_the_dictionary_does_not_matter(order: list[str], round: int) -> None:
    clients = dict.fromkeys(order, rows(1))
    assert ClientSampler(list(clients), 4, seed=3).sample(round) == ClientSampler(TEN, 4, seed=3).sample(round)


@pytest.mark.parametrize(
    ("per_round", "expected"),
    [
        (None, 10),
        (1, 1),
        (1.0, 10),
        (7, 7),
        (7.0, 7),
        (10, 10),
        (0.5, 5),
        (0.24, 2),
        (0.26, 3),
        (0.001, 1),
        (0.999, 10),
    ],
)
def test_number_or_fraction(per_round: float | None, expected: int) -> None:
    sampler = ClientSampler(TEN, per_round, seed=3)
    assert sampler.num_sampled == len(sampler.sample(1)) == expected


def test_all_clients_in_sorted_order() -> None:
    assert ClientSampler(["b", "c", "a"], None, seed=0).sample(1) == ["a", "b", "c"]


def test_more_clients_than_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"`clients_per_round` is 11, but there are only 10 clients. Set it to at most 10, or leave"
    ):
        ClientSampler(TEN, 11, seed=3)


# Seeds


def test_client_seed_differs_by_seed_round_and_client() -> None:
    seeds = {
        client_seed(seed, round, client) for seed in (0, 1, 42) for round in range(1, 51) for client in [*TEN, "é", ""]
    }
    assert len(seeds) == 3 * 50 * 12
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_client_seed_is_the_same_in_every_process() -> None:
    # `hash("client_0")` would not be; a changed value makes resumed runs differ from the run they continue
    assert client_seed(42, 1, "client_0") == 3157976378
    assert type(client_seed(42, 1, "client_0")) is int


# Refusals


def test_clients_that_can_be_trained(make_args) -> None:
    args = make_args(per_device_train_batch_size=4, gradient_accumulation_steps=2, label_column="topic")
    check_clients({"a": rows(8, "text", "topic"), "b": rows(100, "text", "topic")}, args)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (
            rows(8),
            "should be a dictionary from client names to datasets but is a Dataset. The functions of `fed_trainer",
        ),
        ({}, "should be a dictionary from client names to datasets but is a dict without entries"),
        (None, "should be a dictionary from client names to datasets but is a NoneType"),
        ([rows(8)], "should be a dictionary from client names to datasets but is a list"),
        ({"a": [1, 2]}, "The data of client 'a' should be a `datasets.Dataset` but is a list. Updates are weighted"),
        (
            {"a": rows(8), "b": IterableDataset.from_generator(lambda: iter([{"text": ""}]))},
            "The data of client 'b' should be a `datasets.Dataset` but is a IterableDataset",
        ),
        ({"a": rows(8), "b": rows(0)}, "Client 'b' has no examples, so it has nothing to train on. Leave it out"),
        (
            {"a": rows(8), "b": rows(7)},
            r"Client 'b' has 7 examples, fewer than one local batch of 8 \(per_device_train_batch_size=4 x "
            r"gradient_accumulation_steps=2 x 1 processes\)",
        ),
    ],
)
def test_clients_that_cannot_be_trained(make_args, clients: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_clients(clients, make_args(per_device_train_batch_size=4, gradient_accumulation_steps=2))


def test_client_names_that_are_no_strings(make_args) -> None:
    with pytest.raises(ValueError, match=r"\b1\b"):
        check_clients({1: rows(8), 2: rows(8)}, make_args(per_device_train_batch_size=4))


def test_packed_clients_may_have_fewer_rows_than_a_batch(make_args) -> None:
    check_clients({"a": rows(1)}, make_args(per_device_train_batch_size=4, packing=True))
    with pytest.raises(ValueError, match="Client 'a' has no examples"):
        check_clients({"a": rows(0)}, make_args(per_device_train_batch_size=4, packing=True))


def test_missing_label_column(make_args) -> None:
    clients = {"a": rows(8, "text", "topic"), "b": rows(8)}
    with pytest.raises(ValueError, match=r"`label_column` is 'topic', but client 'b' has the columns \['text'\]\."):
        check_clients(clients, make_args(label_column="topic"))


@pytest.mark.parametrize(
    "columns",
    [("prompt", "completion"), ("messages",), ("conversations",), ("input_ids",), ("text",), ("id", "text", "topic")],
)
def test_known_columns(columns: tuple[str, ...]) -> None:
    check_sft_columns({"a": rows(2, *columns), "b": rows(3, *columns)}, "text")
    check_sft_columns({"a": rows(2, *columns), "b": rows(3, *reversed(columns))}, "text")


def test_text_column_of_another_name() -> None:
    check_sft_columns({"a": rows(2, "answer")}, "answer")
    with pytest.raises(ValueError, match="Client 'a' has the columns"):
        check_sft_columns({"a": rows(2, "text")}, "answer")


@pytest.mark.parametrize("columns", [("prompt",), ("question", "answer"), ("completion", "instruction")])
def test_unknown_columns(columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        check_sft_columns({"a": rows(2, "text"), "b": rows(2, *columns)}, "text")
    assert str(error.value) == (
        f"Client 'b' has the columns {sorted(columns)}, none of the formats of `SFTTrainer`: 'prompt' and 'completion', "
        "'messages', or the text column 'text'. Rename its columns, or set `dataset_text_field`."
    )


def test_clients_with_different_columns() -> None:
    clients = {"a": rows(2, "prompt", "completion"), "b": rows(2, "text")}
    with pytest.raises(
        ValueError, match=r"Client 'b' has the columns \['text'\], but client 'a' has \['completion', 'prompt'\]"
    ):
        check_sft_columns(clients, "text")
