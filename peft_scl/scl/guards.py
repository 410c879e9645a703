# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks against adapters that would silently do nothing, or something else than was trained."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .layer import SclLayer


__all__ = ["check_calls", "check_shapes", "check_start", "has_sharded_input", "warn_of_extra_weights"]


@contextmanager
def check_calls(model: nn.Module) -> Iterator[None]:
    """
    Watch one forward pass of `model`, and speak up if it goes past adapted modules.

    A model that reads `.weight` of a down projection instead of calling it (as a fused kernel does) would train
    without any effect. Modules whose active adapters are merged may be bypassed.

    Args:
        model (`nn.Module`):
            The adapted model. The hooks that this adds are removed when the context is left.

    Raises:
        RuntimeError: If no module with an active adapter was called. If only some were not, that is a warning: a
            vision tower is not used on a batch of text.
    """
    expected: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SclLayer)
        and not module.merged
        and any(adapter in module.scl_A for adapter in module.active_adapters)
    }
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda layer, _: called.add(layer)) for module in expected.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, module in expected.items() if module not in called]
    if not missed:
        return
    if not called:
        raise RuntimeError(
            f"The model has {len(expected)} modules with an active SCL adapter (the first: {missed[0]}), but its "
            "forward pass called none of them, so the adapter has no effect. The model probably reads their weights "
            "directly, as fused kernels do, and BLOOM with `slow_but_exact=True`: switch that off."
        )
    warnings.warn(
        f"{len(missed)} of {len(expected)} modules with an active SCL adapter were not called in the first forward "
        f"pass: {', '.join(missed)}. That is as it should be for a part of the model that this input does not use, "
        "such as a vision tower on a batch of text. Otherwise their adapter has no effect and will not be trained.",
        UserWarning,
        stacklevel=2,
    )


def check_shapes(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """
    Compare the SCL weights of a checkpoint with those that `model` has room for.

    Args:
        model (`nn.Module`):
            A model with the adapter in place.
        state_dict (`Mapping[str, torch.Tensor]`):
            The checkpoint, with the names of `model`; `base_model.model.` in front of them does not matter.

    Raises:
        ValueError: If a tensor has another shape.
    """
    prefix = "base_model.model."
    own = {name.removeprefix(prefix): parameter for name, parameter in model.state_dict().items() if ".scl_" in name}
    given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if ".scl_" in name}
    for name in sorted(own.keys() & given.keys()):
        found, needed = tuple(given[name].shape), tuple(own[name].shape)
        if found != needed:
            raise ValueError(
                f"The SCL adapter does not fit this base model: {name} has the shape {found} in the checkpoint, but "
                f"{needed} is needed here. It was trained on a base model with another hidden or feed-forward size "
                "(or with another `r` than its config says), and cannot be used with this one."
            )


def check_start(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """
    Check that a compression that keeps its residual gets its start from the checkpoint, or has computed it.

    Args:
        model (`nn.Module`):
            A model with the adapter in place.
        adapter_name (`str`):
            Its name.
        state_dict (`Mapping[str, torch.Tensor]`):
            The checkpoint. One without the start is enough for a model that has computed it.

    Raises:
        ValueError: If neither is the case: the weights are changes of that start.
    """
    starts = [
        module.scl_start_B[adapter_name]
        for module in model.modules()
        if isinstance(module, SclLayer) and adapter_name in module.scl_start_B
    ]
    given = any(".scl_start_" in key for key in state_dict)
    if starts and not given and not any(start.any() for start in starts if not start.is_meta):
        raise ValueError(
            "The checkpoint of the SCL adapter lacks the tensors `scl_start_A` and `scl_start_B`, of which its "
            "weights are the changes (`keep_residual=True`), and the model has not computed them. Load it without "
            "`low_cpu_mem_usage`, or save the whole adapter with `save_pretrained`."
        )


def warn_of_extra_weights(state_dict: Mapping[str, torch.Tensor], remapped: Mapping[str, torch.Tensor]) -> None:
    """
    Report the SCL weights of a checkpoint for which the model has no module.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The checkpoint as it was saved.
        remapped (`Mapping[str, torch.Tensor]`):
            The same with the adapter name inserted wherever the model has such a weight.
    """
    extra = sorted(name for name in state_dict if ".scl_" in name and name in remapped)
    if extra:
        warnings.warn(
            f"{len(extra)} SCL weights of the checkpoint have no place in this model and were not loaded (the first: "
            f"{extra[0]}). Was the adapter trained on a base model with more layers?",
            UserWarning,
            stacklevel=2,
        )


def has_sharded_input(layer: Any) -> bool:
    """Whether `layer` is row-wise tensor-parallel: each rank has a part of its input features."""
    weight = getattr(layer, "weight", None)  # some quantised layers have none
    return isinstance(weight, DTensor) and any(part.is_shard(dim=1) for part in weight.placements)
