# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation change beside the trained weights, remembered so that it can be put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


__all__ = [
    "PutBack",
    "evaluating",
    "remember_flags",
    "remember_frequencies",
    "remember_hooks",
    "remember_modes",
    "remember_problem_type",
    "remember_random_state",
    "remember_weights",
    "restoring",
]

PutBack = Callable[[], None]

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
# which installs its hooks at the first forward pass that needs them, once: without them the model gives no hidden
# states
_INSTALLS_FOR_GOOD = "transformers.utils.output_capturing"
# of transformers' rotary embeddings, by layer type too
_GROWS_WITH_SEQUENCES = ("max_seq_len_cached", "attention_scaling")


@contextmanager
def restoring(*put_back: PutBack, only_after_failure: bool = False) -> Iterator[None]:
    """
    Within, things may change: at the end they are put back.

    Args:
        put_back (`Callable`):
            What the `remember_...` functions have returned.
        only_after_failure (`bool`, *optional*, defaults to `False`):
            Whether they stay changed unless an exception leaves the block.
    """
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        if has_failed or not only_after_failure:
            for action in put_back:
                action()


def remember_hooks(model: nn.Module) -> PutBack:
    """
    The hooks of all modules, neither more nor fewer, but for those that transformers has installed for good meanwhile.
    """
    before = [
        (hooks, dict(hooks))
        for module in model.modules()
        for hooks in (getattr(module, attribute) for attribute in _HOOKS)
    ]

    def put_back() -> None:
        for hooks, known in before:
            for_good = {
                key: hook for key, hook in hooks.items() if getattr(hook, "__module__", None) == _INSTALLS_FOR_GOOD
            }
            hooks.clear()
            hooks.update(known | for_good)

    return put_back


def remember_modes(model: nn.Module) -> PutBack:
    """Which modules are in training mode."""
    before = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in before:
            module.training = training

    return put_back


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards every module is in the mode that it was in."""
    with restoring(remember_modes(model)):
        model.eval()
        yield


def remember_problem_type(model: nn.Module | None) -> PutBack:
    """What a classifier takes its labels for, which it may guess from the first ones that it sees."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "problem_type", None)

    def put_back() -> None:
        if getattr(config, "problem_type", None) != before:
            config.problem_type = before

    return put_back


def remember_frequencies(model: nn.Module) -> PutBack:
    """
    The frequencies of a dynamic RoPE, which follow the longest sequence that the model has seen, whosever it was.
    """

    def grown(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name.endswith(_GROWS_WITH_SEQUENCES)}

    before = [
        (module, grown(module), dict(module._buffers))
        for module in model.modules()
        if hasattr(module, _GROWS_WITH_SEQUENCES[0])
    ]

    def put_back() -> None:
        for module, values, buffers in before:
            for name in grown(module).keys() - values.keys():
                delattr(module, name)
            vars(module).update(values)
            module._buffers.update(buffers)

    return put_back


def remember_weights(model: nn.Module) -> PutBack:
    """
    The memory of all parameters and buffers, for the time that `model.to(dtype)` gives them another. It stays
    allocated: nothing is copied or rounded, and whoever holds the parameters and buffers holds the same ones
    afterwards.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]

    def put_back() -> None:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer

    return put_back


def remember_random_state() -> PutBack:
    """The generators of Python, NumPy and PyTorch."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return put_back


def remember_flags() -> PutBack:
    """
    The settings of PyTorch that hold for the whole process or thread, which code that fails half-way leaves switched.
    """
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    deterministic = torch.get_deterministic_debug_mode()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    is_cached = torch.is_autocast_cache_enabled()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        torch.autograd.set_detect_anomaly(*anomaly)
        if torch.get_deterministic_debug_mode() != deterministic:
            torch.set_deterministic_debug_mode(deterministic)
        for device, is_enabled, autocast_dtype in autocast:
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, autocast_dtype)
        torch.set_autocast_cache_enabled(is_cached)
        torch.clear_autocast_cache()

    return put_back
