# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapter_state import AdapterState
from ..options import check_integer, check_number
from .base import ClientUpdate
from .factors import FactorAggregator, FactorPair, check_foldable, refuse_other_ranks
from .fedavg import FedAvg
from .low_rank import LowRank, LowRankSum, truncate


__all__ = ["FedExLoRA", "LoRAFair"]


class MeanOfFactors(FactorAggregator):
    """
    Means of the factors, and what the product of the means lacks: `sum_k p_k B_k A_k - B A = sum_k p_k (B_k - R_B)(A_k - R_A) -
    (B - R_B)(A - R_A)`, for any constants `R`. With the first client as `R` its own term is zero: `K` clients need `K r` columns,
    one client or equal ones leave exactly nothing, and no large products cancel. A constant start of the factors drops out.
    """

    aggregation = ""

    def __init__(self, pairs: Sequence[FactorPair], max_columns: int | None = None, partial: bool = False) -> None:
        super().__init__(pairs, partial)
        check_integer("max_columns", max_columns, least=1, optional=True)
        self.max_columns = max_columns
        self._means = FedAvg(partial)

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        self._means.begin({key: state[key] for pair in self.pairs for key in (pair.key_A, pair.key_B)}, round)
        self._references: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: dict[str, LowRankSum] = {}

    def add(self, update: ClientUpdate) -> None:
        super().add(update)
        self._means.add(update)

    def _check_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        super()._check_pair(pair, update)
        refuse_other_ranks(pair, update, self._state, self.aggregation)

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        A, B = update.delta[pair.key_A].float(), update.delta[pair.key_B].float()
        if pair.module not in self._references:
            self._references[pair.module] = A.clone(), B.clone()
            self._sums[pair.module] = LowRankSum(self.max_columns)
            return
        reference_A, reference_B = self._references[pair.module]
        self._sums[pair.module].add((B - reference_B) * update.num_examples, A - reference_A)

    def _lacking(self, pair: FactorPair, means: AdapterState) -> LowRank | None:
        """`sum_k p_k B_k A_k - B A`, without the scaling; `None` if only one client has the pair."""
        total = self._sums.pop(pair.module)  # no longer needed, and as large as what the clients sent
        if total.num_columns == 0:
            return None
        left, right = total.product(1 / self._weights[pair.module])
        reference_A, reference_B = self._references[pair.module]
        mean_A, mean_B = means[pair.key_A] - reference_A, means[pair.key_B] - reference_B
        return LowRank(torch.cat([left, -mean_B], dim=1), torch.cat([right, mean_A]))


class FedExLoRA(MeanOfFactors):
    """
    Means of the factors, and the residual `s (sum_k p_k B_k A_k - B A)` added to the base weight, so that the model has the mean
    of the products (FedEx-LoRA, https://huggingface.co/papers/2410.09432).

    The residual comes out in factors ([`FedExLoRA.base_change`]) oriented `(out, in)`, whatever the layout of the base weight.

    Memory: the factors of all clients, or a number of columns bounded by `max_columns` (see [`LowRankSum`]).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter. All clients have their ranks and scalings.
        max_rank (`int`, *optional*):
            Send the best approximation of this rank instead of the exact residual.
        max_columns (`int`, *optional*):
            Columns to cut back to, while clients arrive, whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
    """

    aggregation = "fedex_lora"

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        max_rank: int | None = None,
        max_columns: int | None = None,
        partial: bool = False,
    ) -> None:
        check_foldable(pairs, self.aggregation)
        super().__init__(pairs, max_columns, partial)
        check_integer("max_rank", max_rank, least=1, optional=True)
        self.max_rank = max_rank

    def finish(self) -> AdapterState:
        delta, means = self._finish_others(), self._means._mean()
        for pair in self._trained_pairs():
            residual = self._lacking(pair, means)
            if residual is None:
                continue
            residual = LowRank(residual.left * pair.scaling, residual.right)
            if self.max_rank is not None:
                residual, _ = truncate(residual, self.max_rank)
            self._base_change[pair.module] = residual
        return delta | means


class LoRAFair(MeanOfFactors):
    """
    Means of the factors, and a correction of `B` towards the mean of the products (LoRA-FAIR,
    https://huggingface.co/papers/2411.14961). Where the paper descends on a similarity, this is the closed form of its ridge
    version, `min_dB ||sum_k p_k B_k A_k - (B + dB) A||^2 + ridge ||dB||^2`:
    `dB = (sum_k p_k B_k A_k - B A) A^T (A A^T + ridge I)^-1`, solved in float64. What lies outside the rows of `A` stays lost.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter. All clients have their ranks and scalings.
        ridge (`float`, *optional*, defaults to `0.01`):
            Weight of the penalty, positive, on the scale of the eigenvalues of `A A^T`.
        max_columns (`int`, *optional*):
            Columns to cut back to, while clients arrive, whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
    """

    aggregation = "lora_fair"

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        ridge: float = 0.01,
        max_columns: int | None = None,
        partial: bool = False,
    ) -> None:
        check_number("ridge", ridge, lambda value: value > 0, "positive and finite")
        super().__init__(pairs, max_columns, partial)
        self.ridge = ridge

    def finish(self) -> AdapterState:
        delta, means = self._finish_others(), self._means._mean()
        for pair in self._trained_pairs():
            lacking = self._lacking(pair, means)
            if lacking is None:
                continue
            mean_A = self._state[pair.key_A] + means[pair.key_A]
            A, _ = pair.whole(mean_A, self._state[pair.key_B])
            means[pair.key_B] += ridge_correction(lacking, A, self.ridge)
        return delta | means


def ridge_correction(lacking: LowRank, A: torch.Tensor, ridge: float) -> torch.Tensor:
    """`lacking A^T (A A^T + ridge I)^-1`, `(out, r)`, solved in float64 without forming `lacking`."""
    left, right, A = lacking.left.double(), lacking.right.double(), A.double()
    gram = A @ A.T + ridge * torch.eye(len(A), dtype=torch.float64)
    return torch.linalg.solve(gram, left @ (right @ A.T), left=False).float()
