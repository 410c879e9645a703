# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The federations that `same_bits.py` runs under two source trees, and the process that runs them.

It uses what both trees export and nothing that lies within, so that code can be moved without a change here. Models
and data are made on the spot and follow from constants. Each case is seconds of work: three clients or so of unequal
sizes, three rounds, two local steps.

    python benchmarks/same_bits_cases.py TREE MODEL FOLDER CASE.STAGE ...

TREE is the source tree that has to be imported, MODEL a folder of `make_model`. What is run has a folder of its own in
FOLDER, called `CASE.STAGE`, with the run in `out/` and what the trainer returned in `figures.json`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

import fed_trainer
import peft_scl
from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedMixin,
    FederatedRewardConfig,
    FederatedRewardTrainer,
    FederatedTaskConfig,
    FederatedTaskTrainer,
    FederatedTrainer,
)
from peft_scl import FederaConfig, SclConfig


ROUNDS_BEFORE_STOP = 2
LOCAL = {
    "num_rounds": 3,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # or else Adam makes of the rounding of small gradients what other machines do not
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
RANKS = {"client_settings": {"client_0": {"r": 1}, "client_2": {"r": 3}}}
TOPICS = (
    lambda a, b: (f"What is {a} plus {b}?", f" {a + b}"),
    lambda a, b: (f"Which is larger, {a} or {b}?", f" {max(a, b)}"),
    lambda a, b: (f"Write {a} times the letter {'abcde'[b % 5]}.", " " + "abcde"[b % 5] * a),
)


# Models and data


def text_clients(num_clients: int) -> dict[str, Dataset]:
    """Questions and answers; clients differ in topics, text and sizes."""
    clients = {}
    for client in range(num_clients):
        columns: dict[str, list[str]] = {"prompt": [], "completion": []}
        for row in range(8 if client == 1 else 16):
            topic = TOPICS[(client if row % 3 else row // 3) % len(TOPICS)]
            for column, text in zip(columns, topic((row * 7 + client) % 10, (row * 3 + client * 5) % 10), strict=True):
                columns[column].append(text)
        clients[f"client_{client}"] = Dataset.from_dict(columns)
    return clients


def pair_clients(num_clients: int) -> dict[str, Dataset]:
    """The right answer is chosen, that of the next row rejected."""
    pairs = {}
    for name, rows in text_clients(num_clients).items():
        answers = list(rows["completion"])
        columns = {"prompt": list(rows["prompt"]), "chosen": answers, "rejected": answers[1:] + answers[:1]}
        pairs[name] = Dataset.from_dict(columns)
    return pairs


def token_clients(num_clients: int) -> dict[str, Dataset]:
    """Tokens with a label, which is the first of them; clients differ in labels and sizes."""
    clients = {}
    for client in range(num_clients):
        labels = [(client if row % 2 else row // 2) % 3 for row in range(8 if client == 1 else 16)]
        tokens = [[label, 5 + row % 7, 12 + client, 20 + (row * 3) % 11] for row, label in enumerate(labels)]
        clients[f"client_{client}"] = Dataset.from_dict({"input_ids": tokens, "label": labels})
    return clients


def make_model(folder: Path) -> None:
    """A random Llama in float32 and its tokenizer, the same whenever it is made."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rows = [row for dataset in text_clients(3).values() for row in dataset]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    special: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    widths: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    set_seed(0)
    logging.disable_progress_bar()
    config = LlamaConfig(**widths, num_attention_heads=4, num_key_value_heads=2, **special)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_classifier() -> BertForSequenceClassification:
    """A random BERT without dropout."""
    set_seed(0)
    widths: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    }
    depths: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    dropouts: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**widths, **depths, **dropouts))


# Trainers


class FailingTrainer(FederatedTrainer):
    """Some of its local steps end with an error: both attempts of a client in round 1, one of the first in round 2."""

    failing = (4, 6, 13)
    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps in self.failing:
            raise RuntimeError("no memory")
        return super().training_step(*args, **kwargs)


class StopAfterRounds(TrainerCallback):
    may_differ = True  # the resumed run has none

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= ROUNDS_BEFORE_STOP


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@dataclass(frozen=True)
class Case:
    """
    One federation.

    Args:
        settings:
            Fields of the config, over those of `LOCAL`.
        adapter:
            Makes the PEFT config; gives `None` for a plain model.
        task:
            `"sft"`, `"failing"` (the same, with clients that fail), `"dpo"`, `"reward"`, `"classifier"` or `"bitfit"`.
        clients:
            How many.
        personal:
            Whether each client has held-out data of its own, and its model is saved too.
        resumed:
            Whether it is also stopped and resumed, by either tree.
        launch:
            The configuration of Accelerate in `recipes/accelerate` that it is launched with: two processes.
        draws:
            Whether it draws random numbers in a way that differs between builds of torch.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    adapter: Callable[[], PeftConfig | None] = lambda: LoraConfig(**TARGETS, lora_alpha=6)
    task: str = "sft"
    clients: int = 3
    personal: bool = False
    resumed: bool = False
    launch: str = ""
    draws: bool = False

    @property
    def is_golden(self) -> bool:
        """Whether it gives the same values on other machines, but for rounding, in one process."""
        return not self.launch and not self.draws

    def trainer(self, model: str, output_dir: Path, callbacks: list[TrainerCallback]) -> FederatedMixin:
        """The trainer of the case, the same whenever it is made."""
        make = {"classifier": self._task_trainer, "bitfit": self._task_trainer}.get(self.task, self._text_trainer)
        return make(model, output_dir, callbacks)

    def _args(self, config: type, output_dir: Path, **settings: Any) -> Any:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        on_cpu = self.launch in ("", "ddp")  # DeepSpeed would be dropped
        batch = {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4 // processes}
        engine = {"use_cpu": on_cpu, "ddp_backend": None if on_cpu else "gloo"}
        return config(output_dir=str(output_dir), **{**LOCAL, **batch, **engine, **settings, **self.settings})

    def _held_out(self, clients: dict[str, Dataset]) -> Any:
        if self.personal:
            return {name: rows.select(range(4 + 2 * index)) for index, (name, rows) in enumerate(clients.items())}
        return clients["client_0"].select(range(6))

    def _text_trainer(self, model: str, output_dir: Path, callbacks: list[TrainerCallback]) -> FederatedMixin:
        kinds: dict[str, tuple[type, type, dict[str, Any]]] = {
            "sft": (FederatedTrainer, FederatedConfig, {"max_length": 32}),
            "failing": (FailingTrainer, FederatedConfig, {"max_length": 32}),
            "dpo": (FederatedDPOTrainer, FederatedDPOConfig, {"max_length": 48}),
            "reward": (FederatedRewardTrainer, FederatedRewardConfig, {"max_length": 48}),
        }
        trainer, config, settings = kinds[self.task]
        clients = (pair_clients if self.task in ("dpo", "reward") else text_clients)(self.clients)
        set_seed(0)
        return trainer(
            model=model,
            args=self._args(config, output_dir, **settings),
            train_dataset=clients,
            eval_dataset=self._held_out(clients),
            peft_config=self.adapter(),
            callbacks=callbacks,
        )

    def _task_trainer(self, model: str, output_dir: Path, callbacks: list[TrainerCallback]) -> FederatedMixin:
        clients, classifier = token_clients(self.clients), make_classifier()
        if self.task == "bitfit":
            for name, parameter in classifier.named_parameters():
                parameter.requires_grad = name.endswith(".bias") or name.startswith("classifier.")
        return FederatedTaskTrainer(
            model=classifier,
            args=self._args(FederatedTaskConfig, output_dir),
            train_dataset=clients,
            eval_dataset=self._held_out(clients),
            compute_metrics=accuracy,
            peft_config=self.adapter(),
            callbacks=callbacks,
        )


def rule(name: str, **settings: Any) -> dict[str, Any]:
    return {"aggregation": name, **settings}


def objective(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"local_objective": name, "local_objective_kwargs": kwargs}


def head_adapter() -> PeftConfig:
    return LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")


def no_adapter() -> None:
    return None


DROPOUT = {
    "clients_per_round": 2,
    "aggregation_kwargs": {"weights": "tokens"},
    "round_lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2,
}
PRUNING = {**rule("hetlora"), **RANKS, **objective("rank_pruning", decay=0.5, penalty_weight=10.0)}
LAYERS = {"client_settings": {"client_0": {"layers_to_transform": [0]}, "client_1": {"max_steps": 1}}}
SLORA = rule("slora", aggregation_kwargs={"sparse_rounds": 2, "density": 0.1}, num_rounds=4)
ADAM = {"server_optimizer": "fedadam", "server_lr": 0.02, **objective("fedprox", mu=0.1)}

CASES = {
    "fedavg_lora": Case(resumed=True),
    "dropout": Case(DROPOUT, lambda: LoraConfig(**TARGETS, lora_dropout=0.1), draws=True),
    "scl": Case({"server_optimizer": "fedavgm"}, lambda: SclConfig(r=4, task_type="CAUSAL_LM"), resumed=True),
    "federa": Case(adapter=lambda: FederaConfig(**TARGETS), resumed=True),
    "flora_ranks": Case({**rule("flora"), **RANKS, "clients_per_round": 2}, resumed=True),
    "fedex_lora": Case(rule("fedex_lora")),
    "flexlora_ranks": Case({**rule("flexlora"), **RANKS}),
    "hetlora_pruning": Case(PRUNING, resumed=True),
    "lora_fair": Case(rule("lora_fair")),
    "fednova_layers": Case({**rule("fednova"), **LAYERS}),
    "trimmed_mean_failing": Case(
        rule("trimmed_mean", aggregation_kwargs={"trim": 0.34}, client_retries=1), task="failing", clients=4
    ),
    "krum": Case(rule("krum", aggregation_kwargs={"num_byzantine": 0}), clients=4),
    "scaffold": Case({**SGD, **objective("scaffold"), "clients_per_round": 2}, resumed=True),
    "feddyn": Case({**SGD, **objective("feddyn", alpha=0.1)}),
    "ditto": Case({**objective("ditto", mu=0.1), "clients_per_round": 2}, personal=True, resumed=True),
    "fedsa_lora": Case(rule("fedsa_lora"), personal=True),
    "fedprox_adam": Case(ADAM, resumed=True),
    "rolora": Case(rule("rolora", clients_per_round=2)),
    "slora": Case(SLORA, resumed=True),
    "kept_optimizers": Case({"keep_optimizer_state": True, "num_rounds": 4, "clients_per_round": 2}, resumed=True),
    "whole_model": Case(adapter=no_adapter),
    "bitfit": Case(adapter=no_adapter, task="bitfit"),
    "classifier": Case(adapter=head_adapter, task="classifier"),
    "local_head": Case({"tensor_roles": {"local": ["classifier"]}}, head_adapter, "classifier", personal=True),
    "dpo": Case({"reference": "round", "beta": 0.5}, task="dpo", clients=2),
    "reward": Case(adapter=lambda: LoraConfig(**{**TARGETS, "task_type": "SEQ_CLS"}), task="reward", clients=2),
    "ddp": Case(launch="ddp"),
    "zero2": Case(launch="zero2"),
}


# What a process does


def run(name: str, model: Path, folder: Path, stage: str = "whole") -> None:
    """
    Run a case in `folder`, which has its run in `out/`.

    Args:
        name: A key of `CASES`.
        model: A folder that `make_model` has filled.
        folder: Exists; empty, but for a run that is resumed.
        stage: `"whole"`; `"stopped"`, which ends after `ROUNDS_BEFORE_STOP` rounds; `"resumed"`, which goes on from
            there; or `"old"`, which goes on from what the other tree has left there.
    """
    case = CASES[name]
    stops = [StopAfterRounds()] if stage == "stopped" else []
    trainer: Any = case.trainer(str(model), folder / "out", list(stops))
    result = trainer.train(resume_from_checkpoint=stage in ("resumed", "old"))
    figures = {"train": result.metrics, "evaluate": trainer.evaluate(), "log": trainer.state.log_history}
    if case.personal:
        for client in ("client_0", "client_1"):
            trainer.save_client_model(client, folder / "client_models" / client)
    if trainer.is_world_process_zero():
        (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def main() -> None:
    tree, model, folder = (Path(path).resolve() for path in sys.argv[1:4])
    for package in (fed_trainer, peft_scl):
        if not Path(str(package.__file__)).resolve().is_relative_to(tree):
            raise ImportError(f"{package.__name__} was to be imported from {tree}, but comes from {package.__file__}.")
    torch.set_num_threads(1)
    for part in sys.argv[4:]:
        name, _, stage = part.partition(".")
        try:
            run(name, model, folder / part, stage)
        except Exception as error:
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
            (folder / part / "figures.json").write_text(json.dumps(told), encoding="utf-8")
            if CASES[name].launch:
                raise  # which ends the other process too
    if PartialState._shared_state:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
