# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a PyTorch optimiser remembers, as tensors by name: to be kept with a client, and given back to the optimiser of
another time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..state.adapter_state import AdapterState


__all__ = ["UnkeptOptimizerError", "read_optimizer", "with_state"]


class UnkeptOptimizerError(NotImplementedError):
    """The state of an optimiser cannot be kept by client."""


def read_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], initial: dict[str, Any]
) -> AdapterState:
    """
    What an optimiser remembers of `parameters`: `<name>:<key>`, on CPU. A Python integer becomes an int64, a
    float a float64.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimiser.
        parameters (`Mapping[str, torch.nn.Parameter]`):
            The parameters by key.
        initial (`dict`):
            Its `state_dict()` when it was new.

    Raises:
        UnkeptOptimizerError: If it remembers something else, or something of all tensors together.
    """
    for group, fresh in zip(optimizer.param_groups, initial["param_groups"], strict=True):
        for name, value in group.items():
            if name not in ("params", "lr", "initial_lr") and value != fresh.get(name):
                raise UnkeptOptimizerError(
                    f"`keep_optimizer_state=True`, but {type(optimizer).__name__} counts in its parameter groups "
                    f"too ({name!r}), which are not kept by client. Set `optim='adamw_torch'`."
                )
    state = {}
    for key, parameter in parameters.items():
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, (torch.Tensor, int, float)):
                raise UnkeptOptimizerError(
                    f"`keep_optimizer_state=True`, but {type(optimizer).__name__} remembers {name!r} as a "
                    f"{type(value).__name__}, not as a tensor or a number. Set `optim='adamw_torch'`."
                )
            dtype = {int: torch.int64, float: torch.float64}.get(type(value))
            state[f"{name}:{key}"] = torch.as_tensor(value, dtype=dtype).detach().to("cpu", copy=True)
    return state


def with_state(
    initial: dict[str, Any],
    state: AdapterState,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Any]:
    """
    The `state_dict` of a new optimiser with what `read_optimizer` gave; entries of others than `parameters` are
    left out.

    Args:
        initial (`dict`):
            The `state_dict()` of the optimiser when it was new.
        state (`dict[str, torch.Tensor]`):
            What `read_optimizer` gave.
        optimizer (`torch.optim.Optimizer`):
            The optimiser, for the order of its parameters.
        parameters (`Mapping[str, torch.nn.Parameter]`):
            The parameters by key.
    """
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(in_order)}
    by_position: dict[int, dict[str, Any]] = {}
    for entry, value in state.items():
        name, _, key = entry.partition(":")
        if key in parameters:
            is_number = value.dtype in (torch.int64, torch.float64) and value.dim() == 0
            remembered = by_position.setdefault(position[id(parameters[key])], {})
            remembered[name] = value.item() if is_number else value
    return {**initial, "state": by_position}
