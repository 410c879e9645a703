# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ...state.adapter_state import AdapterState
from ...state.checks import check_integer
from ...state.factors import FactorPair
from ...state.low_rank import LowRank, LowRankSum
from .base import ClientUpdate
from .factors import FactorAggregator


__all__ = ["MeanOfProducts"]


class MeanOfProducts(FactorAggregator):
    """
    What the rules for the mean of the products `sum_k p_k s_k B_k A_k` have in common: the clients' factors
    stacked, and new factors for every pair that some client trained.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        max_columns (`int`, *optional*):
            Columns to cut a stack back to whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        max_columns: int | None = None,
        partial: bool = False,
        weights: str = "examples",
    ) -> None:
        super().__init__(pairs, partial, weights)
        check_integer("max_columns", max_columns, least=1, optional=True)
        self.max_columns = max_columns

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        # by module `sum_k n_k s_k B_k A_k`
        self._sums = {pair.module: LowRankSum(self.max_columns) for pair in self.pairs}

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        A, B, scaling = self._local(pair, update)
        self._sums[pair.module].add(B * (self._weight(update) * scaling), A)

    def finish(self) -> AdapterState:
        delta = self._finish_others()
        for pair in self.pairs:
            A, B = (self._state[key].float() for key in (pair.key_A, pair.key_B))
            if self._weights[pair.module] == 0:  # nobody trained it
                delta[pair.key_A], delta[pair.key_B] = torch.zeros_like(A), torch.zeros_like(B)
                continue
            total = self._sums.pop(pair.module)  # no longer needed, and as large as what the clients sent
            new_A, new_B = self._new_factors(pair, total.product(1 / self._weights[pair.module]), A, B)
            delta[pair.key_A], delta[pair.key_B] = new_A - A, new_B - B
        return delta

    @abstractmethod
    def _new_factors(
        self, pair: FactorPair, mean: LowRank, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next stored factors of a pair whose present ones are `A` and `B`, from `sum_k p_k s_k B_k A_k`."""
