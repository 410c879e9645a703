# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A global state that the model cannot compute with ends the run before it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..state.adapter_state import AdapterState


__all__ = ["WAY_BACK", "BrokenStateError", "refuse_broken_loss", "refuse_overflow"]

WAY_BACK = (
    "It is not saved: `train(resume_from_checkpoint=True)` goes on from the last checkpoint, which is of a round "
    "before. Lower `learning_rate` or `server_lr`, or bound the updates with `aggregation='norm_bounding'`."
)


class BrokenStateError(ValueError):
    """A global state that the model cannot compute with."""


def refuse_overflow(state: AdapterState, dtypes: Mapping[str, torch.dtype]) -> None:
    """
    Refuse values that the tensors of the model cannot hold.

    Args:
        state (`dict[str, torch.Tensor]`):
            The global state, of finite values.
        dtypes (`Mapping[str, torch.dtype]`):
            Dtypes of the same tensors in the model.

    Raises:
        BrokenStateError: Naming the tensor.
    """
    for key, tensor in state.items():
        dtype = dtypes[key]
        if (
            tensor.dtype == dtype
            or tensor.numel() == 0
            or not (tensor.is_floating_point() and dtype.is_floating_point)
        ):
            continue
        if not torch.isfinite(tensor.abs().max().to(dtype)):
            raise BrokenStateError(
                f"The new global state has values in {key} that {dtype}, in which the model holds it, cannot "
                f"represent. {WAY_BACK}"
            )


def refuse_broken_loss(evaluation: Mapping[str, Any], earlier: Iterable[Mapping[str, Any] | None]) -> None:
    """
    Refuse a global state for which no held-out loss is finite any more. A loss that never was finite is a matter of
    the data.

    Args:
        evaluation (`Mapping[str, Any]`):
            What the evaluation of the state has given.
        earlier (`Iterable[Mapping[str, Any] or None]`):
            Earlier evaluations of the run.

    Raises:
        BrokenStateError: Naming a loss.
    """
    once_finite = {key for metrics in earlier for key in _finite_losses(metrics or {})}
    lost = sorted(once_finite & _losses(evaluation).keys())
    if lost and not _finite_losses(evaluation):
        raise BrokenStateError(
            f"The model cannot compute with the new global state: `{lost[0]}` is {evaluation[lost[0]]}, but was "
            f"finite in an earlier round. {WAY_BACK}"
        )


def _losses(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in evaluation.items()
        if key.startswith("eval_") and key.endswith("loss") and isinstance(value, (int, float))
    }


def _finite_losses(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in _losses(evaluation).items() if math.isfinite(value)}
