# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a live model are the two factors of a product, and additions to the weights under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend

from peft_scl import FederaLayer, SclLayer
from peft_scl.linalg import full_precision

from ...state.factors import FactorPair, check_foldable
from ...state.low_rank import LowRank


__all__ = ["add_to_base", "factor_pairs"]

LORA_LAYERS = ("Embedding", "Linear", "Linear4bit", "Linear8bitLt")
BLOCK = 2**22  # entries of a base weight that are in float32 at once


def factor_pairs(model: PeftModel, adapter_name: str | None = None) -> list[FactorPair]:
    """
    The factor pairs of an adapter: LoRA and FeDeRA on `nn.Linear`, `Conv1D` and `nn.Embedding`, linear SCL.

    Args:
        model ([`~peft.PeftModel`]):
            The live model.
        adapter_name (`str`, *optional*):
            The adapter; the active one if not given.

    Raises:
        ValueError: If the adapter changes some layer in a way that is not the product of two of its tensors. The
            message names the layer and says why.
    """
    name = adapter_name or model.active_adapter
    _refuse_tied_factors(model)
    base: Any = model.get_base_model()
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    pairs = []
    for path, module in base.named_modules():
        if isinstance(module, SclLayer) and name in module.scl_A:
            pair = _scl_pair(path, module, name)
        elif isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            pair = _lora_pair(path, module, name)
        elif isinstance(module, BaseTunerLayer) and not isinstance(
            module, (SclLayer, LoraLayer, TrainableTokensLayer)
        ):
            raise ValueError(
                f"{path} has an adapter of type {type(module).__name__}, which is not described by factor pairs. "
                "Aggregate it with 'fedavg'."
            )
        else:
            continue
        pairs.append(_with_base_facts(pair, module, model, owners))
    if not pairs:
        raise ValueError(
            f"The adapter {name!r} has no pair of low-rank factors, which this aggregation combines. Use a LoRA or "
            "an SCL adapter, or 'fedavg', which takes any."
        )
    return pairs


def _refuse_tied_factors(model: PeftModel) -> None:
    """
    Refuse LoRA with `ensure_weight_tying` on tied weights: a factor of one module is that of another, transposed.
    """
    owners: dict[int, str] = {}
    for path, parameter in model.named_parameters():
        if ".lora_" in path and parameter.numel() > 0:
            owner = owners.setdefault(parameter.data_ptr(), path)
            if owner != path:
                raise ValueError(
                    f"{path} is the same memory as {owner} (`ensure_weight_tying`), so the two pairs of factors "
                    "cannot be set one by one. Leave one of the modules out of `target_modules`, or use 'fedavg'."
                )


def _lora_pair(path: str, layer: LoraLayer, name: str) -> FactorPair:
    kind, module = type(layer).__name__, type(layer).__module__
    if not isinstance(layer, FederaLayer) and (kind not in LORA_LAYERS or not module.startswith("peft.tuners.lora.")):
        raise ValueError(
            f"{path} is adapted by {module}.{kind}, whose factors are not known to be two matrices with "
            "`change = scaling B A`. Target linear or embedding layers with plain LoRA, or use 'fedavg'."
        )
    if layer.lora_variant.get(name) is not None or name in layer.lora_magnitude_vector:
        raise ValueError(
            f"{path} has a LoRA variant ({type(layer.lora_variant.get(name)).__name__}), such as DoRA, which "
            "rescales the sum of base weight and product: what it does is not linear in the product, so a mean of "
            "products means nothing. Use plain LoRA, or 'fedavg'."
        )
    if layer.lora_bias[name]:
        raise ValueError(
            f"{path} has `lora_bias=True`: its change of the output is not a product of factors alone. Set "
            "`lora_bias=False`, or use 'fedavg'."
        )
    prefix = f"base_model.model.{path}"
    start = (layer.lora_start_A[name], layer.lora_start_B[name]) if isinstance(layer, FederaLayer) else None
    if isinstance(layer, LoraEmbedding):
        keys = f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
        return FactorPair(path, *keys, layer.scaling[name], start=start, transposed=True)
    transposed = isinstance(layer, LoraLinear) and layer.fan_in_fan_out
    keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    return FactorPair(path, *keys, layer.scaling[name], start=start, transposed=transposed)


