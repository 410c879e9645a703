# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from ...state.adapter_state import AdapterState
from .base import LocalObjective, check_positive


__all__ = ["FedDynRegularizer"]


class FedDynRegularizer(LocalObjective):
    """
    The clients' half of FedDyn (Acar et al., 2021, https://huggingface.co/papers/2111.04263): adds the gradient
    `- h_k + alpha (v - w)`, then `h_k <- h_k - alpha Delta_k`, from `h_k = 0`. The server's half is
    [`~fed_trainer.methods.server_optimizers.FedDyn`].

    Args:
        alpha (`float`):
            Weight of the regulariser, the same on the server.
    """

    keeps_client_state = True
    uniform = True

    def __init__(self, alpha: float) -> None:
        super().__init__()
        check_positive("alpha", alpha)
        self.alpha = alpha

    def _constants_of(self, key: str) -> tuple[torch.Tensor, ...]:
        return self._start[key], self._remembered(key)

    def _gradient(self, value: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        start, correction = constants
        return self.alpha * (value - start) - correction

    def finish(self, delta: AdapterState) -> AdapterState:
        trained = {key: self._remembered(key) - self.alpha * delta[key].float() for key in self._constants}
        return self._client_state | trained
