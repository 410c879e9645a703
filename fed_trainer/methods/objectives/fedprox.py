# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .base import LocalObjective, check_positive


__all__ = ["Ditto", "FedProx"]


class FedProx(LocalObjective):
    """
    FedProx (Li et al., 2018, https://huggingface.co/papers/1812.06127): adds the gradient `mu (v - w)` of
    `mu / 2 ||v - w||^2`, with `w` the `start` of `begin`.

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


class Ditto(FedProx):
    """
    Ditto (Li et al., 2020, https://huggingface.co/papers/2012.04221): beside its part in the federation, which
    nothing is added to, every client trains a model `v` of its own for the same number of steps, with the gradient
    `mu (v - w)` towards the global `w` it was sent. `v` stays with the client and is what is evaluated.

    Args:
        mu (`float`):
            Weight of the proximal term, `lambda` of the paper.
    """

    is_personal = True
    follows_factors = True
