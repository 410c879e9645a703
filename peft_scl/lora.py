# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A linear SCL or a FeDeRA adapter as a plain LoRA adapter of the same base model, exact or of a named rank."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .file_mode import follow_umask
from .linalg import WeightChange, truncated_svd
from .merging import MergeableLayer


__all__ = ["PREFIX", "LoraExport", "LoraModule", "lora_export", "other_tensors", "to_lora"]

PREFIX = "base_model.model."  # of all names in an adapter file


class LoraModule(NamedTuple):
    """One module of an adapter that [`lora_export`] makes."""

    name: str
    change: WeightChange  # what it should be
    lora_B: torch.Tensor  # (out, r)
    lora_A: torch.Tensor  # (r, in)
    is_embedding: bool


class LoraExport(NamedTuple):
    """
    A LoRA adapter in memory, and how far it is from the adapter it was made of.

    Args:
        config ([`~peft.LoraConfig`]):
            Its configuration, with `lora_alpha = r` (the scaling is 1).
        state_dict (`dict[str, torch.Tensor]`):
            Its weights on the CPU, under the names of an adapter file; [`~peft.set_peft_model_state_dict`] reads them.
        error (`float`):
            `||exact - exported||_F / ||exact||_F` of the weight changes of all modules together, computed in float64
            from the tensors in `state_dict`.
        errors (`dict[str, float]`):
            The same for each module.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    error: float
    errors: dict[str, float]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` does."""
        config = copy.copy(self.config)
        config.inference_mode = True
        config.save_pretrained(os.fspath(save_directory))
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        save_file(self.state_dict, weights, metadata={"format": "pt"})
        follow_umask(weights)


@torch.no_grad()
def to_lora(
    model: nn.Module, adapter_name: str = "default", r: int | None = None, dtype: torch.dtype = torch.float32
) -> LoraExport:
    """
    Export a linear SCL adapter or a FeDeRA adapter as a LoRA adapter for the untouched base model.

    Exact up to the rounding to `dtype` are

    - `variant="compress"` that keeps its residual: the change is `s ((B0 + B) (A0 + A) - B0 A0)`, a LoRA of rank `2 r`
      with `lora_A = [A0 + A; A]` and `lora_B = [s B, s B0]`;
    - `variant="bottleneck"` with the delta `"none"` or `"low_rank"` (`D2 D1`): the change is
      `delta + s (W + delta) B A`, a LoRA of rank `r` or `r + down_proj_r` (`r + 2 down_proj_r` from a principal start)
      with `lora_A = [A; D1]` and `lora_B = [s (W + D2 D1) B, D2]`;
    - FeDeRA: the change is `s (B A - B0 A0)`, a LoRA of rank `2 r` (which is what `save_pretrained` writes).

    The change of a full delta and of a compression without its residual has full rank; its best approximation is
    exported when a rank is named.

    Trained tokens and modules (`trainable_token_indices`, `modules_to_save`) come along, and so do biases
    (`lora_bias=True`). With several adapters in a model, each is exported as if it were alone.

    Args:
        model (`nn.Module`):
            A [`~peft.PeftModel`], or a transformers model with an adapter (`add_adapter`, `load_adapter`), neither
            merged nor offloaded. It is not changed.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter to export.
        r (`int`, *optional*):
            Rank of the LoRA adapter: the change of each module is replaced by its best approximation of that rank. By
            default the rank that is exact.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the LoRA weights. The products are computed in float64.

    Returns:
        [`LoraExport`]: The tuple `(config, state_dict, error, errors)`, with a method `save_pretrained`.

    Raises:
        ValueError: If the model has no such adapter of this name, if it is non-linear, merged or offloaded, if its
            change has full rank and no `r` is given, or if `r` is not positive or larger than the rank of the change.

    Example:

        ```py
        >>> lora = to_lora(model)
        >>> lora.save_pretrained("lora-adapter")  # to be loaded without peft_scl
        ```
    """
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: Any = getattr(model, "peft_config", {})
    layers = _layers_of(root, adapter_name, configs)
    _check_rank(r, layers, adapter_name)
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # PEFT gives transformers models no prefix; `clone`, because safetensors refuses tied tensors
    state_dict = {PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu() for key, tensor in state_dict.items()}
    others = {key: tensor.clone() for key, tensor in other_tensors(state_dict, layers).items()}
    fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    modules = _modules(layers, adapter_name, r)
    return lora_export(root, configs[adapter_name], modules, others, fan_in_fan_out, dtype)


