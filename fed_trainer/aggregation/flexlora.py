# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapter_state import AdapterState
from .base import ClientUpdate
from .factors import FactorAggregator, FactorPair
from .low_rank import LowRank, LowRankSum, product_svd


__all__ = ["FlexLoRA"]


class FlexLoRA(FactorAggregator):
    """
    Mean of the products, redistributed by its singular value decomposition (FlexLoRA,
    https://huggingface.co/papers/2402.11505): `dW = sum_k p_k s_k B_k A_k`, `s B A` = its best approximation of the global rank.
    `dW` is never formed: QR of both stacked factors, SVD of the core, in float64.

    The directions are in the order of their singular values, so a client of rank `r_k` gets the best approximation of *its*
    rank by [`truncate_ranks`]. The singular values are shared evenly by `A` and `B`. Directions that `dW` does not have keep
    their `A` and start with `B = 0`; with both zero they could not be trained.

    For FeDeRA and SCL with a kept residual, the whole products are averaged and approximated: their constant start drops out of
    the difference.

    Memory: the factors of all clients, or a number of columns bounded by `max_columns` (see [`LowRankSum`]).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter; its ranks are the largest of the clients'.
        max_columns (`int`, *optional*):
            Columns to cut back to, while clients arrive, whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
    """

    def __init__(self, pairs: Sequence[FactorPair], max_columns: int | None = None, partial: bool = False) -> None:
        super().__init__(pairs, partial)
        self.max_columns = max_columns

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        self._sums = {pair.module: LowRankSum(self.max_columns) for pair in self.pairs}

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        A, B, scaling = self._local(pair, update)
        self._sums[pair.module].add(B * (update.num_examples * scaling), A)

    def finish(self) -> AdapterState:
        delta = self._finish_others()
        for pair in self.pairs:
            A, B = (self._state[key].float() for key in (pair.key_A, pair.key_B))
            if self._weights[pair.module] == 0:  # nobody trained it
                delta[pair.key_A], delta[pair.key_B] = torch.zeros_like(A), torch.zeros_like(B)
                continue
            product = self._sums[pair.module].product(1 / (self._weights[pair.module] * pair.scaling))
            whole_A, whole_B = pair.whole(A, B)
            new_A, new_B = pair.stored(*principal_factors(product, whole_A, whole_B))
            delta[pair.key_A], delta[pair.key_B] = new_A - A, new_B - B
        return delta


def principal_factors(product: LowRank, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors `(r, in)`, `(out, r)` of the best rank-`r` approximation of `product`; rows of `A` and zeros where its rank is less.
    """
    u, values, vt = product_svd(*product)
    rank = int((values[: len(A)] > 1e-7 * values[0]).sum())  # the resolution of float32
    root = values[:rank].sqrt()
    new_A, new_B = A.clone(), torch.zeros_like(B)
    new_A[:rank] = root[:, None] * vt[:rank]
    new_B[:, :rank] = u[:, :rank] * root
    return new_A, new_B
