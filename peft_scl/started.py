# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The two maps of a low-rank delta that starts where FeDeRA does, as `(B0 + B) (A0 + A) - B0 A0`."""

import torch
from torch import nn


__all__ = ["StartedLinear"]


class StartedLinear(nn.Module):
    """
    One factor of `(B0 + B) (A0 + A) - B0 A0 = [B, B0] [A0 + A; A]`, a product of twice the rank.

    Stands for a linear layer without bias and of the `weight` `[A0 + A; A]` or `[B, B0]`; trained is the change `A` or
    `B`, while the start `A0` or `B0` is constant and saved with it.

    Args:
        in_features (`int`):
            Input size of `A` or `B`.
        out_features (`int`):
            Output size of `A` or `B`.
        reads (`bool`):
            Whether this is `A`.
    """

    bias = None

    def __init__(self, in_features: int, out_features: int, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.in_features, self.out_features = (
            (in_features, 2 * out_features) if reads else (2 * in_features, out_features)
        )
        self.change = nn.Parameter(torch.zeros(out_features, in_features))
        self.start: torch.Tensor
        self.register_buffer("start", torch.zeros(out_features, in_features))

    @property
    def weight(self) -> torch.Tensor:
        """`[A0 + A; A]` or `[B, B0]`: without cancellation, and a product that is exactly zero at the start."""
        if self.reads:
            return torch.cat([self.start + self.change, self.change])
        return torch.cat([self.change, self.start], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)
