# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from ..adapter_state import AdapterState
from .base import ClientUpdate


__all__ = ["FedAvg"]


class FedAvg:
    """
    Mean of the client deltas weighted by numbers of examples (McMahan et al., 2017, https://huggingface.co/papers/1602.05629,
    algorithm 1): `Delta = sum_k n_k Delta_k / sum_k n_k`, per tensor.

    For LoRA this is FedIT: the factors are averaged one by one, and their product is not the mean of the products.
    """

    def begin(self, state: AdapterState) -> None:
        self._sum = {key: torch.zeros_like(tensor, dtype=torch.float32) for key, tensor in state.items()}
        self._num_examples = 0

    def add(self, update: ClientUpdate) -> None:
        for key, total in self._sum.items():
            total.add_(update.delta[key], alpha=update.num_examples)
        self._num_examples += update.num_examples

    def finish(self) -> AdapterState:
        if self._num_examples == 0:
            raise ValueError("No client update with examples arrived in this round, so there is nothing to average.")
        return {key: total.div_(self._num_examples) for key, total in self._sum.items()}
