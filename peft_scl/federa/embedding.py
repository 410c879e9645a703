# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from peft.tuners.lora import layer as lora

from .layer import FederaLayer


__all__ = ["Embedding"]


class Embedding(FederaLayer, lora.Embedding):
    """FeDeRA on `nn.Embedding`, whose weight is `W^T`; no dropout, as in LoRA."""

    tp_layer = None  # of LoRA's tensor parallelism, which FeDeRA refuses

    def trained_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _cast_input_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        return x  # token indices

    def _contribution(self, name: str, x: torch.Tensor, is_active: bool) -> torch.Tensor:
        output = super()._contribution(name, x, is_active)
        scale = self._get_embed_scale()  # of layers that scale in their forward
        return output if scale is None else output * scale.to(output.dtype)

    def _is_plain(self, name: str) -> bool:
        return True

    def _trained(self, name: str, x: torch.Tensor) -> torch.Tensor:
        trained_A, trained_B = self.trained_factors(name)
        return self._expand(self._reduce(x, trained_A), trained_B)

    def _reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self._embed(x, factor.T)

    def _expand(self, code: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return code @ factor.T
