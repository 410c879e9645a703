# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a local round is measured by: its loss, whether its batches had labels, and what the trainer logs of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..output.figures import TRAINING_METRICS
from ..state.client_errors import ClientError
from .engines import Engine
from .token_counts import IGNORED_LABEL


__all__ = ["NUM_TOKENS", "LocalFiguresMixin", "Measured"]


NUM_TOKENS = "num_tokens"
# what `Trainer.log` adds
_ADDED = frozenset({"epoch", "step", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"})


@dataclass
class Measured:
    """
    Figures of one local round.

    Args:
        has_label (`torch.Tensor`):
            Whether a batch of this process had a label.
        without_loss (`torch.Tensor`):
            Steps, or parts of them, whose loss is not a number for want of labels.
        logged (`dict[str, list[float]]`):
            What the trainer has logged.
        metrics (`dict[str, float]`):
            The means of it, at the end.
    """

    has_label: torch.Tensor
    without_loss: torch.Tensor
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, float] = field(default_factory=dict)


class LocalFiguresMixin(Trainer):
    """
    Figures of a client are its own. The trainers of TRL collect theirs in `_metrics` and count tokens over their life,
    so both start afresh with every local round and every evaluation.
    """

    _metrics: Any = MappingProxyType({})  # of TRL's trainers: by mode and name, the values since the last log
    _total_train_tokens: int = 0  # likewise
    _measured: Measured | None = None  # within a local round
    _engine: Engine
    _all_have_stopped: bool
    _metric_prefix: str = "eval"
    _side_metrics: frozenset[str] = frozenset()
    """What the trainer underneath measures along in an evaluation, and the tables of a run leave out."""
    _seen_side_metrics: set[str]

    @contextmanager
    def _measuring(self) -> Iterator[Measured]:
        """
        Within, the trainer trains one client. A loss that is not a number is not hidden, whatever
        `logging_nan_inf_filter`.
        """
        device = self.args.device
        measured = Measured(torch.zeros((), dtype=torch.bool, device=device), torch.zeros((), device=device))
        hides, tokens = self.args.logging_nan_inf_filter, self._total_train_tokens
        self._forget_metrics()
        self._measured, self._total_train_tokens = measured, 0
        self.args.logging_nan_inf_filter = False
        try:
            yield measured
            logged = measured.logged | self._metrics.get("train", {})
            measured.metrics = {name: sum(values) / len(values) for name, values in logged.items() if values}
            tokens += self._total_train_tokens
        finally:
            self._measured, self._total_train_tokens = None, tokens
            self.args.logging_nan_inf_filter = hides

    def _forget_metrics(self) -> None:
        for metrics in self._metrics.values():
            metrics.clear()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        measured = self._measured
        labels = [inputs[name] for name in {*self.label_names, "labels"} if isinstance(inputs.get(name), torch.Tensor)]
        counted = [values for values in labels if not values.is_floating_point()]
        # before the step, which may take the labels away
        has_label = torch.stack([(values != IGNORED_LABEL).any() for values in counted]).any() if counted else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if measured is None:
            return loss
        if has_label is None:  # a loss of another kind
            measured.has_label.fill_(True)
            return loss
        has_label = has_label.to(loss.device)
        measured.has_label |= has_label
        no_loss = ~has_label & ~torch.isfinite(loss)  # a mean over no labels, without gradients
        measured.without_loss += no_loss / self.current_gradient_accumulation_steps
        return torch.where(no_loss, torch.zeros_like(loss), loss)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`]; what TRL measures along is that of this evaluation alone."""
        self._metric_prefix = metric_key_prefix
        self._forget_metrics()
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _take_side_metrics(self) -> dict[str, float]:
        """
        What TRL has measured along in the last evaluation, under the names of the data set; the next call gets
        nothing.
        """
        metrics = self._metrics.get("eval", {})
        taken = {f"{self._metric_prefix}_{name}": sum(values) / len(values) for name, values in metrics.items()}
        self._seen_side_metrics |= {f"{self._metric_prefix}_{name}" for name in metrics.keys() & self._side_metrics}
        metrics.clear()
        return taken

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~transformers.Trainer.log`]; within a local round what is logged becomes figures of the client."""
        if self._measured is not None:
            self._log_locally(self._measured, logs, start_time)
            return
        if f"{self._metric_prefix}_runtime" in logs:
            for name, value in self._take_side_metrics().items():
                logs.setdefault(name, value)  # what the user measures under that name comes first
        self._forget_metrics()  # TRL would add those of an evaluation to whatever is logged next
        super().log(logs, start_time)

    def _log_locally(self, measured: Measured, logs: dict[str, float], start_time: float | None) -> None:
        of_trainer = set(logs) if "total_flos" in logs else set()  # its summary
        training = self._metrics.get("train", {})
        kept = dict(training)
        training.clear()
        super().log(logs, start_time)
        training.update(kept)
        for name, value in self.state.log_history[-1].items():
            if name not in of_trainer | _ADDED and isinstance(value, (int, float)):
                measured.logged[name].append(value)

    def _figures(self, output: TrainOutput, measured: Measured) -> dict[str, Any]:
        """
        The figures of a local round: `train_loss` (mean over the steps that had labels), `num_steps`, and
        `training_metrics` if the trainer logs some. Of several processes all have to call it.

        Raises:
            ClientError: If they say that nothing was learnt.
        """
        without_loss, has_label = self._sum_over_processes(measured.without_loss, measured.has_label.float())
        steps, loss = output.global_step, output.training_loss
        reason = None
        if steps == 0:
            reason = (
                "It took no step: after preparation there was less than one batch, or no budget. Lower "
                "`per_device_train_batch_size`, set `dataloader_drop_last=False`, or leave the client out."
            )
        elif not has_label:
            reason = (
                "No batch of its local round had a label (all are -100), so there was nothing to learn. Look at its "
                "labels, or leave the client out."
            )
        else:
            loss = self._mean_loss(loss, steps, measured.without_loss.item(), is_whole=not without_loss)
            if not math.isfinite(loss):
                reason = f"The training loss is {loss}. Lower `learning_rate`, or set `max_grad_norm`."
        if reason is not None:
            self._all_have_stopped = True  # the figures are those of all processes
            raise ClientError(reason)
        figures: dict[str, Any] = {"train_loss": loss, "num_steps": steps}
        return figures | ({TRAINING_METRICS: measured.metrics} if measured.metrics else {})

    def _mean_loss(self, loss: float, steps: int, without_loss: float, is_whole: bool) -> float:
        """
        `Trainer` returns the mean of each process over all its steps; the mean over those that had labels is that of
        the client.
        """
        if is_whole:
            if self._engine.num_processes == 1:
                return loss  # in float64
            return self._engine.over_processes(torch.tensor(loss), "mean").item()
        total, counted = self._sum_over_processes(
            torch.tensor(loss * steps, device=self.args.device),
            torch.tensor(steps - without_loss, device=self.args.device),
        )
        return total / counted

    def _sum_over_processes(self, *values: torch.Tensor) -> list[float]:
        stacked = torch.stack([value.cpu().double() for value in values])
        return self._engine.over_processes(stacked, "sum").tolist()
