# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused before any module is wrapped: the first residual that is written changes the base model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..access import offload_hook
from ..quantization import MERGEABLE_BACKENDS
from .config import FederaConfig
from .embedding import Embedding
from .layer import FederaLayer
from .linear import Linear


__all__ = ["check_target", "layer_class"]


def layer_class(model: nn.Module, target: Any) -> type[FederaLayer] | None:
    """The class that wraps `target`, a module of `model`; `None` if there is none."""
    # the output projection of nn.MultiheadAttention, whose forward is never called
    if isinstance(target, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(target, nn.Embedding):
        return Embedding
    if isinstance(target, (nn.Linear, Conv1D)) or _backend(model, target) is not None:
        return Linear
    return None


def check_target(model: nn.Module, key: str, target: Any, config: FederaConfig) -> None:
    """
    Check that a module can be wrapped.

    Args:
        model (`nn.Module`):
            The model it belongs to.
        key (`str`):
            Its name there.
        target (`nn.Module`):
            The module, or its FeDeRA layer.
        config ([`FederaConfig`]):
            The configuration of the new adapter.

    Raises:
        TypeError: If FeDeRA does not wrap modules of this kind.
        NotImplementedError: If its weight cannot be read.
        ValueError: If the rank is too high, or there is no place for a residual.
    """
    if isinstance(target, BaseTunerLayer) and not isinstance(target, FederaLayer):
        raise TypeError(
            f"Target module {key} is already wrapped by another PEFT method "
            f"({type(target).__module__}.{type(target).__name__}). FeDeRA starts from the pretrained weight and "
            "cannot be stacked on another adapter: merge that adapter first (`merge_and_unload`), or choose other "
            "`target_modules`."
        )
    layer: Any = target.get_base_layer() if isinstance(target, FederaLayer) else target
    if layer_class(model, layer) is None:
        raise TypeError(
            f"Target module {key} is a {type(layer).__name__}, but FeDeRA wraps linear layers (`nn.Linear`, "
            "transformers' `Conv1D`, and the quantised linear layers that PEFT supports) and `nn.Embedding` only. "
            "Choose other `target_modules`, or use `LoraConfig`."
        )
    backend = _backend(model, layer)
    _check_readable(key, layer, backend)
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"Target module {key} is an embedding with `max_norm`, which rescales its rows in the forward, so the "
            "start of FeDeRA would not stay what it is. Choose other `target_modules`."
        )
    _check_rank(key, layer, config)
    if not config.keep_base:
        _check_residual(model, key, layer, backend)


def _backend(model: nn.Module, layer: Any) -> Any:
    return resolve_quantization_backend(layer, **get_quantization_kwargs(model))


def _check_readable(key: str, layer: Any, backend: Any) -> None:
    if backend is not None and backend.backend_name not in MERGEABLE_BACKENDS:
        raise NotImplementedError(
            f"Target module {key} is quantised by {backend.backend_name}, but FeDeRA can read the weights of "
            "bitsandbytes and torchao only. Use `LoraConfig`, or a base model that is quantised otherwise."
        )
    if backend is not None and offload_hook(layer) is not None:
        raise NotImplementedError(
            f"Target module {key} is quantised and offloaded, so its singular vectors cannot be read. Add the adapter "
            "before offloading."
        )
    if isinstance(getattr(layer, "weight", None), DTensor):
        raise NotImplementedError(
            f"The weight of the target module {key} is sharded over devices, so its singular vectors cannot be read. "
            "Add the FeDeRA adapter before the model is sharded."
        )


def _check_rank(key: str, layer: Any, config: FederaConfig) -> None:
    patterns = config.rank_pattern or {}
    r = patterns.get(get_pattern_key(list(patterns), key), config.r)
    in_features, out_features = _get_in_out_features(layer)
    assert in_features is not None and out_features is not None  # known for every class that is wrapped
    full_rank = min(in_features, out_features)
    if r > full_rank:
        raise ValueError(
            f"`r` is {r}, but {key} has a weight of shape ({out_features}, {in_features}), which has no more than "
            f"{full_rank} singular directions. Choose `r` up to that, or set `rank_pattern` for this module."
        )


def _check_residual(model: nn.Module, key: str, layer: Any, backend: Any) -> None:
    if backend is not None:
        raise ValueError(
            f"`keep_base=False` writes the residual into the base weights, but those of {key} are quantised by "
            f"{backend.backend_name}: quantising again would change every one of them by up to a step of the grid, "
            "and the saved adapter would be off by that. Set `keep_base=True`, which leaves them as they are."
        )
    if offload_hook(layer) is not None:
        raise ValueError(
            f"`keep_base=False` writes the residual into the base weights, but those of {key} are offloaded. Set "
            "`keep_base=True`, or load the model without offloading."
        )
    if layer._parameters.get("weight") is not layer.weight:
        raise ValueError(
            f"`keep_base=False` writes the residual into the base weights, but that of {key} is computed anew in "
            "every forward (a parametrisation, such as `weight_norm`). Set `keep_base=True`, or remove the "
            "parametrisation."
        )
    owners = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(parameter is layer.weight for parameter in module._parameters.values())
    ]
    if len(owners) > 1:  # a residual would change whatever else uses the weight
        raise ValueError(
            f"The weight of the target module {key} is used in several places ({', '.join(owners)}), so writing the "
            "residual into it would change the others too. Set `keep_base=True`, or leave it out of `target_modules`."
        )
