# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from ...state.adapter_state import AdapterState
from ...state.checks import check_flag, check_number
from .base import Aggregator, ClientUpdate, check_tensors, check_weights, numbers_of, weight_of


__all__ = ["FedAvg", "FedNova"]


class FedAvg(Aggregator):
    """
    Mean of the client deltas weighted by numbers of examples (McMahan et al., 2017,
    https://huggingface.co/papers/1602.05629, algorithm 1): `Delta = sum_k n_k Delta_k / sum_k n_k`, per tensor, summed
    in float32. Other weights `n_k` by `weights`.

    For LoRA this is FedIT: the factors are averaged one by one, and their product is not the mean of the products.
    Where all clients hold the same frozen factor (FFA-LoRA, RoLoRA) it is.

    Args:
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack tensors, as one that trains a subset of the layers does. The mean of a tensor
            is then over the clients that sent it; one that nobody sent stays as it is.
        weights (`str`, *optional*, defaults to `"examples"`):
            What `n_k` is: `"examples"`, `"tokens"` (those that carry a loss), or `"uniform"`: all clients alike, as in
            SCAFFOLD and FedDyn.
    """

    _sum: AdapterState | None = None

    def __init__(self, partial: bool = False, weights: str = "examples") -> None:
        check_flag("partial", partial)
        check_weights(weights)
        self.partial = partial
        self.weights = weights

    def begin(self, state: AdapterState, round: int = 1) -> None:
        self._sum = {key: torch.zeros_like(tensor, dtype=torch.float32) for key, tensor in state.items()}
        self._weights = dict.fromkeys(state, 0.0)

    @property
    def numbers(self) -> tuple[str, ...]:
        return numbers_of(self.weights)

    def check(self, update: ClientUpdate) -> None:
        self._check(update)
        weight_of(update, self.weights)  # refuses one that does not say it

    def add(self, update: ClientUpdate) -> None:
        self._add(update, weight_of(update, self.weights))

    def finish(self) -> AdapterState:
        self._open_sum()
        if not any(self._weights.values()):
            raise ValueError("No client update with examples arrived in this round, so there is nothing to average.")
        return self._mean()

    def _mean(self) -> AdapterState:
        """Ends the round: the sums become the means in place."""
        total, self._sum = self._open_sum(), None
        return {key: tensor.div_(self._weights[key] or 1.0) for key, tensor in total.items()}

    def _check(self, update: ClientUpdate) -> None:
        check_tensors(update, self._open_sum(), self.partial)

    @torch.no_grad()
    def _add(self, update: ClientUpdate, weight: float, factor: float = 1.0) -> None:
        """Add `factor` times the update with the weight `weight`."""
        self._check(update)
        for key, total in self._open_sum().items():
            if key in update.delta:
                total.add_(update.delta[key], alpha=weight * factor)
                self._weights[key] += weight

    def _open_sum(self) -> AdapterState:
        if self._sum is None:
            raise RuntimeError(
                "No round is open: `finish` ends a round, and its result has been handed out. Call `begin` before "
                "the updates of every round."
            )
        return self._sum


class FedNova(FedAvg):
    """
    Normalised averaging for clients that take different numbers of local steps (FedNova, Wang et al., 2020,
    https://huggingface.co/papers/2007.07481): `Delta = (sum_k p_k a_k) sum_k p_k Delta_k / a_k`, with `a_k` the
    number of local steps `tau_k` for plain SGD, and `(tau_k - m (1 - m^tau_k) / (1 - m)) / (1 - m)` for SGD with
    momentum `m`.

    A client that steps more often no longer pulls the mean towards its own optimum. The normalisation is derived
    for SGD; for an adaptive local optimiser it is a heuristic, since an update of Adam does not grow in proportion
    to such an `a_k`.

    Args:
        momentum (`float`, *optional*, defaults to `0.0`):
            Momentum of the local SGD.
        partial (`bool`, *optional*, defaults to `False`):
            As in [`FedAvg`]; both sums then are over the clients that sent the tensor.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`]: `p_k` is the client's share of them.
    """

    @classmethod
    def options_from(cls, args: Any) -> dict[str, Any]:
        """The momentum of the local SGD, which the normalisation follows."""
        pairs = (entry.split("=") for entry in (args.optim_args or "").replace(" ", "").split(",") if entry)
        used = float(dict(pairs).get("momentum", 0)) if args.optim == OptimizerNames.SGD else 0.0
        told = (args.aggregation_kwargs or {}).get("momentum", used)
        if told != used:
            raise ValueError(
                f"`aggregation_kwargs` gives 'fednova' the momentum {told}, but that of the local optimiser is {used} "
                f"(`optim={args.optim!s}`, `optim_args={args.optim_args!r}`). Leave it out: it is read from there."
            )
        return {"momentum": used}

    def __init__(self, momentum: float = 0.0, partial: bool = False, weights: str = "examples") -> None:
        check_number("momentum", momentum, lambda value: 0 <= value < 1, "in [0, 1)")
        super().__init__(partial, weights)
        self.momentum = momentum

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        self._weighted_steps = dict.fromkeys(state, 0.0)

    @property
    def numbers(self) -> tuple[str, ...]:
        return *numbers_of(self.weights), "num_steps"

    def check(self, update: ClientUpdate) -> None:
        super().check(update)
        if update.num_steps is None or update.num_steps < 1:
            raise ValueError(
                f"FedNova divides an update by its number of local steps, but client {update.client!r} reports "
                f"`num_steps={update.num_steps}`. Fill it in where the update is made."
            )

    def add(self, update: ClientUpdate) -> None:
        self.check(update)
        assert update.num_steps is not None
        steps = effective_steps(update.num_steps, self.momentum)
        weight = weight_of(update, self.weights)
        self._add(update, weight, 1 / steps)
        for key in self._weighted_steps.keys() & update.delta.keys():
            self._weighted_steps[key] += weight * steps

    def finish(self) -> AdapterState:
        mean = super().finish()
        return {
            key: tensor.mul_(self._weighted_steps[key] / (self._weights[key] or 1.0)) for key, tensor in mean.items()
        }


def effective_steps(num_steps: int, momentum: float) -> float:
    """`||a_k||_1` of FedNova: the total weight that `num_steps` gradients have in the update of SGD with momentum."""
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)