def _layers_of(root: nn.Module, adapter_name: str, known: Iterable[str]) -> dict[str, MergeableLayer]:
    """The layers with an adapter, by name; `known` are all adapters of the model."""
    all_layers = {name: module for name, module in root.named_modules() if isinstance(module, MergeableLayer)}
    layers: dict[str, Any] = {name: layer for name, layer in all_layers.items() if adapter_name in layer.r}
    if not layers:
        names = [name for name in known if any(name in layer.r for layer in all_layers.values())]
        raise ValueError(
            f"The model has no SCL or FeDeRA adapter {adapter_name!r}; its adapters of these kinds are {names}. Pass "
            "the model with its adapter (`get_peft_model`, `PeftModel.from_pretrained`, `load_federa`) and the name "
            "of one of them as `adapter_name`."
        )
    return layers


def _modules(layers: Mapping[str, MergeableLayer], adapter_name: str, r: int | None) -> Iterator[LoraModule]:
    """The factors of all layers, of one rank: not everything reads a rank pattern."""
    ranks = {name: layer.exact_rank(adapter_name) for name, layer in layers.items()}
    lora_r = max(ranks.values()) if r is None else r
    for name, layer in layers.items():
        change = layer.weight_change(adapter_name)
        lora_B, lora_A = _factors(change, None if r is None else min(r, ranks[name]))
        padding = lora_r - lora_A.shape[0]  # rows and columns of zeros
        lora_A = nn.functional.pad(lora_A, (0, 0, 0, padding))
        lora_B = nn.functional.pad(lora_B, (0, padding))
        yield LoraModule(name, change, lora_B, lora_A, isinstance(layer.get_base_layer(), nn.Embedding))


def other_tensors(state_dict: dict[str, torch.Tensor], modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """What an adapter file holds beside the factors of `modules`, such as trained tokens and modules."""
    modules = set(modules)
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if re.split(r"\.(?:scl|lora)_", key.removeprefix(PREFIX))[0] not in modules
    }


def lora_export(
    base: nn.Module,
    config: PeftConfig,
    modules: Iterable[LoraModule],
    others: dict[str, torch.Tensor],
    fan_in_fan_out: bool,
    dtype: torch.dtype,
) -> LoraExport:
    """
    A LoRA adapter with the scaling 1 of given factors, for exactly the given modules.

    Args:
        base (`nn.Module`):
            The base model, in which the modules have their names.
        config ([`~peft.PeftConfig`]):
            Configuration of the adapter that is exported.
        modules (`Iterable[LoraModule]`):
            The factors. Modules of other ranks than the largest are named in `rank_pattern` and `alpha_pattern`.
        others (`dict[str, torch.Tensor]`):
            What comes along as it is, under the names of an adapter file.
        fan_in_fan_out (`bool`):
            Whether a module is a `Conv1D`.
        dtype (`torch.dtype`):
            Dtype of the factors.

    Returns:
        [`LoraExport`]: The adapter.
    """
    state_dict: dict[str, torch.Tensor] = {}
    norms: dict[str, tuple[float, float]] = {}
    ranks: dict[str, int] = {}
    lora_bias = False
    for name, change, lora_B, lora_A, is_embedding in modules:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        norms[name] = _norms(change, lora_B.double(), lora_A.double())
        ranks[name] = len(lora_A)
        keys = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        for key, factor in zip(keys, (lora_A, lora_B), strict=True):
            state_dict[f"{PREFIX}{name}.{key}"] = factor.cpu().contiguous()
        if change.shift is not None:
            lora_bias = True
            state_dict[f"{PREFIX}{name}.lora_B.bias"] = change.shift.to(dtype).cpu()
    lora_config = _lora_config(base, config, ranks, lora_bias, fan_in_fan_out)
    errors = {name: _ratio(*pair) for name, pair in norms.items()}
    total, distance = torch.tensor(list(norms.values()), dtype=torch.float64).norm(dim=0).tolist()
    return LoraExport(lora_config, state_dict | others, _ratio(total, distance), errors)


