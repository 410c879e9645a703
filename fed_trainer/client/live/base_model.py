# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised base models between evaluations."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_scl import FederaLayer
from peft_scl.linalg import evenly_spaced


__all__ = ["base_digest", "keep_differentiable"]


def keep_differentiable(base: nn.Module) -> None:
    """
    Let a 4-bit base of bitsandbytes be trained on after an evaluation.

    On CPUs with AVX512-BF16 the first evaluation repacks the weights for a kernel that has no gradient. Later
    training uses that kernel too and, but for a warning, loses the gradients of all layers below.

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
                    f"The 4-bit weights of {name} have been repacked for inference by an evaluation on the CPU, so "
                    "no gradient would pass through them. Load the base model anew, and leave the first evaluation "
                    "to the trainer."
                )
            module.support_avx512bf16_for_cpu = False


def base_digest(model: PeftModel) -> str | None:
    """
    SHA-256 over names, shapes and a sample of the base weights, to tell whether two runs hold the same base model.

    64 evenly spaced values of every tensor are rounded to bfloat16 first, so that loading the same checkpoint in
    float32 or bfloat16 gives the same digest. It detects another checkpoint, not a manipulated one. A base that
    holds the residual of a FeDeRA adapter counts as what it was before. A module in `modules_to_save` does not
    count: its copy is part of the adapter, and the original, such as the random head of a classifier, is not used.

    Returns:
        `str` or `None`: The digest, or `None` for a quantised base, whose stored values are not the checkpoint's.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        return None
    digest = hashlib.sha256()
    residuals = {
        id(module.get_base_layer().weight): module.original_sample
        for module in base.modules()
        if isinstance(module, FederaLayer) and module.original_sample is not None
    }
    for name, parameter in sorted(_base_parameters(base).items()):
        with gather_params_ctx(parameter, modifier_rank=None):
            sample = residuals[id(parameter)] if id(parameter) in residuals else evenly_spaced(parameter)
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the pretrained model under the names they have without adapters, each once."""
    modules: list[tuple[str, nn.Module]] = list(base.named_modules(remove_duplicate=False))
    added = tuple(
        f"{name}.{child}."
        for name, module in modules
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for child, _ in module.named_children()
        if child not in ("base_layer", "token_adapter")  # of these the children are judged
    )
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.startswith(added):
            parameters.setdefault(id(parameter), (name, parameter))
    return {
        re.sub(r"\.(base_layer|token_adapter)(?=\.)", "", name): parameter for name, parameter in parameters.values()
    }
