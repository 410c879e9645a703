# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Figures are the clients' own: odd values of a metric, names of the user's, clients that learnt nothing, TRL's own
metrics.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedRewardConfig,
    FederatedRewardTrainer,
    FederatedTaskConfig,
    FederatedTaskTrainer,
    FederatedTrainer,
    read_record,
)
from fed_trainer.federation.sampling import client_seed
from fed_trainer.output.figures import held_out_metrics, means_over_clients
from fed_trainer.output.report import partial_means, round_table


PLAIN: dict[str, Any] = {"use_cpu": True, "report_to": "none", "bf16": False, "disable_tqdm": True}
SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def strict(text: str) -> Any:
    """JSON as other languages read it: without NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


def strict_record(folder: Path) -> dict[str, Any]:
    """The record, read as such JSON."""
    header = strict((folder / "federation.json").read_text(encoding="utf-8"))
    lines = (folder / "federation.jsonl").read_text(encoding="utf-8").splitlines()
    record = read_record(folder)
    assert record == header | {"format": 1, "rounds": [strict(line) for line in lines]}
    return record


# Means over clients

ODD = {
    "missing": "missing",
    "None": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "a list": [0.5, 0.25],
    "a str": "good",
    "an array": np.eye(2),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_mean_is_over_the_clients_that_have_a_number(odd):
    figures = {
        client: {"eval_loss": loss, "eval_f1": f1}
        for client, loss, f1 in [("a", 1.0, 0.1), ("b", 2.0, odd), ("c", 4.0, 0.4)]
    }
    if isinstance(odd, str) and odd == "missing":
        del figures["b"]["eval_f1"]
    result = means_over_clients(figures, {"a": 1, "b": 2, "c": 3})
    assert result.means == pytest.approx({"eval_loss": 17 / 6, "eval_f1": 1.3 / 4})
    assert result.num_clients == {"eval_loss": 3, "eval_f1": 2}
    assert list(result.without) == ["eval_f1"] and list(result.without["eval_f1"]) == ["b"]


def test_what_no_client_has_is_no_mean_and_what_diverges_everywhere_is_nan():
    figures = {client: {"matrix": [[1]], "eval_loss": math.nan} for client in "ab"}
    result = means_over_clients(figures, {"a": 1, "b": 1})
    assert list(result.means) == ["eval_loss"] and math.isnan(result.means["eval_loss"])
    assert result.num_clients == {"eval_loss": 0}


# Odd values in whole runs


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=8))


def rows(token: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[token, index % 9, 5] for index in range(4)], "label": [index % 2 for index in range(4)]}
    )


@pytest.fixture
def make_task(tmp_path):
    def make(eval_dataset: Any = None, train_dataset: Any = None, model: Any = None, **changes: Any):
        task = changes.pop("task_type", "SEQ_CLS")
        arguments = {name: changes.pop(name) for name in ("compute_metrics", "callbacks") if name in changes}
        args = FederatedTaskConfig(
            str(tmp_path / "out"),
            **{"num_rounds": 2, "max_steps": 2, "per_device_train_batch_size": 2, **PLAIN, **changes},
        )
        return FederatedTaskTrainer(
            model or classifier(),
            args,
            train_dataset or {"a": rows(1), "b": rows(2), "c": rows(3)},
            eval_dataset=eval_dataset,
            peft_config=LoraConfig(task_type=task, target_modules=["query"], r=2),
            **arguments,
        )

    return make


def is_b(output: Any) -> bool:
    """The held-out rows of client b alone have a label 1 in front."""
    return bool(output.label_ids[0] == 1)


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("by_client", [True, False], ids=["by client", "one set"])
def test_an_odd_metric_neither_ends_nor_poisons_a_run(odd, by_client, make_task, tmp_path):
    def metrics(output):
        f1 = {} if isinstance(odd, str) and odd == "missing" else {"f1": odd}
        return {"accuracy": 0.25} | (f1 if is_b(output) else {"f1": 0.5})

    held_out = {name: rows(token) for name, token in (("a", 1), ("b", 2), ("c", 3))}
    held_out["b"] = held_out["b"].select([1, 0, 3, 2])
    trainer = make_task(held_out if by_client else held_out["b"], compute_metrics=metrics)
    trainer.train()
    record = strict_record(tmp_path / "out")
    state = strict((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    strict((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert len(record["rounds"]) == 2 and any("eval_accuracy" in entry for entry in state["log_history"])
    shown = held_out_metrics(record)[2]
    assert shown["eval_accuracy"] == 0.25 and math.isfinite(shown["eval_loss"])
    entry = record["rounds"][-1]
    if by_client:
        assert shown["eval_f1"] == 0.5
        assert entry["eval_clients"] == {"eval_accuracy": 3, "eval_loss": 3, "eval_f1": 2}
        assert list(entry["eval_without"]["eval_f1"]) == ["b"]
        assert "eval f1 of round 2: over 2 of 3 clients, without b (" in partial_means(record)
    else:
        assert "eval_f1" not in shown and entry["eval_clients"] is None
    table = round_table(record)
    if isinstance(odd, float) and not by_client:
        assert str(odd) in table
    trainer.create_model_card()  # which shows them too


def test_a_held_out_loss_that_is_nan_is_shown_as_such(make_task, tmp_path, monkeypatch):
    trainer = make_task(rows(4), num_rounds=1)
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **k: evaluate(*a, **k) | {"eval_loss": math.nan})
    trainer.train()
    record = strict_record(tmp_path / "out")
    assert record["rounds"][0]["eval"]["eval_loss"] == "nan"
    assert round_table(record).splitlines()[-1].split()[3] == "nan"
    assert held_out_metrics(record)[1] == {}
    assert "| 1 | nan |" in (tmp_path / "out" / "README.md").read_text()


# Names

NAMES = [
    "cross_entropy", "entropy", "mean_token_accuracy", "num_tokens", "mean_reward", "min_reward", "max_reward",
    "rewards/chosen", "logps/rejected", "inference_runtime", "tokens_per_second", "samples_per_second_of_gpu",
    "compilation_time", "preparation_time", "x_steps_per_second",
]  # fmt: skip


@pytest.mark.parametrize("held_out", ["one", "named", "by client"])
def test_no_name_of_the_users_is_hidden(held_out, make_task, tmp_path):
    sets = {"one": rows(4), "named": {"x": rows(4), "y": rows(5)}, "by client": {"a": rows(4), "b": rows(5)}}
    trainer = make_task(sets[held_out], num_rounds=1, compute_metrics=lambda output: dict.fromkeys(NAMES, 0.125))
    trainer.train()
    record = strict_record(tmp_path / "out")
    prefixes = ["eval_x_", "eval_y_"] if held_out == "named" else ["eval_"]
    expected = {f"{prefix}{name}" for prefix in prefixes for name in [*NAMES, "loss"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert held_out_metrics(record)[1].keys() == expected
    header = round_table(record).splitlines()[0]
    for name in expected:
        assert f"| {name} |" in card and (name.endswith("loss") or f"eval {name.removeprefix('eval_')}" in header)


@pytest.mark.parametrize("held_out", [{"x": None}, {"a": None, "x": None}, {"a": None}, {"": None}], ids=list)
def test_the_speed_of_no_evaluation_is_a_figure(held_out):
    """Also of a set that is called like a client, beside others."""
    by_client = list(held_out) == ["a"]
    prefixes = ["eval" if by_client or not name else f"eval_{name}" for name in held_out]
    metrics = {f"{prefix}_{name}": 1.0 for prefix in prefixes for name in ("loss", "runtime", "jit_compilation_time")}
    record = {"start": {"eval": metrics}, "rounds": [], "clients": {"a": {}}, "held_out": held_out, "side_metrics": []}
    assert held_out_metrics(record)[0] == {f"{prefix}_loss": 1.0 for prefix in prefixes}


# Clients that learnt nothing


def token_model() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SMALL, num_attention_heads=2, num_labels=3))


def labelled(*labels: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[index % 7, 8, 9] for index in range(len(labels))], "labels": [[label] * 3 for label in labels]}
    )


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_client_without_any_label_is_left_out_with_the_reason(hides, accumulation, make_task):
    clients = {"a": labelled(1, 1, 2, 0), "b": labelled(*[-100] * 4)}
    settings = {"num_rounds": 1, "logging_nan_inf_filter": hides, "gradient_accumulation_steps": accumulation}
    trainer = make_task(None, clients, token_model(), task_type="TOKEN_CLS", **settings)
    trainer.train()
    entry = trainer.record["rounds"][0]
    assert list(entry["clients"]) == ["a"]
    assert "No batch of its local round had a label" in entry["refused"]["b"] and "rate" not in entry["refused"]["b"]
    assert entry["train_loss"] == entry["clients"]["a"]["train_loss"]


def test_batches_without_labels_do_not_count_in_the_mean_loss(make_task):
    clients = {"a": labelled(1, 1, 2, 0, -100, -100, -100, -100), "b": labelled(1, 1, 2, 0)}
    settings = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential", "learning_rate": 1e-9}
    trainer = make_task(None, clients, token_model(), task_type="TOKEN_CLS", num_rounds=1, bf16=False, **settings)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    figures = trainer.record["rounds"][0]["clients"]
    assert [figures[client]["num_steps"] for client in "ab"] == [4, 2]
    assert figures["a"]["train_loss"] == pytest.approx(figures["b"]["train_loss"], rel=1e-5)


def test_a_client_that_takes_no_step_is_left_out_with_the_reason(tiny_model_dir, tmp_path):
    texts = {"big": "one two three four five six seven " * 3, "small": "hi"}
    clients = {name: Dataset.from_dict({"text": [text] * 16}) for name, text in texts.items()}
    args = FederatedConfig(
        str(tmp_path), num_rounds=1, max_steps=2, per_device_train_batch_size=2, packing=True, max_length=64,
        dataloader_drop_last=True, gradient_checkpointing=False, eval_on_start=False, **PLAIN,
    )  # fmt: skip
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = FederatedTrainer(str(tiny_model_dir), args, clients, peft_config=peft_config)
    trainer.train()
    entry = trainer.record["rounds"][0]
    assert list(entry["clients"]) == ["big"] and "It took no step" in entry["refused"]["small"]


# What TRL logs in training


def pairs(first: int) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"What is {first} plus {index}?" for index in range(8)],
            "chosen": [f" {first + index}" for index in range(8)],
            "rejected": [" I do not know." if index % 2 else " no" for index in range(8)],
        }
    )


def texts(first: int) -> Dataset:
    return pairs(first).remove_columns("rejected").rename_column("chosen", "completion")


TRAINERS = {
    "SFT": (FederatedTrainer, FederatedConfig, SFTTrainer, SFTConfig, texts, "CAUSAL_LM"),
    "DPO": (FederatedDPOTrainer, FederatedDPOConfig, DPOTrainer, DPOConfig, pairs, "CAUSAL_LM"),
    "reward": (FederatedRewardTrainer, FederatedRewardConfig, RewardTrainer, RewardConfig, pairs, "SEQ_CLS"),
}
LOCAL = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 64, "gradient_checkpointing": False}
OF_TRAINER = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss", "epoch", "step"}  # fmt: skip


@pytest.fixture(params=TRAINERS)
def trl(request, tiny_model_dir, tmp_path):
    """Makes a federation over a trainer of TRL, and one client as the trainer of TRL trains it."""
    federated, config, alone, plain_config, data, task = TRAINERS[request.param]

    def peft_config():
        return LoraConfig(r=2, target_modules=["q_proj"], task_type=task)

    def make(clients=(1, 3), folder="out", **settings):
        args = config(str(tmp_path / folder), **{"num_rounds": 2, **PLAIN, **LOCAL, **settings})
        sets = {"x": data(5), "y": data(6)}
        named = {f"client_{number}": data(number) for number in clients}
        return federated(str(tiny_model_dir), args, named, eval_dataset=sets, peft_config=peft_config())

    def make_alone(number, seed):
        settings = PLAIN | LOCAL | {"lr_scheduler_type": "constant", "seed": seed, "data_seed": None}
        args = plain_config(str(tmp_path / "alone"), **settings)
        return alone(str(tiny_model_dir), args=args, train_dataset=data(number), peft_config=peft_config())

    make.alone = make_alone
    return make


def metrics_of(trainer: Any) -> list[dict[str, Any]]:
    return [
        {client: figures["training_metrics"] for client, figures in entry["clients"].items()}
        for entry in trainer.record["rounds"]
    ]


def test_what_trl_logs_of_training_is_in_the_record_and_the_log(trl):
    trainer = trl()
    start = {key: tensor.clone() for key, tensor in trainer.federation.state.items()}
    trainer.train()
    first = metrics_of(trainer)[0]
    # independently: TRL's own trainer, from the same start, on the data in the same order
    for number in (1, 3):
        alone = trl.alone(number, client_seed(trainer.args.seed, 1, f"client_{number}"))
        set_peft_model_state_dict(alone.model, start)
        alone.train()
        expected = {key: value for key, value in alone.state.log_history[-1].items() if key not in OF_TRAINER}
        assert first[f"client_{number}"] == pytest.approx(expected)
        assert first[f"client_{number}"]["num_tokens"] > 0
    for entry, logged in zip(trainer.record["rounds"], _round_logs(trainer), strict=True):
        tokens = [figures["training_metrics"]["num_tokens"] for figures in entry["clients"].values()]
        assert entry["training_metrics"]["num_tokens"] == logged["num_tokens"] == sum(tokens)
        for name, mean in entry["training_metrics"].items():
            own = [figures["training_metrics"][name] for figures in entry["clients"].values()]
            assert name == "num_tokens" or mean == pytest.approx(sum(own) / 2)  # of equal size
            assert logged[name] == mean
            assert [logged[f"clients/client_{number}/{name}"] for number in (1, 3)] == own


def _round_logs(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "bytes_up" in entry]


@pytest.mark.fast(retries=[1])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_client_that_fails_leaves_no_figures_behind(retries, trl, monkeypatch):
    whole, broken = trl(num_rounds=1), trl(num_rounds=1, client_retries=retries, folder="broken")
    whole.train()
    training_step, steps = broken.training_step, []

    def failing(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        steps.append(1)
        if len(steps) == 2:  # of the first client, in its first attempt
            raise RuntimeError("broken")
        return loss

    monkeypatch.setattr(broken, "training_step", failing)
    broken.train()
    expected, found = metrics_of(whole)[0], metrics_of(broken)[0]
    assert list(found) == ["client_1", "client_3"][1 - retries :]
    assert all(found[client] == expected[client] for client in found if retries)
    assert found["client_3"] == expected["client_3"]


def test_evaluations_log_their_own(trl):
    """Each held-out set has the figures of its own batches, whatever was evaluated, predicted or trained before."""
    trainer = trl(num_rounds=1)
    trainer.train()
    evaluated = trainer.record["rounds"][0]["eval"]
    side = {f"eval_{name}_{metric}" for name in "xy" for metric in metrics_of(trainer)[0]["client_1"]}
    assert side <= evaluated.keys()
    sets = trainer.eval_dataset
    for name in "yx":
        trainer.predict(sets["x"])
        trainer.log({"loss": 1.0})
        assert trainer.state.log_history[-1].keys() == {"loss", "epoch", "step"}
        again = trainer.evaluate(sets[name], metric_key_prefix=f"eval_{name}")
        for key in side & again.keys():
            assert again[key] == evaluated[key]
    shown = held_out_metrics(trainer.record)[1].keys()
    hidden = {f"eval_{name}_{metric}" for name in "xy" for metric in type(trainer)._side_metrics}
    assert not shown & hidden and hidden & evaluated.keys() == set(trainer.record["side_metrics"])
