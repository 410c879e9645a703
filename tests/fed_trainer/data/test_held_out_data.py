# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Held-out data of every type, in every trainer: evaluated as a `Dataset` is, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch.utils.data
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from helpers.trainers import KINDS as TRAINERS
from helpers.trainers import QUIET


RUN = {"max_steps": 1, "per_device_train_batch_size": 4, **QUIET}
TOKENS = [[5 + row % 7, 12 + row, 20] for row in range(8)]
PAIRS = {"prompt": ["What is"] * 8, "chosen": [f" {row}" for row in range(8)], "rejected": [" a"] * 8}
DATA = {
    "sft": {"text": [f"What is {row} plus {row}?" for row in range(8)]},
    "task": {"input_ids": TOKENS, "attention_mask": [[1] * 3] * 8, "labels": TOKENS},
    "dpo": PAIRS,
    "reward": PAIRS,
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.rows = dataset.to_list()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, dataset: Dataset) -> None:
        self.rows = dataset.to_list()

    def __iter__(self) -> Any:
        return iter(self.rows)


KINDS: dict[str, Callable[[Dataset], Any]] = {
    "dataset": lambda dataset: dataset,
    "stream": lambda dataset: dataset.to_iterable_dataset(),
    "stream of unknown columns": lambda dataset: IterableDataset.from_generator(lambda: iter(dataset.to_list())),
    "torch": Rows,
    "torch stream": Stream,
    "list": lambda dataset: dataset.to_list(),
    "tuple": lambda dataset: tuple(dataset.to_list()),
    "columns": lambda dataset: {"a": dataset.to_dict()},
    "pandas": lambda dataset: dataset.to_pandas(),
    "name": lambda dataset: "test",
}
STREAMS = {"stream", "stream of unknown columns", "torch stream"}
OF_DATASETS = {"dataset", "stream", "stream of unknown columns"}


@pytest.fixture
def make_trainer(make_trainer, tiny_model_dir):
    def make(kind: str, eval_dataset: Any, train_dataset: Any = None, **settings: Any) -> Any:
        rows = Dataset.from_dict(DATA[kind])
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir) if kind == "task" else None
        clients = {"a": rows, "b": rows} if train_dataset is None else train_dataset
        adapter = {"r": 2} | ({"task_type": "CAUSAL_LM"} if kind == "task" else {})
        settings = {"kind": kind, "adapter": adapter, "max_steps": 1, **settings}
        return make_trainer(model=model, clients=clients, eval_dataset=eval_dataset, **settings)

    return make


@pytest.mark.fast(trainer=["sft", "task"])
@pytest.mark.parametrize("shape", ["one", "by name", "by client"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_held_out_data_of_every_type(make_trainer, trainer: str, kind: str, shape: str) -> None:
    def shaped(data: Any) -> Any:
        return {"one": data, "by name": {"test": data}, "by client": {"a": data}}[shape]

    rows = Dataset.from_dict(DATA[trainer])
    given = shaped(KINDS[kind](rows))
    is_taken = kind in OF_DATASETS or (trainer == "task" and kind in ("torch", "torch stream"))
    if not is_taken or (kind in STREAMS and shape == "by client"):
        message = (
            r"is a (\w+), but should be a `datasets.Dataset` .*`[^`]+`"
            if not is_taken
            else "is a stream .* number of rows"
        )
        with pytest.raises(ValueError, match=message):
            make_trainer(trainer, given)
        return
    figures = make_trainer(trainer, given).evaluate()
    expected = make_trainer(trainer, shaped(rows)).evaluate()
    losses = {key: value for key, value in figures.items() if key.endswith("loss")}
    assert losses and losses == {key: expected[key] for key in losses}


def test_a_stream_is_evaluated_as_trl_does(make_trainer, tiny_model_dir, tmp_path) -> None:
    stream = KINDS["stream of unknown columns"](Dataset.from_dict(DATA["sft"]))
    args = SFTConfig(output_dir=str(tmp_path / "plain"), bf16=False, **RUN)
    plain = SFTTrainer(str(tiny_model_dir), args, train_dataset=Dataset.from_dict(DATA["sft"]), eval_dataset=stream)
    trainer = make_trainer("sft", stream)
    trainer.train()
    assert trainer.record["start"]["eval"]["eval_loss"] == plain.evaluate()["eval_loss"]


def test_dictionaries_of_datasets_are_sets_by_name(make_trainer) -> None:
    rows = Dataset.from_dict(DATA["sft"])
    for several in (DatasetDict({"test": rows}), IterableDatasetDict({"test": rows.to_iterable_dataset()})):
        assert "eval_test_loss" in make_trainer("sft", several).evaluate()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_empty_set_and_wrong_columns(make_trainer, trainer: str) -> None:
    rows = Dataset.from_dict(DATA[trainer])
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        make_trainer(trainer, rows.select([]))
    other = IterableDataset.from_generator(lambda: iter([{"something": "else"}] * 8))
    for shape in (other, {"test": other}):
        with pytest.raises(ValueError, match=r"Held-out set '.*' has the columns \['something'\]"):
            make_trainer(trainer, shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dataset"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_data_of_a_client_of_every_type(make_trainer, trainer: str, kind: str) -> None:
    rows = Dataset.from_dict(DATA[trainer])
    with pytest.raises(
        ValueError, match=r"The data of client 'b' should be a `datasets.Dataset` but is a .* makes|loads one"
    ):
        make_trainer(trainer, None, {"a": rows, "b": KINDS[kind](rows)})
    if kind == "pandas":
        with pytest.raises(
            ValueError, match="should be a dictionary from client names to datasets but is a DataFrame"
        ):
            make_trainer(trainer, None, pd.DataFrame(DATA[trainer]))


# Rows of tied embeddings


@pytest.fixture(scope="module")
def tied_model_dir(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainer", ["sft", "dpo", "task"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_trained_tokens_on_tied_embeddings(
    tiny_model_dir, tied_model_dir, tmp_path, trainer: str, is_tied: bool
) -> None:
    """TRL's fused loss goes past them, where the embeddings are the output layer too."""
    kind, config, _ = TRAINERS[trainer]
    model = AutoModelForCausalLM.from_pretrained(tied_model_dir if is_tied else tiny_model_dir)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=list(range(3, 300)))
    args = config(output_dir=str(tmp_path), num_rounds=1, learning_rate=1e-2, **RUN)
    source: Any = str(tied_model_dir if is_tied else tiny_model_dir) if trainer != "task" else model
    tokenizer = {} if trainer == "task" else {"processing_class": AutoTokenizer.from_pretrained(tiny_model_dir)}
    clients = {name: Dataset.from_dict(DATA[trainer]) for name in "ab"}
    if is_tied and trainer != "task":
        with pytest.raises(
            ValueError, match="`trainable_token_indices` on embeddings that are tied .* `FederatedTaskTrainer`"
        ):
            kind(source, args, clients, peft_config=lora, **tokenizer)
        return
    federated = kind(source, args, clients, peft_config=lora, **tokenizer)
    before = {key: tensor.clone() for key, tensor in federated.federation.state.items() if "trainable_tokens" in key}
    federated.train()
    assert before and all(not torch.equal(federated.federation.state[key], tensor) for key, tensor in before.items())
