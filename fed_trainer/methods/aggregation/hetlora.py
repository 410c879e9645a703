# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from ...state.adapter_state import AdapterState
from ...state.checks import check_number
from ...state.factors import FactorPair
from ...state.low_rank import product_norm
from .base import WEIGHTS, ClientUpdate, check_weights
from .factors import FactorAggregator


__all__ = ["HetLoRA", "pruned_rank", "pruning_penalty"]


class HetLoRA(FactorAggregator):
    """
    Clients of different ranks by truncation and zero-padding (HetLoRA, https://huggingface.co/papers/2401.06432): a
    client of rank `r_k` gets the first `r_k` rows of `A` and columns of `B` ([`truncate_ranks`]), the server pads
    what it ends with by zeros and averages factor by factor, with weights `||dW_k||_F / sum_j ||dW_j||_F`. The
    norms of the products `dW_k = s_k B_k A_k` come from `(r_k, r_k)` Grams. We take one weight per client, over all
    its modules, for all its tensors; the paper leaves that open.

    It is the clients' *adapters* that are padded, not their deltas: the sum starts from zero, not from the old
    global adapter, so a direction that no client *of the round* has is gone for good, also for clients that were not
    sampled (both factors are zero there, so it has no gradient): sample a client of the largest rank in every round.
    Factors are averaged one by one, so the result is not the mean of the products; `flora` and `flexlora` are exact.

    Streaming: memory does not depend on the number of clients.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter; its ranks are the largest of the clients'.
        weighting (`str`, *optional*, defaults to `"norm"`):
            `"norm"` as above, or one of the `weights` of [`FedAvg`], which is then FedAvg with zero-padding.
    """

    def __init__(self, pairs: Sequence[FactorPair], weighting: str = "norm") -> None:
        check_weights(weighting, "weighting", ("norm", *WEIGHTS))
        super().__init__(pairs, weights="uniform" if weighting == "norm" else weighting)
        self.weighting = weighting

    @classmethod
    def check_ranks(cls, ranks: Collection[int], largest: int) -> None:
        if max(ranks) < largest:
            raise ValueError(
                f"The PEFT config has the rank {largest}, but the largest of `client_settings` is {max(ranks)}: in "
                f"'hetlora' the directions that no client has become zero for good. Set `r={max(ranks)}` in the "
                "PEFT config."
            )

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        self._sums = {
            key: torch.zeros_like(state[key], dtype=torch.float32) for p in self.pairs for key in (p.key_A, p.key_B)
        }
        self._total = 0.0

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> None:
        self._checked(update)
        if update.num_examples == 0:
            return
        local = [self._local(pair, update) for pair in self.pairs]
        weight = float(self._weight(update))
        if self.weighting == "norm":
            weight = math.hypot(
                *(s * product_norm(*pair.change(A, B)) for pair, (A, B, s) in zip(self.pairs, local, strict=True))
            )
        for pair, (A, B, scaling) in zip(self.pairs, local, strict=True):
            self._sums[pair.key_A][: len(A)].add_(A, alpha=weight)
            self._sums[pair.key_B][:, : len(A)].add_(B, alpha=weight * scaling / pair.scaling)
        self._others._add(update, weight)
        self._total += weight

    def finish(self) -> AdapterState:
        delta = self._others._mean()
        if self._total == 0:
            raise ValueError(
                "No client update with examples and a product that is not zero arrived in this round, so there is "
                "nothing to weight by. Check that the clients train, or use `weighting='examples'`."
            )
        for pair in self.pairs:
            A, B = (self._sums[key].div_(self._total) for key in (pair.key_A, pair.key_B))
            A, B = pair.stored(A, B)
            delta[pair.key_A], delta[pair.key_B] = A - self._state[pair.key_A], B - self._state[pair.key_B]
        return delta


def pruning_penalty(A: torch.Tensor, B: torch.Tensor, decay: float, rank: int | None = None) -> torch.Tensor:
    """
    What HetLoRA adds to a client's loss (times its `lambda`) so that directions it does not need can be pruned:
    `||B[:, d:r]||_F ||A[d:r]||_F` with `d = floor(decay r)`. Differentiable, with gradient zero where a norm is zero.

    Args:
        A, B (`torch.Tensor`):
            The factors, `(R, in)` and `(out, R)`.
        decay (`float`):
            `gamma` of the paper, between 0 and 1.
        rank (`int`, *optional*):
            The client's rank `r`: the first directions are the client's. `R` if not given.
    """
    rank = len(A) if rank is None else rank
    cut = slice(_kept_rank(rank, decay), rank)
    return B[:, cut].norm() * A[cut].norm()


def pruned_rank(penalty_before: float, penalty_after: float, rank: int, decay: float) -> int:
    """
    The client's rank for its next round: `floor(decay rank)` (at least 1) if the local round has shrunk
    [`pruning_penalty`], else unchanged.
    """
    return _kept_rank(rank, decay) if penalty_after < penalty_before else rank


def _kept_rank(rank: int, decay: float) -> int:
    check_number("decay", decay, lambda value: 0 < value < 1, "between 0 and 1")
    return max(1, math.floor(decay * rank + 1e-9))  # 0.58 * 50 is 28.999999999999996
