# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run enters into its record, `log_history` and whatever `report_to` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.trainer.utils import get_config_model_id

from ..client.local_figures import NUM_TOKENS
from ..data.digests import client_digest
from ..federation.rounds import Round
from ..output.figures import TRAINING_METRICS, is_finite_number, mean_over_clients
from ..output.record import WHOLE, RecordFiles, peft_fields, peft_type_name
from ..output.same_run import held_out_digests
from ..output.settings import described_arguments, federation_settings, local_settings
from ..state.described import described, storable
from .files import active_config


__all__ = ["RunRecord"]


class RunRecord:
    """
    The record of a run, round by round, and its files.

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
        folder (`Path`):
            The folder of the run.
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        self._trainer, self._files = trainer, RecordFiles(folder)
        self.content = self.fresh()
        """As [`read_record`] gives it."""

    def start(self) -> None:
        """The record of a run that begins."""
        self.content = self.fresh()

    def begin_files(self) -> None:
        """Write the whole record, in place of what was there."""
        if self._trainer.is_world_process_zero():
            self._files.begin(self.content)

    def append(self, is_saved: bool) -> None:
        """Write the last round; `is_saved` says whether it has a checkpoint."""
        if self._trainer.is_world_process_zero():
            self._files.append(self.content, is_saved)

    def write(self, folder: Path) -> None:
        """Write the record into any folder."""
        if self._trainer.is_world_process_zero():
            self._files.write(folder, self.content)

    @property
    def evaluations(self) -> list[dict[str, float] | None]:
        """All evaluations so far, that of the start first."""
        return [self.content["start"]["eval"], *(entry["eval"] for entry in self.content["rounds"])]

    def fresh(self) -> dict[str, Any]:
        """The record of a run of this trainer before it begins."""
        trainer = self._trainer
        base = get_config_model_id(trainer.model.config)
        peft_config = active_config(trainer.model)
        return {
            "format": WHOLE,
            # of a local folder only the name
            "base_model": os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base,
            "base_digest": trainer._base_digest,
            "initial_digest": trainer._initial_digest,
            "peft_type": peft_type_name(peft_config) if peft_config is not None else None,
            "num_trainable_parameters": sum(tensor.numel() for tensor in trainer.federation.state.values()),
            "num_local_parameters": sum(trainer.federation.state[key].numel() for key in trainer._local_keys),
            "aggregation": trainer.args.aggregation,
            "federation": federation_settings(trainer.args),
            "peft_config": peft_fields(peft_config) if peft_config is not None else {},
            "settings": local_settings(trainer.args),
            "arguments": trainer._arguments | described_arguments({}, trainer.callback_handler.callbacks),
            "seed": trainer.args.seed,
            "num_rounds": trainer.args.num_rounds,
            "num_sampled": trainer.sampler.num_sampled,
            "partition": trainer.args.partition,
            "label_column": trainer.args.label_column,
            "clients": trainer._client_sizes(),
            "side_metrics": [],
            **({} if trainer._run_id is None else {"run": trainer._run_id}),
            "start": {"eval": None},
            "rounds": [],
        }

    def add(self, round: Round, evaluation: Mapping[str, Any] | None) -> None:
        """Enter the round into the record, `log_history` and whatever `report_to` names."""
        trainer = self._trainer
        if trainer._stage.errors:
            # how much of the sparse change the start of the LoRA does not hold, by module
            self.content["sparse_stage"] = {"rounds": round.number - 1, "relative_errors": trainer._stage.errors}
            trainer._stage.errors = {}
        clients = round.clients
        weights = {client: figures["num_examples"] for client, figures in clients.items()}
        losses = {client: figures["train_loss"] for client, figures in clients.items() if "train_loss" in figures}
        means = trainer.client_means if evaluation is not None else None
        entry: dict[str, Any] = {
            "round": round.number,
            "clients": storable(clients),
            "refused": round.refused,
            "train_loss": mean_over_clients(losses, weights) if losses else None,  # all may have withheld it
            "training_metrics": _training_metrics(clients, weights),
            **self._learning_rates(round.lr_factor),
            "bytes_up": round.in_vain["bytes_up"] + sum(client["bytes_up"] for client in clients.values()),
            "bytes_down": round.in_vain["bytes_down"] + sum(client["bytes_down"] for client in clients.values()),
            "base_change_bytes": round.base_change_bytes,
            "seconds": round.seconds,
            "eval": None if evaluation is None else self.evaluation(evaluation),
            "client_eval": storable(trainer.client_evaluation) if evaluation is not None else None,
            "eval_clients": None if means is None else means.num_clients,
            "eval_without": None if means is None else means.without,
        }
        self.content["optimizer"] = self._optimizer_used()
        self._remember_data(clients)
        self.content["rounds"].append(entry)
        trainer.log(self._logs_of(entry, clients))

    def _logs_of(self, entry: dict[str, Any], clients: dict[str, dict[str, Any]]) -> dict[str, float]:
        logs = {} if entry["train_loss"] is None else {"loss": entry["train_loss"]}
        logs |= {key: entry[key] for key in ("learning_rate", "bytes_up", "bytes_down")}
        logs |= {f"seconds_{phase}": value for phase, value in entry["seconds"].items()}
        logs |= {name: value for name, value in entry["training_metrics"].items() if name not in logs}
        for client, figures in clients.items():
            own = {"loss": figures["train_loss"]} if "train_loss" in figures else {}
            own = figures.get(TRAINING_METRICS, {}) | own
            logs |= {f"clients/{client}/{name}": value for name, value in own.items()}
        return logs

    def evaluation(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What an evaluation has measured, as JSON takes it; the record learns what it was measured on."""
        trainer = self._trainer
        self.content["side_metrics"] = sorted({*self.content["side_metrics"], *trainer._seen_side_metrics})
        by_client = trainer.evaluates_clients
        if "held_out" not in self.content:
            first = trainer.is_world_process_zero()  # which writes the record
            has_held_out = first and trainer.eval_dataset is not None  # if not, it is the clients'
            self.content["held_out"] = held_out_digests(trainer.eval_dataset, by_client) if has_held_out else {}
        recorded: dict[str, Any] = storable(metrics)
        return recorded

    def _remember_data(self, clients: Mapping[str, Any]) -> None:
        """
        A digest of the data of the clients that have trained for the first time, by which a resumed run recognises it.
        """
        if not self._trainer.is_world_process_zero() or not self._trainer._has_all_clients:
            return
        for client in clients:
            about = self.content["clients"][client]
            if "digest" not in about:
                about["digest"] = client_digest(self._trainer._clients, client)

    def go_on(self, record: dict[str, Any], fresh: dict[str, Any]) -> None:
        """
        The record of a resumed run: what holds for this part of it, and all that has happened before.

        Args:
            record (`dict[str, Any]`):
                That of the checkpoint.
            fresh (`dict[str, Any]`):
                That of this trainer (`fresh`).
        """
        kept = ("sparse_stage", "held_out", "optimizer", "side_metrics")
        fresh |= {name: record[name] for name in kept if name in record}
        for client, about in record["clients"].items():
            if "digest" in about:
                fresh["clients"][client]["digest"] = about["digest"]
        self.content = {**fresh, "start": record["start"], "rounds": record["rounds"]}
        self._trainer._total_train_tokens = int(
            sum(entry.get(TRAINING_METRICS, {}).get(NUM_TOKENS, 0) for entry in record["rounds"])
        )

    def _learning_rates(self, lr_factor: float) -> dict[str, Any]:
        """Those that the local rounds begin with: of the first parameter group, and of all if they differ."""
        assert self._trainer._initial_lrs is not None  # a local round has ended
        rates = [float(rate) * lr_factor for rate in self._trainer._initial_lrs]
        return {"learning_rate": rates[0]} | ({"learning_rates": rates} if len(set(rates)) > 1 else {})

    def _optimizer_used(self) -> dict[str, Any]:
        """Class and settings of the optimiser of the local rounds, by parameter group, before any schedule."""
        inner: Any = self._trainer.optimizer
        while hasattr(inner, "optimizer"):  # accelerate's wrapper, and DeepSpeed's
            inner = inner.optimizer
        about: dict[str, Any] = described(inner)
        for group, rate in zip(about.get("groups", []), self._trainer._initial_lrs or [], strict=False):
            group.pop("initial_lr", None)
            group["lr"] = float(rate)
        return about


def _training_metrics(
    clients: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float | None]
) -> dict[str, float]:
    """
    What the trainer logs of training: means over the clients that have it, weighted by examples, and the sum of
    tokens.
    """
    means = {}
    for name in dict.fromkeys(name for figures in clients.values() for name in figures.get(TRAINING_METRICS, {})):
        values = {client: figures.get(TRAINING_METRICS, {}).get(name) for client, figures in clients.items()}
        usable = {client: value for client, value in values.items() if is_finite_number(value)}
        if usable:
            is_sum = name == NUM_TOKENS
            means[name] = sum(usable.values()) if is_sum else mean_over_clients(usable, weights)
    return means
