# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever loads the batches, the figures of a client are those of its own rows, and no process is left over."""

from __future__ import annotations

import gc
import multiprocessing
from functools import partial
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from fed_trainer.federation.sampling import client_seed
from helpers.local_rounds import local_round
from helpers.trainers import QUICK_TEXT


LOCAL = {**QUICK_TEXT, "lr_scheduler_type": "constant"}
WORKERS = {"dataloader_num_workers": 2}
LOADERS: dict[str, dict[str, Any]] = {
    "none": {},
    "workers": WORKERS,
    "persistent": WORKERS
    | {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3, "dataloader_pin_memory": False},
}
LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["v_proj"], task_type="CAUSAL_LM")


pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.fixture
def clients(make_clients):
    """Two clients, with rows that differ in number and length."""
    clients = {name: data.remove_columns("topic") for name, data in make_clients(num_clients=2, rows=12).items()}
    return clients | {"client_1": clients["client_1"].select(range(9))}


@pytest.fixture
def make_trainer(make_trainer, clients):
    return partial(make_trainer, adapter=LORA, clients=clients, num_rounds=1, **LOCAL)


@pytest.fixture
def expected(tiny_model_dir, tmp_path):
    """What a trainer of TRL made for these rows alone gives, without any worker."""

    def evaluated(adapter: Any, rows: Any) -> float:
        trainer = SFTTrainer(
            AutoPeftModelForCausalLM.from_pretrained(adapter),
            SFTConfig(str(tmp_path / "stock"), bf16=False, **LOCAL),
            train_dataset=rows,
            eval_dataset=rows,
        )
        return trainer.evaluate()["eval_loss"]

    return evaluated


def left_over() -> list[Any]:
    gc.collect()
    return multiprocessing.active_children()


@pytest.mark.parametrize("loader", LOADERS)
def test_clients_are_trained_on_their_own_rows(make_trainer, clients, tiny_model_dir, tmp_path, loader):
    trainer = make_trainer(**LOADERS[loader])
    start = trainer.federation.state
    for name, rows in clients.items():
        seed = client_seed(0, 1, name)
        local, metrics = local_round(trainer, start, trainer.client.data.prepared(name), seed)
        assert not left_over()
        stock = SFTTrainer(
            get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LORA),
            SFTConfig(str(tmp_path / "stock"), bf16=False, save_strategy="no", **LOCAL),
            train_dataset=rows,
        )
        set_peft_model_state_dict(stock.model, {key: tensor.clone() for key, tensor in start.items()})
        set_seed(seed)
        assert metrics["train_loss"] == stock.train().training_loss
        trained = get_peft_model_state_dict(stock.model)
        assert all(torch.equal(local[key], tensor) for key, tensor in trained.items())


@pytest.mark.parametrize("loader", LOADERS)
def test_clients_are_evaluated_on_their_own_rows(make_trainer, clients, expected, tmp_path, loader):
    trainer = make_trainer(eval_dataset=clients, **LOADERS[loader])
    trainer.train()
    losses = {name: figures["eval_loss"] for name, figures in trainer.record["rounds"][0]["client_eval"].items()}
    assert losses == {name: expected(tmp_path / "out", rows) for name, rows in clients.items()}
    assert len(set(losses.values())) == 2
    assert not left_over()


@pytest.mark.fast("persistent")
@pytest.mark.parametrize("loader", LOADERS)
def test_sets_are_evaluated_on_their_own_rows(make_trainer, clients, expected, tmp_path, loader):
    first, second = clients.values()
    trainer = make_trainer(eval_dataset={"first": first, "second": second}, **LOADERS[loader])
    trainer.train()
    figures = [expected(tmp_path / "out", rows) for rows in (first, second)]
    entry = trainer.record["rounds"][0]["eval"]
    assert [entry["eval_first_loss"], entry["eval_second_loss"]] == figures
    # other rows, by the same name or by none
    assert trainer.evaluate({"first": second})["eval_first_loss"] == figures[1]
    assert [trainer.evaluate(rows)["eval_loss"] for rows in (first, second)] == figures
    trainer.eval_dataset = trainer._prepare_held_out_dataset(second, "second")
    assert trainer.evaluate()["eval_loss"] == figures[1]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == figures[1]
    assert not left_over()


@pytest.mark.fast("persistent")
@pytest.mark.parametrize("loader", ["workers", "persistent"])
def test_workers_of_what_breaks_off_end(make_trainer, clients, loader):
    trainer = make_trainer(eval_dataset=clients, **LOADERS[loader])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError

    compute_loss, trainer.compute_loss = trainer.compute_loss, broken
    for break_off in (
        lambda: local_round(trainer, trainer.federation.state, trainer.client.data.prepared("client_0"), 0),
        trainer.evaluate,
        lambda: trainer.predict(trainer.client.data.prepared("client_0")),
    ):
        with pytest.raises(RuntimeError):
            break_off()
        trainer._recover()
        assert not left_over()
    trainer.compute_loss = compute_loss
    trainer.train()
    assert not left_over()
