# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What both sides know of a live model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...federation.plan import ModelFacts
from ...methods.aggregation import METHODS
from ...state.factors import FactorPair, check_foldable
from .adapter import LiveAdapter
from .pairs import factor_pairs
from .state import LiveState


__all__ = ["check_adapter", "model_facts"]


def model_facts(aggregation: str, model: nn.Module, live: LiveState, base_digest: str | None) -> ModelFacts:
    """
    The facts of a model, after refusing one that the method does not fit.

    Args:
        aggregation (`str`):
            Name of the method.
        model (`nn.Module`):
            The live model, before its first round.
        live ([`LiveState`]):
            Its tensors.
        base_digest (`str`, *optional*):
            Digest of the base model.

    Raises:
        ValueError: Naming the first layer or tensor that does not fit, and why.
    """
    pairs = check_adapter(aggregation, model)
    return ModelFacts(pairs, live.buffers, _base_dtypes(model, pairs), base_digest)


def check_adapter(aggregation: str, model: nn.Module) -> list[FactorPair]:
    """
    The factor pairs a method works on, after refusing adapters it does not fit.

    Returns:
        `list[FactorPair]`: For [`Method.build`]; empty for methods that take any adapter.

    Raises:
        ValueError: Naming the first layer or tensor that does not fit, and why.
    """
    method = METHODS[aggregation]
    if not isinstance(model, PeftModel):
        if method.uses_pairs or method.needs_factors:
            raise ValueError(
                f"`aggregation={aggregation!r}` is about the two factors of adapters, but a {type(model).__name__} "
                "without an adapter was given. Give a `peft_config` of a LoRA or an SCL adapter, or use 'fedavg'."
            )
        return []
    if method.check is not None:
        method.check(LiveAdapter(model).read(include_frozen=True))
    if not method.uses_pairs and not method.needs_pairs:
        return []
    pairs = factor_pairs(model)
    if method.adds_to_base:
        check_foldable(pairs, aggregation)
    return pairs


def _base_dtypes(model: nn.Module, pairs: Sequence[FactorPair]) -> dict[str, tuple[torch.dtype, ...]]:
    """By module the dtype of its base weight, if it is one of floating-point numbers."""
    if not isinstance(model, PeftModel):
        return {}
    base: Any = model.get_base_model()
    dtypes = {pair.module: base.get_submodule(pair.module).get_base_layer().weight.dtype for pair in pairs}
    return {module: (dtype,) for module, dtype in dtypes.items() if dtype.is_floating_point}