def _scl_pair(path: str, layer: SclLayer, name: str) -> FactorPair:
    if layer.activation[name] != "linear":
        raise ValueError(
            f"{path} has the activation {layer.activation[name]!r} between its factors, so it does not compute "
            "their product, and a mean of products means nothing. Train with `activation='linear'`, or use "
            "'fedavg' or 'ffa_lora'."
        )
    if layer.scl_A[name].bias is not None:
        raise ValueError(
            f"{path} has `scl_bias=True`: the bias of `A` is multiplied by `B` too, which a mean of products "
            "leaves out. Set `scl_bias=False`, or use 'fedavg' or 'ffa_lora'."
        )
    if name in layer.scl_delta or name in layer.scl_delta_A:
        raise ValueError(
            f"{path} trains the down projection behind the bottleneck too, and its change is a product of the two. "
            "Set `train_down_proj='none'`, use `variant='compress'`, or 'fedavg'."
        )
    unfoldable = None
    if layer.variant[name] == "bottleneck":
        unfoldable = (
            "its product acts on the input of the down projection, so adding to the base weight is another change"
        )
    elif layer.replaces(name):
        unfoldable = "`keep_residual=False` replaces the base weight, so nothing that is added to it has an effect"
    start = (layer.scl_start_A[name], layer.scl_start_B[name]) if name in layer.scl_start_A else None
    return FactorPair(
        path,
        f"base_model.model.{path}.scl_A.weight",
        f"base_model.model.{path}.scl_B.weight",
        layer.scaling[name],
        start=start,
        trains_change=start is not None,
        transposed=layer.fan_in_fan_out,
        unfoldable=unfoldable,
    )


def _with_base_facts(pair: FactorPair, layer: Any, model: PeftModel, owners: Counter[int]) -> FactorPair:
    base_layer = layer.get_base_layer()
    unfoldable = pair.unfoldable
    if unfoldable is None:
        if resolve_quantization_backend(base_layer, **get_quantization_kwargs(model.get_base_model())) is not None:
            unfoldable = "its base weight is quantised, so a small addition would be rounded away"
        elif base_layer.weight.is_meta:
            unfoldable = "its base weight is offloaded, so there is nothing in memory to add to"
        elif owners[id(base_layer.weight)] > 1:
            unfoldable = "its base weight is tied to another module, which the addition would change too"
    return FactorPair(**{**vars(pair), "unfoldable": unfoldable})


@torch.no_grad()
def add_to_base(
    model: PeftModel,
    base_change: dict[str, LowRank],
    pairs: Sequence[FactorPair],
    originals: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Add what an aggregation has for the base to the base weights, in place, a block of rows at a time.

    The sum is taken in float32, or float64 for a base in float64. A base in bfloat16 or float16 rounds it: changes
    below half a unit in the last place are lost. [`BaseChanges`] adds up several rounds without that loss.

    Args:
        model ([`~peft.PeftModel`]):
            The live model, with its adapters unmerged.
        base_change (`dict[str, LowRank]`):
            `Aggregator.base_change`.
        pairs (`Sequence[FactorPair]`):
            [`factor_pairs`] of the model.
        originals (`dict[str, torch.Tensor]`, *optional*):
            By module the weight to add to; the present base weight if not given.

    Raises:
        ValueError: If a module cannot take an addition.
    """
    by_module = {pair.module: pair for pair in pairs}
    check_foldable([by_module[module] for module in base_change], "base_change")
    base: Any = model.get_base_model()
    for module, (left, right) in base_change.items():
        weight = base.get_submodule(module).get_base_layer().weight
        source = weight if originals is None else originals[module]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left, right = (factor.to(weight.device, dtype) for factor in (left, right))
        if by_module[module].transposed:
            left, right = right.T, left.T
        size = max(1, BLOCK // weight.shape[1])
        with full_precision(weight.device):
            for first in range(0, len(weight), size):
                rows = slice(first, first + size)
                start = source[rows].to(weight.device, dtype)
                weight[rows] = torch.addmm(start, left[rows], right).to(weight.dtype)