def _lora_config(
    base: nn.Module, config: Any, ranks: Mapping[str, int], lora_bias: bool, fan_in_fan_out: bool
) -> LoraConfig:
    """The configuration for factors of the given `ranks`, with what `config` has beside factors."""
    r = max(ranks.values())
    # PEFT takes the keys of patterns for the ends of names, and for regular expressions
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    is_lora = isinstance(config, LoraConfig)
    lora_config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_bias=lora_bias,
        bias=config.bias if is_lora else "none",
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=is_lora and config.ensure_weight_tying,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )
    lora_config.target_modules = _exact_targets(lora_config, set(ranks), [name for name, _ in base.named_modules()])
    if config.task_type is None:  # what `AutoPeftModel` looks for, written by PEFT when it saves
        lora_config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return lora_config


def _check_rank(r: int | None, layers: Mapping[str, MergeableLayer], adapter_name: str) -> None:
    largest = max(layer.exact_rank(adapter_name) for layer in layers.values())
    if r is None:
        for name, layer in layers.items():
            option = layer.full_rank_option(adapter_name)
            if option is not None:
                raise ValueError(
                    f"The {layer.method} adapter {adapter_name!r} has {option}, which changes {name!r} by a matrix of "
                    "full rank, so no LoRA of a low rank equals it. Name a rank `r` to export the best approximation "
                    f"of that rank (`r={largest}` is exact), or merge the adapter (`merge_and_unload`)."
                )
    elif r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r!r}")
    elif r > largest:
        raise ValueError(
            f"`r` is {r}, but the weight changes of the adapter {adapter_name!r} have no rank above {largest}. Leave "
            f"`r` out, or choose up to {largest}."
        )


def _factors(change: WeightChange, r: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_B (d, k)` and `lora_A (k, m)`: exact for `r=None`, else the best approximation of rank `k <= r`."""
    if r is None:
        return change.left, change.right
    if change.rest is not None:
        left, values, right = truncated_svd(change.dense(), r)
    else:
        # the singular vectors of the product are those of its small core, turned by two orthonormal bases
        basis_left, core_left = torch.linalg.qr(change.left)
        basis_right, core_right = torch.linalg.qr(change.right.T)
        core = core_left @ core_right.T
        left, values, right = truncated_svd(core, min(r, *core.shape))
        left, right = basis_left @ left, right @ basis_right.T
    root = values.sqrt()
    return left * root, root[:, None] * right


def _norms(change: WeightChange, lora_B: torch.Tensor, lora_A: torch.Tensor) -> tuple[float, float]:
    """Frobenius norms of the change and of its difference to `lora_B @ lora_A`."""
    columns = change.left.shape[1] + lora_B.shape[1]
    if change.rest is None and columns < min(len(change.left), change.right.shape[1]):
        difference = torch.cat([change.left, -lora_B], dim=1), torch.cat([change.right, lora_A])
        return _product_norm(change.left, change.right), _product_norm(*difference)
    dense = change.dense()
    return dense.norm().item(), (dense - lora_B @ lora_A).norm().item()


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """`||left @ right||_F` of thin factors, without the cancellation of Gram matrices."""
    core_left, core_right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.T, mode="r").R
    return (core_left @ core_right.T).norm().item()


def _ratio(norm: float, distance: float) -> float:
    return distance / norm if norm > 0 else distance  # an untrained adapter changes nothing


def _exact_targets(config: LoraConfig, targets: Any, module_names: list[str]) -> Any:
    """
    `target_modules` that match `targets` and no other module: their full names, or a regular expression where a full
    name is also the ending of another one (PEFT matches lists by suffix).
    """
    config.target_modules = targets
    matched = {name for name in module_names if check_target_module_exists(config, name)}
    return targets if matched == targets else "|".join(re.escape(name) for name in sorted(targets))
