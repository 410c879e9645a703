# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .base import LocalObjective, check_positive


__all__ = ["FedProx"]


class FedProx(LocalObjective):
    """
    FedProx (Li et al., 2018, https://huggingface.co/papers/1812.06127): adds the gradient `mu (v - w)` of `mu / 2 ||v - w||^2`, with
    `w` the `start` of `begin`.

    Where the parameters themselves begin does not matter. So the personal adapter `v` of Ditto (Li et al., 2020,
    https://huggingface.co/papers/2012.04221) is a local round of its own that starts from the client's `v`, after
    `begin(w, None)` with the global adapter `w` the client was sent; `mu` is its `lambda`.

    Args:
        mu (`float`):
            Weight of the proximal term.
    """

    def __init__(self, mu: float) -> None:
        super().__init__()
        check_positive("mu", mu)
        self.mu = mu

    def _constants_of(self, key: str) -> tuple[torch.Tensor, ...]:
        return (self._start[key],)

    def _gradient(self, value: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        (start,) = constants
        return self.mu * (value - start)
