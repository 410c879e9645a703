# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Looking at a model without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


__all__ = ["evaluating", "keeping_problem_type", "keeping_random_state"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def keeping_problem_type(model: nn.Module | None, only_after_failure: bool = False) -> Iterator[None]:
    """
    Within, a classifier without a `problem_type` may guess one from the labels that it sees, which is forgotten afterwards, or if what
    is done within fails.
    """
    config: Any = getattr(model, "config", None)
    before, has_succeeded = getattr(config, "problem_type", None), False
    try:
        yield
        has_succeeded = True
    finally:
        if not (has_succeeded and only_after_failure) and getattr(config, "problem_type", None) != before:
            config.problem_type = before


@contextmanager
def keeping_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn within is not missing afterwards: from `random`, NumPy, and PyTorch on the CPU and on `device`."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
