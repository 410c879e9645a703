# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model normalises its loss: stated by the model, or told from two values of it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from .agreement import UNPREPARED, AgreementMixin
from .data import ClientData
from .put_back import evaluating, remember_flags, remember_problem_type, remember_random_state, restoring
from .token_counts import IGNORED_LABEL


__all__ = ["LossProbeMixin", "states_its_loss"]

logger = logging.get_logger(__name__)


class LossProbeMixin(AgreementMixin):
    """
    Sets `model_accepts_loss_kwargs` to whether the model divides its loss by `num_items_in_batch`, the labels of a
    step over all processes and accumulated batches.

    `Trainer` counts on it if the model takes any keyword. Many classifiers do and compute a mean over their own rows,
    which `Trainer` then multiplies by the number of processes and does not divide by the accumulated batches.
    """

    _data: ClientData
    _asks_the_loss: bool = False

    def _look_at_the_loss(self) -> None:
        """Find out, once the engine is built."""
        if not self._asks_the_loss:
            return
        self._asks_the_loss = False
        with restoring(remember_random_state()), evaluating(self.model_wrapped):
            for batch in self._labelled_batches():
                if batch is None:
                    return
                depends = self._loss_depends_on_count(batch)
                if depends is not None:
                    self.model_accepts_loss_kwargs = depends
                    return
        logger.warning(
            "No client has rows with labels on which the loss is finite, so what it is divided by is not known. It "
            "is taken to be the number of labels of a step, as `Trainer` does. State it by `accepts_loss_kwargs` "
            "of the model's class."
        )

    def _labelled_batches(self) -> Iterator[dict[str, Any] | None]:
        """
        The first batch of each client, then the second, ...; `None` if batches have no `labels`, which `Trainer` would
        count.
        """
        size = self.args.per_device_train_batch_size
        for start in itertools.count(0, size):
            is_over = True
            for client in self._data.clients:
                try:
                    with self._failing_together(UNPREPARED):
                        prepared = self._data.prepared(client)
                        if start >= len(prepared):
                            continue
                        is_over = False
                        chosen = prepared.select(range(start, min(start + size, len(prepared))))
                        rows = self._remove_unused_columns(chosen)
                        batch = self.data_collator([rows[index] for index in range(len(rows))])
                except Exception:  # a matter of its turn
                    self._all_have_stopped = False
                    continue
                if "labels" not in batch:
                    yield None  # nor have those of the others, which have the same columns
                elif _has_labels(batch["labels"]):
                    yield batch
            if is_over:
                return

    @torch.no_grad()
    def _loss_depends_on_count(self, batch: dict[str, Any]) -> bool | None:
        """
        Whether the loss of this batch follows the count; `None` if it cannot tell, as its values are zero or not
        finite.
        """
        try:
            with self._agreeing_in_forward(), restoring(remember_problem_type(self.model), remember_flags()):
                first, second = (self._loss_with_count(batch, count) for count in (1, 2))
        except Exception:  # a matter of the client's turn
            self._all_have_stopped = False
            return None
        if not (torch.isfinite(first) and torch.isfinite(second)) or first == 0:
            return None
        return not bool(torch.isclose(first, second, rtol=1e-3, atol=0.0))

    def _loss_with_count(self, batch: dict[str, Any], count: int) -> torch.Tensor:
        inputs, items = self._prepare_inputs(dict(batch)), torch.tensor(count, device=self.args.device)
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=items)
        return loss.detach().float().mean()


def states_its_loss(model: nn.Module) -> bool:
    """Whether the model says itself what it does with `num_items_in_batch`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return hasattr(base, "accepts_loss_kwargs") or "num_items_in_batch" in inspect.signature(base.forward).parameters


def _has_labels(labels: Any) -> bool:
    if not isinstance(labels, torch.Tensor):
        return True  # of detection, say
    return bool((~labels.isnan() if labels.is_floating_point() else labels.ne(IGNORED_LABEL)).any())
