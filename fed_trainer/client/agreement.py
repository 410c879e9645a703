# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes leave the local round of a client together, when it fails in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..state.client_errors import ClientError, public_reason
from .live.deepspeed import DeepSpeedOptimizer


__all__ = ["UNPREPARED", "AgreementMixin", "FailedAloneError", "OtherProcessFailedError"]

logger = logging.get_logger(__name__)

UNPREPARED = "another process could not prepare the data"


class OtherProcessFailedError(ClientError):
    """What ends a local round in a process that could have gone on."""


class FailedAloneError(RuntimeError):
    """A process failed where the others wait for it, so that they cannot go on together."""


class AgreementMixin(Trainer):
    """
    Places at which every process learns whether one of them has failed: after the preparation of the data, after the batches of an
    optimiser step, and after a forward pass that has no communication of its own. An error elsewhere finds the others waiting.
    """

    _deepspeed_optimizer: DeepSpeedOptimizer | None = None
    _all_have_stopped: bool = False  # whether all processes have broken off the last local round, at the same place

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """As [`~transformers.Trainer.get_batch_samples`]; a batch that cannot be made stops all processes."""
        with self._failing_together("another process could not make a batch"):
            batches = list(itertools.islice(epoch_iterator, num_batches))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _any_stops(self, stops: bool) -> bool:
        """Whether any process stops here; all have to ask."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(stops), device=self.accelerator.device)
            stops = bool(self.accelerator.reduce(flag, reduction="sum").item())
        self._all_have_stopped |= stops
        return stops

    @contextmanager
    def _failing_together(self, reason: str) -> Iterator[None]:
        """What fails within, in one process, fails in all, in the others for the `reason`. It must not communicate."""
        try:
            yield
        except Exception:
            self._any_stops(True)
            raise
        if self._any_stops(False):
            raise OtherProcessFailedError(reason)

    def _agreeing_in_forward(self) -> AbstractContextManager[Any]:
        """Within, a forward pass that fails stops all processes, if the pass has no communication of its own."""
        if self.accelerator.num_processes == 1 or self.is_fsdp_enabled:
            return nullcontext()
        assert self.model is not None
        return self.model.register_forward_hook(self._agree_after_forward, always_call=True)

    def _agree_after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        deepspeed = self._deepspeed_optimizer  # which the first local round makes
        if deepspeed is not None and not deepspeed.can_discard_gradients:
            return
        failed = output is None  # torch then raises what has been raised
        if self._any_stops(failed) and not failed:
            raise OtherProcessFailedError("the forward pass of another process has failed")

    def _reason_of_all(self, error: Exception, client: str, round: int) -> str:
        """
        Why the processes have broken off a local round.

        Raises:
            FailedAloneError: If this process alone has.
        """
        reason = public_reason(error)
        if self.accelerator.num_processes == 1:
            return reason
        process = self.accelerator.process_index
        if not self._all_have_stopped:
            logger.warning(f"Round {round}, client {client!r}, process {process}: {reason}", exc_info=error)
            raise FailedAloneError(
                f"In round {round}, client {client!r}, process {process} failed with {reason}. This happened where the other processes "
                "wait for it, so the run ends. `train(resume_from_checkpoint=True)` continues it from its last checkpoint."
            ) from None  # its message can quote a row: it stays in the log of this process
        reasons = gather_object([None if isinstance(error, OtherProcessFailedError) else reason])
        failed = [index for index, other in enumerate(reasons) if other is not None]
        where = "" if len(failed) == len(reasons) else f" (process {failed[0]})"
        return f"{reasons[failed[0]]}{where}"
