# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised base models between evaluations."""

from __future__ import annotations

from typing import Any

from torch import nn


__all__ = ["keep_differentiable"]


def keep_differentiable(base: nn.Module) -> None:
    """
    Let a 4-bit base of bitsandbytes be trained on after an evaluation.

    On CPUs with AVX512-BF16 the first evaluation repacks the weights for a kernel that has no gradient. Later training uses that
    kernel too and, but for a warning, loses the gradients of all layers below.

    Args:
        base (`nn.Module`):
            The model without adapters; nothing happens if it is not of 4 bits.

    Raises:
        ValueError: If it has been evaluated already, so that its weights are repacked.
    """
    if not getattr(base, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit  # an extra

    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of {name} have been repacked for inference by an evaluation on the CPU, so no gradient would "
                    "pass through them. Load the base model anew, and leave the first evaluation to the trainer."
                )
            module.support_avx512bf16_for_cpu = False
