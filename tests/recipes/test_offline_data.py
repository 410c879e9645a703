# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The offline demo's client data and base model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.offline import client_data
from recipes.offline.client_data import CLIENTS, build_clients, shorten, split_paragraphs, text_key


MODEL_DIR = Path(client_data.__file__).parent / "model"


@pytest.fixture(scope="module")
def data() -> tuple[dict[str, Dataset], Dataset]:
    return build_clients()


def test_clients_are_the_same_in_every_call(data: tuple[dict[str, Dataset], Dataset]) -> None:
    clients, test_set = data
    clients_again, test_set_again = build_clients()

    assert list(clients) == list(clients_again) == list(CLIENTS)
    assert test_set.to_list() == test_set_again.to_list()
    for client, dataset in clients.items():
        assert dataset.to_list() == clients_again[client].to_list()


def test_rows_are_complete(data: tuple[dict[str, Dataset], Dataset]) -> None:
    clients, test_set = data
    for dataset in [*clients.values(), test_set]:
        assert dataset.column_names == ["prompt", "completion", "package"]
        for row in dataset:
            assert row["prompt"].startswith(row["package"])
            assert row["prompt"].endswith("\n") and row["prompt"].count("\n") == 1
            assert 20 <= len(row["completion"]) <= 400
            assert row["completion"] == row["completion"].strip()


def test_each_client_has_enough_rows_of_its_own_packages(data: tuple[dict[str, Dataset], Dataset]) -> None:
    clients, _ = data
    assert min(len(dataset) for dataset in clients.values()) >= 64

    owners = [(package, client) for client, dataset in clients.items() for package in dataset.unique("package")]
    assert len({package for package, _ in owners}) == len(owners)


def test_no_test_completion_occurs_in_training(data: tuple[dict[str, Dataset], Dataset]) -> None:
    clients, test_set = data
    train_set = concatenate_datasets(list(clients.values()))
    test_keys = {text_key(completion) for completion in test_set["completion"]}

    assert not test_keys & {text_key(completion) for completion in train_set["completion"]}
    assert not set(test_set["prompt"]) & set(train_set["prompt"])
    assert len(test_keys) == len(test_set)


def test_test_set_is_a_tenth_of_every_client(data: tuple[dict[str, Dataset], Dataset]) -> None:
    clients, test_set = data
    num_rows = len(test_set) + sum(map(len, clients.values()))
    assert 0.07 <= len(test_set) / num_rows <= 0.13

    test_packages = set(test_set.unique("package"))
    assert all(test_packages & set(dataset.unique("package")) for dataset in clients.values())


@pytest.mark.parametrize(
    ("paragraphs", "expected"),
    [
        (["One.", "Two.", "A third paragraph."], "One.\nTwo."),
        (["A sentence. A long one"], "A sentence."),
        (["Ten chars.", "x"], "Ten chars."),
        (["several words without"], "several"),
        (["a" * 20], "a" * 10),
    ],
)
def test_shorten_cuts_where_a_reader_would(paragraphs: list[str], expected: str) -> None:
    assert shorten(paragraphs, max_chars=11 if expected == "A sentence." else 10) == expected


def test_split_paragraphs_leaves_examples_out() -> None:
    text = "Return the\n  sum.\n\n>>> add(1, 2)\n3\n\nThe arguments\tare numbers.\n"
    assert split_paragraphs(text) == ["Return the sum.", "The arguments are numbers."]


def test_model_loads_and_is_small(data: tuple[dict[str, Dataset], Dataset]) -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 8 * 2**20

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        model.config.bos_token_id,
        model.config.eos_token_id,
        model.config.pad_token_id,
    )

    row = data[1][0]
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    prompt_ids = tokenizer(row["prompt"])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    # The loss of the completion alone needs the prompt's tokens to be a prefix of the whole text's.
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"] + row["completion"]

    batch = torch.tensor([ids])
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    # A model that knows nothing has a loss of log(2048) = 7.6.
    assert loss < 6.5
