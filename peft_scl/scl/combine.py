# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One adapter that computes a weighted sum of others, exactly: their maps side by side."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .config import SclConfig
from .layer import SclLayer


__all__ = ["combined_config", "set_combined_weights"]


def combined_config(
    configs: Mapping[str, SclConfig], weights: Sequence[float], layers: Mapping[str, SclLayer]
) -> SclConfig:
    """
    The config of the weighted sum of adapters.

    Args:
        configs (`Mapping[str, SclConfig]`):
            Adapter names and their configs.
        weights (`Sequence[float]`):
            One finite number per adapter.
        layers (`Mapping[str, SclLayer]`):
            The wrapped modules of the model by name.

    Returns:
        [`SclConfig`]: The first config with the ranks added up, the scaling 1 (it moves into the weights), and all
        target modules.

    Raises:
        ValueError: If no single adapter computes that sum; the message says why.
    """
    if len(weights) != len(configs) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"Expected {len(configs)} finite weights, one per adapter, but got {list(weights)}.")
    compress = any(config.variant == "compress" for config in configs.values())
    for field in ("variant", "activation", *(["keep_residual"] if compress else [])):
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"The adapters differ in `{field}` ({values}), so no single adapter computes their sum. Keep them "
                "separate and activate them together: `model.base_model.set_adapter([...])`."
            )
    special = [name for name, config in configs.items() if config.modules_to_save or config.trainable_token_indices]
    if special:
        raise ValueError(
            f"The adapters {special} train whole modules or token embeddings (`modules_to_save`, "
            "`trainable_token_indices`), which are not sums and cannot be combined."
        )
    wrapped = {name: layer for name, layer in layers.items() if any(adapter in layer.scl_A for adapter in configs)}
    first = next(iter(configs.values()))
    r = sum(config.r for config in configs.values())
    if compress and not first.keep_residual:
        _check_rank(wrapped, r)
        _check_replacements(list(configs), weights, wrapped)
    config = replace(
        first,
        r=r,
        scaling=1.0,
        scl_bias=any(config.scl_bias for config in configs.values()),
        **({} if compress else _combined_delta(list(configs.values()))),
    )
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if any(getattr(other, field) != getattr(first, field) for other in configs.values() for field in fields):
        config = replace(
            config,
            target_modules=list(wrapped),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    return config


def _check_rank(layers: Mapping[str, SclLayer], r: int) -> None:
    for key, layer in layers.items():
        limit = min(layer.in_features, layer.out_features)
        if r > limit:
            raise ValueError(
                f"The ranks of the adapters add up to {r}, but `keep_residual=False` allows {limit} at most for "
                f"{key}. Keep the adapters separate and activate them together, or merge them into the base model."
            )


def _check_replacements(names: list[str], weights: Sequence[float], layers: Mapping[str, SclLayer]) -> None:
    """Only a mean of compressions that replace the projection, each in all layers, is one again."""
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"The weights add up to {sum(weights)}, but compressions with `keep_residual=False` replace the down "
            "projection W: the weighted sum of the changes `scaling * B A - W` needs W itself unless the weights add "
            "up to 1 (a mean of the models)."
        )
    for key, layer in layers.items():
        missing = [name for name in names if name not in layer.scl_A]
        if missing:
            raise ValueError(
                f"The adapters {missing} do not compress {key} as the others do, so their mean there needs the down "
                "projection itself, which compressions with `keep_residual=False` replace."
            )


def _combined_delta(configs: list[SclConfig]) -> dict[str, Any]:
    kinds = {config.train_down_proj for config in configs}
    if "full" in kinds:
        return {"train_down_proj": "full", "down_proj_r": None, "down_proj_start": "zero"}
    if "low_rank" in kinds:
        ranks = [
            (config.down_proj_r or config.r) * (2 if config.down_proj_start == "principal" else 1)
            for config in configs
            if config.train_down_proj == "low_rank"
        ]
        return {"train_down_proj": "low_rank", "down_proj_r": sum(ranks), "down_proj_start": "zero"}
    return {"train_down_proj": "none", "down_proj_r": None, "down_proj_start": "zero"}


@torch.no_grad()
def set_combined_weights(layer: SclLayer, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """
    Fill the adapter `name` of `layer` with the weighted sum of those `adapters` that the layer has.

    `A = [A_1; A_2; ...]` and `B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]` compute `sum_k w_k s_k B_k act(A_k h)` for any
    activation, since it acts on each entry for itself. Rows and columns left over are zero.

    Args:
        layer (`SclLayer`):
            The wrapped module, where `name` has at least the sum of the ranks.
        adapters (`Sequence[str]`):
            Adapters to combine.
        weights (`Sequence[float]`):
            One weight per adapter.
        name (`str`):
            The adapter to fill.
    """
    terms = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.scl_A]
    factors = [(adapter, weight * layer.scaling[adapter]) for adapter, weight in terms]
    # a new adapter has the dtype of the base layer, one that was trained is kept in float32
    dtype = functools.reduce(torch.promote_types, (layer.scl_A[adapter].weight.dtype for adapter, _ in terms))
    for entries in (getattr(layer, attribute) for attribute in layer.adapter_layer_names):
        if name in entries:
            entries[name].to(dtype)
    down, up = layer.scl_A[name], layer.scl_B[name]
    _fill(down.weight, rows=[layer.scl_A[adapter].weight for adapter, _ in terms])
    _fill(up.weight, columns=[factor * layer.scl_B[adapter].weight for adapter, factor in factors])
    if name in layer.scl_start_A:
        for entries in (layer.scl_start_A, layer.scl_start_B):
            entries[name] = entries[name].to(dtype)
        _fill(layer.scl_start_A[name], rows=[layer.scl_start_A[adapter] for adapter, _ in terms])
        _fill(layer.scl_start_B[name], columns=[factor * layer.scl_start_B[adapter] for adapter, factor in factors])
    if down.bias is not None:
        down.bias.zero_()
        up.bias.zero_()
        start = 0
        for adapter, factor in factors:
            if layer.scl_A[adapter].bias is not None:
                down.bias[start : start + layer.r[adapter]] = layer.scl_A[adapter].bias
                up.bias += factor * layer.scl_B[adapter].bias
            start += layer.r[adapter]

    low_rank = [(adapter, weight) for adapter, weight in terms if adapter in layer.scl_delta_A]
    if name in layer.scl_delta:
        delta = layer.scl_delta[name].weight.zero_()
        for adapter, weight in terms:
            if adapter in layer.scl_delta:
                delta += weight * layer.scl_delta[adapter].weight
        for adapter, weight in low_rank:
            delta += weight * (layer.scl_delta_B[adapter].weight @ layer.scl_delta_A[adapter].weight)
    elif name in layer.scl_delta_A:
        _fill(layer.scl_delta_A[name].weight, rows=[layer.scl_delta_A[adapter].weight for adapter, _ in low_rank])
        _fill(
            layer.scl_delta_B[name].weight,
            columns=[weight * layer.scl_delta_B[adapter].weight for adapter, weight in low_rank],
        )


def _fill(weight: torch.Tensor, rows: Sequence[torch.Tensor] = (), columns: Sequence[torch.Tensor] = ()) -> None:
    """Write `rows` below each other, or `columns` beside each other, into `weight`, and zeros behind them."""
    weight.zero_()
    if rows:
        block = torch.cat(list(rows), dim=0)
        weight[: block.shape[0]] = block
    if columns:
        block = torch.cat(list(columns), dim=1)
        weight[:, : block.shape[1]] = block
