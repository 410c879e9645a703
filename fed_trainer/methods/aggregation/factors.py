# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tensors of an adapter are the two factors of a product, and what their product does to the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...state.adapter_state import AdapterState
from ...state.factors import FactorPair, refuse_start, rescaled
from ...state.low_rank import LowRank
from .base import Aggregator, ClientUpdate, numbers_of, weight_of
from .fedavg import FedAvg
from .limits import LARGEST_FACTOR, ROOM


__all__ = ["FactorAggregator"]


class FactorAggregator(Aggregator):
    """
    What the rules for products of factors have in common: the weighted mean of every other tensor, and the
    client's factors.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules; the rule then is over the clients that have the module.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    def __init__(self, pairs: Sequence[FactorPair], partial: bool = False, weights: str = "examples") -> None:
        self.pairs = list(pairs)
        self.partial = partial
        self.weights = weights
        self._others = FedAvg(partial, weights)
        self._base_change: dict[str, LowRank] = {}

    def begin(self, state: AdapterState, round: int = 1) -> None:
        factors = {key for pair in self.pairs for key in (pair.key_A, pair.key_B)}
        missing = sorted(factors - state.keys())
        if missing:
            raise ValueError(
                f"The rule combines both factors of every pair, but {missing[0]} is not among the shared tensors. "
                "Share both."
            )
        self._state = state
        self._round = round
        self._weights = dict.fromkeys((pair.module for pair in self.pairs), 0.0)
        self._base_change = {}
        self._others.begin({key: tensor for key, tensor in state.items() if key not in factors}, round)

    @property
    def numbers(self) -> tuple[str, ...]:
        return numbers_of(self.weights)

    def check(self, update: ClientUpdate) -> None:
        self._checked(update)
        self._weight(update)  # refuses one that does not say it

    def largest_value(self, state: AdapterState) -> float:
        """Also small enough for products of factors, and for sums of them in float32."""
        return min(LARGEST_FACTOR, super().largest_value(state))

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> None:
        pairs = self._checked(update)
        self._others.add(update)
        for pair in pairs:
            self._add_pair(pair, update)
            self._weights[pair.module] += self._weight(update)

    def _weight(self, update: ClientUpdate) -> int:
        return weight_of(update, self.weights)

    def _checked(self, update: ClientUpdate) -> list[FactorPair]:
        """The pairs that the update has, after all of it has been checked."""
        self._others._check(update)
        sent = [
            pair for pair in self.pairs if not self.partial or pair.key_A in update.delta or pair.key_B in update.delta
        ]
        for pair in sent:
            self._check_pair(pair, update)
        return sent

    def _check_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        """Refuse factors that are not there, do not fit the global ones, or have no scaling."""
        for key in (pair.key_A, pair.key_B):
            if key not in update.delta:
                raise ValueError(
                    f"The update of client {update.client!r} lacks the tensor {key}, and the rule combines both "
                    "factors of a pair. Leave the client out of the round, or, if clients train different layers, "
                    "send both factors of those and aggregate with `partial=True`."
                )
        if update.scalings is not None and pair.module not in update.scalings:
            raise ValueError(
                f"The `scalings` of client {update.client!r} lack {pair.module}. Give the scaling of every module, "
                "or none if they are the server's."
            )
        if update.scalings is not None and not 1 / ROOM <= update.scalings[pair.module] / pair.scaling <= ROOM:
            raise ValueError(
                f"The scaling of {pair.module} at client {update.client!r} is {update.scalings[pair.module]!r}, "
                f"but the server's is {pair.scaling!r}: the factors would differ more in size than float32 can "
                "bear. Send `lora_alpha / r`."
            )
        delta_A, delta_B = update.delta[pair.key_A], update.delta[pair.key_B]
        A, B = self._state[pair.key_A], self._state[pair.key_B]
        rank = len(delta_A)
        if rank > len(A) or delta_A.shape[1:] != A.shape[1:] or delta_B.shape != (len(B), rank):
            raise ValueError(
                f"The factors of {pair.module} from client {update.client!r} have the shapes "
                f"{tuple(delta_A.shape)} and {tuple(delta_B.shape)}, which do not fit the global {tuple(A.shape)} "
                f"and {tuple(B.shape)}. The global rank must be the largest of the clients' ranks."
            )
        if rank != len(A) or self._scaling(pair, update) != pair.scaling:
            refuse_start(pair, "of another rank or scaling at a client")

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        raise NotImplementedError

    def _finish_others(self) -> AdapterState:
        others = self._others._mean()
        if not any(self._weights.values()) and not any(self._others._weights.values()):
            raise ValueError("No client update with examples arrived in this round, so there is nothing to aggregate.")
        return others

    @property
    def base_change(self) -> dict[str, LowRank]:
        return self._base_change

    def _local(self, pair: FactorPair, update: ClientUpdate) -> tuple[torch.Tensor, torch.Tensor, float]:
        """
        The whole factors `A (r_k, in)`, `B (out, r_k)` a client ended with, in float32, and its scaling. It started
        from [`truncate_ranks`] of the global adapter.
        """
        delta_A, delta_B = update.delta[pair.key_A], update.delta[pair.key_B]
        rank, scaling = len(delta_A), self._scaling(pair, update)
        start_A = self._state[pair.key_A][:rank]
        start_B = rescaled(self._state[pair.key_B][:, :rank], pair.scaling / scaling)
        return *pair.whole(start_A.float() + delta_A, start_B.float() + delta_B), scaling

    @staticmethod
    def _scaling(pair: FactorPair, update: ClientUpdate) -> float:
        return pair.scaling if update.scalings is None else update.scalings[pair.module]


def refuse_other_ranks(pair: FactorPair, update: ClientUpdate, state: AdapterState, aggregation: str) -> None:
    """Refuse a client whose factors are not of the global shape or scaling."""
    same = all(update.delta[key].shape == state[key].shape for key in (pair.key_A, pair.key_B))
    if not same or (update.scalings is not None and update.scalings[pair.module] != pair.scaling):
        raise ValueError(
            f"{aggregation!r} averages the factors themselves, so all clients must have one rank and scaling, but "
            f"client {update.client!r} differs in {pair.module}. Use 'flora', 'flexlora' or 'hetlora', or leave "
            "the client out."
        )
