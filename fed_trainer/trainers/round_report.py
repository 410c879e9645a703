# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a round enters into the record, `log_history` and whatever `report_to` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..client.engine import LocalRoundMixin
from ..client.evaluation import ClientEvaluationMixin
from ..client.local_figures import NUM_TOKENS, TRAINING_METRICS
from ..config import FederationArguments
from ..data.digests import client_digest
from ..federation.server import Server
from ..output.figures import is_finite_number, mean_over_clients
from ..output.same_run import held_out_digests
from ..state.described import described, storable
from .files import RunFilesMixin


__all__ = ["RoundReportMixin"]


class RoundReportMixin(LocalRoundMixin, ClientEvaluationMixin, RunFilesMixin):
    """The record of a run, round by round."""

    args: FederationArguments
    server: Server
    _clients: Mapping[str, Dataset]
    _bytes_in_vain: Counter[str]
    _base_change_bytes: int
    _sparse_stage_errors: dict[str, float]

    def _report(
        self,
        round: int,
        clients: dict[str, dict[str, Any]],
        lr_factor: float,
        seconds: dict[str, float],
        evaluation: dict[str, Any] | None,
    ) -> None:
        """Enter the round into the record, `log_history` and whatever `report_to` names."""
        if self._sparse_stage_errors:
            # how much of the sparse change the start of the LoRA does not hold, by module
            self._record["sparse_stage"] = {"rounds": round - 1, "relative_errors": self._sparse_stage_errors}
            self._sparse_stage_errors = {}
        weights = {client: figures["num_examples"] for client, figures in clients.items()}
        means = self.client_means if evaluation is not None else None
        entry: dict[str, Any] = {
            "round": round,
            "clients": storable(clients),
            "refused": self.server.refused,
            "train_loss": mean_over_clients({c: f["train_loss"] for c, f in clients.items()}, weights),
            "training_metrics": _training_metrics(clients, weights),
            **self._learning_rates(lr_factor),
            "bytes_up": self._bytes_in_vain["bytes_up"] + sum(client["bytes_up"] for client in clients.values()),
            "bytes_down": self._bytes_in_vain["bytes_down"] + sum(client["bytes_down"] for client in clients.values()),
            "base_change_bytes": self._base_change_bytes,
            "seconds": seconds,
            "eval": None if evaluation is None else self._recorded_evaluation(evaluation),
            "client_eval": storable(self.client_evaluation) if evaluation is not None else None,
            "eval_clients": None if means is None else means.num_clients,
            "eval_without": None if means is None else means.without,
        }
        self._record["optimizer"] = self._optimizer_used()
        self._remember_data(clients)
        self._record["rounds"].append(entry)
        self.log(self._logs_of(entry, clients))

    def _logs_of(self, entry: dict[str, Any], clients: dict[str, dict[str, Any]]) -> dict[str, float]:
        logs = {"loss": entry["train_loss"]}
        logs |= {key: entry[key] for key in ("learning_rate", "bytes_up", "bytes_down")}
        logs |= {f"seconds_{phase}": value for phase, value in entry["seconds"].items()}
        logs |= {name: value for name, value in entry["training_metrics"].items() if name not in logs}
        for client, figures in clients.items():
            own = {"loss": figures["train_loss"]}
            own = figures.get(TRAINING_METRICS, {}) | own
            logs |= {f"clients/{client}/{name}": value for name, value in own.items()}
        return logs

    def _recorded_evaluation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What an evaluation has measured, as JSON takes it; the record learns what it was measured on."""
        self._record["side_metrics"] = sorted({*self._record["side_metrics"], *self._seen_side_metrics})
        by_client = self.evaluates_clients
        if "held_out" not in self._record:
            first = self.is_world_process_zero()  # which writes the record
            self._record["held_out"] = held_out_digests(self.eval_dataset, by_client) if first else {}
        recorded: dict[str, Any] = storable(metrics)
        return recorded

    def _remember_data(self, clients: Mapping[str, Any]) -> None:
        """
        A digest of the data of the clients that have trained for the first time, by which a resumed run recognises it.
        """
        if not self.is_world_process_zero():
            return
        for client in clients:
            about = self._record["clients"][client]
            if "digest" not in about:
                about["digest"] = client_digest(self._clients, client)

    def _go_on_recording(self, record: dict[str, Any], fresh: dict[str, Any]) -> None:
        """The record of a resumed run: what holds for this part of it, and all that has happened before."""
        kept = ("sparse_stage", "held_out", "optimizer", "side_metrics")
        fresh |= {name: record[name] for name in kept if name in record}
        for client, about in record["clients"].items():
            if "digest" in about:
                fresh["clients"][client]["digest"] = about["digest"]
        self._record = {**fresh, "start": record["start"], "rounds": record["rounds"]}
        self._total_train_tokens = int(
            sum(entry.get(TRAINING_METRICS, {}).get(NUM_TOKENS, 0) for entry in record["rounds"])
        )

    def _learning_rates(self, lr_factor: float) -> dict[str, Any]:
        """Those that the local rounds begin with: of the first parameter group, and of all if they differ."""
        assert self._initial_lrs is not None  # a local round has ended
        rates = [float(rate) * lr_factor for rate in self._initial_lrs]
        return {"learning_rate": rates[0]} | ({"learning_rates": rates} if len(set(rates)) > 1 else {})

    def _optimizer_used(self) -> dict[str, Any]:
        """Class and settings of the optimiser of the local rounds, by parameter group, before any schedule."""
        inner: Any = self.optimizer
        while hasattr(inner, "optimizer"):  # accelerate's wrapper, and DeepSpeed's
            inner = inner.optimizer
        about: dict[str, Any] = described(inner)
        for group, rate in zip(about.get("groups", []), self._initial_lrs or [], strict=False):
            group.pop("initial_lr", None)
            group["lr"] = float(rate)
        return about


def _training_metrics(clients: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, float]:
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
