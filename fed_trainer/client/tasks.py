# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a local round is given, and what comes out of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ..methods.objectives import LocalObjective
from ..state.adapter_state import AdapterState


__all__ = ["Task", "Trained"]


@dataclass(frozen=True)
class Task:
    """
    The local round of one client.

    Args:
        state (`dict[str, torch.Tensor]`):
            Adapter to start from; not changed.
        dataset (`Dataset`):
            The client's prepared training data.
        seed (`int`):
            Seed of dropout and of the order of the data.
        data_seed (`int`, *optional*):
            Seed of the order of the data, if it is not to follow `seed`.
        lr_factor (`float`, *optional*, defaults to 1.0):
            Factor on `learning_rate` in this round.
        trained (`Collection[str]`, *optional*):
            Keys of `state` that are trained; all if not given.
        max_steps (`int`, *optional*):
            Local budget, in place of `args.max_steps`.
        objective ([`LocalObjective`], *optional*):
            What to add to the gradients; `begin` has been called.
        timeout (`float`, *optional*):
            Seconds after which it counts as failed, looked at after every optimiser step. Of several processes the
            slowest counts.
        optimizer_state (`dict[str, torch.Tensor]`, *optional*):
            `Trained.optimizer_state` of an earlier local round, to go on with; a fresh optimiser if not given.
        keeps_optimizer (`bool`, *optional*, defaults to `False`):
            Whether what the optimiser remembers afterwards is asked for.
        global_state (`dict[str, torch.Tensor]`, *optional*):
            The global state of the round as the client was sent it, if it does not start from it; not changed.
    """

    state: AdapterState
    dataset: Dataset
    seed: int
    data_seed: int | None = None
    lr_factor: float = 1.0
    trained: Collection[str] | None = None
    max_steps: int | None = None
    objective: LocalObjective | None = None
    timeout: float | None = None
    optimizer_state: AdapterState | None = None
    keeps_optimizer: bool = False
    global_state: AdapterState | None = None


@dataclass(frozen=True)
class Trained:
    """
    What a local round has come to.

    Args:
        state (`dict[str, torch.Tensor]`):
            The trained adapter.
        metrics (`dict[str, Any]`):
            `train_loss` (mean per step), `num_steps`, `seconds` and, of a trainer that logs more in training,
            `training_metrics`.
        optimizer_state (`dict[str, torch.Tensor]`, *optional*):
            What the optimiser remembers of the tensors that were trained (see `read_optimizer`), if it was asked for.
    """

    state: AdapterState
    metrics: dict[str, Any]
    optimizer_state: AdapterState | None = None
