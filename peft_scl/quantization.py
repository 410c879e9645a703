# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Keeping and restoring the quantised weight of a layer, which PEFT's quantisation backends do by quantising anew."""

import copy
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn


__all__ = ["MERGEABLE_BACKENDS", "check_readable", "dense", "frozen_copy", "put_back"]


# By `QuantizationBackend.backend_name`. PEFT merges into HQQ as well, by replacing the base layer; that is untested
# here.
MERGEABLE_BACKENDS = ("bnb 4bit", "bnb 8bit", "torchao")


def frozen_copy(layer: Any) -> torch.Tensor:
    """
    The quantised weight of `layer` with all that is needed to read it, without copying the data.

    Args:
        layer (`nn.Module`):
            `bitsandbytes.nn.Linear4bit`, `bitsandbytes.nn.Linear8bitLt`, or a layer with a torchao weight.

    Returns:
        `torch.Tensor`: A parameter that later changes of the layer's own one do not reach.
    """
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return copy.copy(weight)  # PEFT clears a flag of the parameter that it quantises anew
    if kind == "Int8Params":
        # the first forward moves the scales from the parameter to the layer
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return type(weight)(
            weight.data, requires_grad=False, has_fp16_weights=weight.has_fp16_weights, CB=weight.data, SCB=scales
        )
    return weight


def dense(weight: Any) -> torch.Tensor:
    """The values of a `frozen_copy`, a floating tensor `(out_features, in_features)`."""
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_bnb_weight(weight, state=weight)
    return weight.dequantize()


def put_back(layer: Any, weight: Any) -> None:
    """Make a `frozen_copy` the weight of `layer` again, on the device where the layer is now."""
    moved = weight.to(layer.weight.device)
    layer.weight = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
    if type(weight).__name__ == "Params4bit":
        layer.quant_state = moved.quant_state
    elif type(weight).__name__ == "Int8Params":
        layer.state.reset_grads()  # the next forward takes data and scales from the parameter


def check_readable(layer: Any) -> None:
    """
    Raise if the weight of `layer` cannot be dequantised.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit layer in its first inference. Other code, PEFT's among it,
    reads wrong values from that layout, and bitsandbytes' own way back (0.50) loses the scales.
    """
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise RuntimeError(
            "bitsandbytes has repacked a 4-bit layer for inference on this CPU, and its weight can no longer be read. "
            "Load the model anew, and merge or add the adapter before the first forward pass in eval mode."
        )
