# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import nn

from ..access import is_at_hand
from .layer import FederaLayer


__all__ = ["Linear"]


class Linear(FederaLayer, lora.Linear):
    """FeDeRA on `nn.Linear`, transformers' `Conv1D`, and the quantised linear layers that PEFT supports."""

    is_target_conv_1d_layer = False

    def trained_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        reduce: Any = self.lora_A[name]
        expand: Any = self.lora_B[name]
        return reduce.weight, expand.weight

    def _is_plain(self, name: str) -> bool:
        has_dropout = self.training and isinstance(self.lora_dropout[name], nn.Dropout)
        return not has_dropout and is_at_hand(self.lora_A[name]) and is_at_hand(self.lora_B[name])

    def _trained(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))

    def _reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, factor)

    def _expand(self, code: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(code, factor)
