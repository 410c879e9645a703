# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which tensors of a model belong to which adapter, whatever the adapters are called.

PEFT drops the tensors of other adapters from a file by their names: everything with `.<name>.` in its key. An adapter
that is called like a module of the base model (`"mlp"`, `"0"`) so empties the files of its neighbours. Here the place
counts: an adapter's name stands right below the containers of the adapter layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


__all__ = ["called_like_a_module", "restore_dropped", "without_name", "without_others"]


_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)
_WRAPPED = ("base_layer", "model", "original_module")
_PROMPTS = "prompt_encoder"  # of a `PeftModel`
_FSDP = "_fsdp_wrapped_module."  # in the names of modules, not in those of tensors


def called_like_a_module(model: nn.Module, adapter_names: Iterable[str]) -> list[str]:
    """
    Those of `adapter_names` that are also a part of the name of a tensor of `model`, beside the places of adapters'
    names.
    """
    containers, names = _containers(model), set()
    for key in model.state_dict():
        parts = key.split(".")
        place = _place(parts, containers)
        names |= {part for index, part in enumerate(parts) if index != place}
    return [name for name in adapter_names if name in names]


def restore_dropped(
    model: nn.Module, adapter_name: str, state_dict: MutableMapping[str, Any], other_names: Collection[str]
) -> None:
    """
    Put back, in place, what PEFT has dropped from `state_dict` because its key contains the name of another adapter by
    chance.

    Args:
        model (`nn.Module`):
            The model that the state dict is of.
        adapter_name (`str`):
            The adapter that is to be saved.
        state_dict (`dict[str, Any]`):
            `model.state_dict()`, or what was gathered in its place, without what PEFT has dropped.
        other_names (`Collection[str]`):
            Names of the other adapters.

    Raises:
        ValueError: If tensors of the adapter are missing and not those of `model`, but gathered ones, so that they
            cannot be put back.
    """
    if not other_names or not state_dict:  # the processes of FSDP2 and ZeRO-3 that do not write have an empty one
        return
    whole = model.state_dict()
    dropped = {
        key: tensor
        for key, tensor in without_others(model, whole, other_names).items()
        if key not in state_dict and any(f".{name}." in key or key.endswith(f".{name}") for name in other_names)
    }
    if not dropped:
        return
    if not all(_is_same(tensor, whole.get(key)) for key, tensor in state_dict.items()):
        clashing = called_like_a_module(model, other_names)
        raise ValueError(
            f"{len(dropped)} tensors beside the adapter {adapter_name!r} are missing from the state dict that was "
            f"given (the first: {next(iter(dropped))}): an adapter is called like a module of the model ({clashing}), "
            "and PEFT drops everything below it. Give that adapter another name."
        )
    state_dict.update(dropped)


def without_others(model: nn.Module, state_dict: Mapping[str, Any], other_names: Collection[str]) -> dict[str, Any]:
    """`state_dict` without the tensors of the adapters `other_names`, told by where they stand."""
    containers, kept = _containers(model), {}
    for key, value in state_dict.items():
        parts = key.split(".")
        place = _place(parts, containers)
        if place is None or parts[place] not in other_names:
            kept[key] = value
    return kept


def without_name(key: str, adapter_name: str, prefix: str) -> str:
    """
    The name in an adapter file of the tensor `key` of a model: without the name of the adapter, where that stands
    below a container whose name begins with `prefix`, as in `scl_A.default.weight`. PEFT takes it out wherever it ends
    a key, also from `score.weight`.
    """
    parts = key.split(".")
    for place in (len(parts) - 1, len(parts) - 2):
        if place > 0 and parts[place] == adapter_name and parts[place - 1].startswith(prefix):
            return ".".join(parts[:place] + parts[place + 1 :])
    return key


def _containers(model: nn.Module) -> set[str]:
    """Names of the modules whose entries are called like the adapters."""
    return {
        f"{name}.{child}".removeprefix(".").replace(_FSDP, "")
        for name, module in model.named_modules()
        for child, container in module.named_children()
        if isinstance(container, _CONTAINERS)
        and (
            child == _PROMPTS
            if isinstance(module, PeftModel)
            else isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper))
        )
        and child not in _WRAPPED
    }


def _place(parts: Sequence[str], containers: Collection[str]) -> int | None:
    """Where in the parts of a key the name of an adapter stands, if it does."""
    return next((end for end in range(1, len(parts)) if ".".join(parts[:end]) in containers), None)


def _is_same(given: Any, live: Any) -> bool:
    """Whether both are the same tensor of the model; what is no tensor does not matter."""
    if not isinstance(given, torch.Tensor) or not isinstance(live, torch.Tensor):
        return True
    return given.shape == live.shape and given.data_ptr() == live.data_ptr()
