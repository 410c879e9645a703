# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ...state.adapter_state import AdapterState
from ...state.checks import check_integer, check_number
from ...state.factors import FactorPair, check_foldable
from ...state.low_rank import LowRank, LowRankSum, truncate
from .base import ClientUpdate
from .factors import FactorAggregator, refuse_other_ranks


__all__ = ["FedExLoRA", "LoRAFair"]


SOLVABLE = 1e-10  # the share of the ridge in a Gram that float64 solves to five digits at least


class MeanOfFactors(FactorAggregator):
    """
    Means of the factors, and what the product of the means lacks:
    `sum_k p_k B_k A_k - B A = sum_k p_k (B_k - R_B)(A_k - R_A) - (B - R_B)(A - R_A)`, for any constants `R`. With
    the first client as `R` its own term is zero: `K` clients need `K r` columns, one client or equal ones leave
    exactly nothing, and no large products cancel. A constant start of the factors drops out.
    """

    aggregation = ""

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
        # by module: `R`, `sum_k n_k (A_k - R_A)` and that of `B`, `sum_k n_k (B_k - R_B)(A_k - R_A)`
        self._references: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._offsets: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: dict[str, LowRankSum] = {}

    def _check_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        super()._check_pair(pair, update)
        refuse_other_ranks(pair, update, self._state, self.aggregation)

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        A, B = update.delta[pair.key_A].float(), update.delta[pair.key_B].float()
        if pair.module not in self._references:
            self._references[pair.module] = A.clone(), B.clone()
            self._offsets[pair.module] = torch.zeros_like(A), torch.zeros_like(B)
            self._sums[pair.module] = LowRankSum(self.max_columns)
            return
        (reference_A, reference_B), (total_A, total_B) = self._references[pair.module], self._offsets[pair.module]
        A, B = A - reference_A, B - reference_B
        weight = self._weight(update)
        total_A.add_(A, alpha=weight)
        total_B.add_(B, alpha=weight)
        self._sums[pair.module].add(B * weight, A)

    def finish(self) -> AdapterState:
        delta = self._finish_others()
        for pair in self.pairs:
            weight = self._weights[pair.module]
            if weight == 0:  # nobody trained it
                for key in (pair.key_A, pair.key_B):
                    delta[key] = torch.zeros_like(self._state[key], dtype=torch.float32)
                continue
            (reference_A, reference_B), (offset_A, offset_B) = (
                parts.pop(pair.module) for parts in (self._references, self._offsets)
            )
            total, offset_A, offset_B = self._sums.pop(pair.module), offset_A / weight, offset_B / weight
            lacking = None  # where only one client has the pair
            if total.num_columns > 0:
                left, right = total.product(1 / weight)
                lacking = LowRank(torch.cat([left, -offset_B], dim=1), torch.cat([right, offset_A]))
            mean_A, mean_B = reference_A + offset_A, reference_B + offset_B
            delta[pair.key_A], delta[pair.key_B] = self._corrected(pair, mean_A, mean_B, lacking)
        return delta

    @abstractmethod
    def _corrected(
        self, pair: FactorPair, mean_A: torch.Tensor, mean_B: torch.Tensor, lacking: LowRank | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The deltas of a pair, from their means and `sum_k p_k B_k A_k - B A` without the scaling."""


class FedExLoRA(MeanOfFactors):
    """
    Means of the factors, and the residual `s (sum_k p_k B_k A_k - B A)` added to the base weight, so that the model
    has the mean of the products (FedEx-LoRA, https://huggingface.co/papers/2410.09432).

    The residual comes out in factors ([`FedExLoRA.base_change`]) oriented `(out, in)`, whatever the layout of the
    base weight.

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
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    aggregation = "fedex_lora"

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        max_rank: int | None = None,
        max_columns: int | None = None,
        partial: bool = False,
        weights: str = "examples",
    ) -> None:
        check_foldable(pairs, self.aggregation)
        super().__init__(pairs, max_columns, partial, weights)
        check_integer("max_rank", max_rank, least=1, optional=True)
        self.max_rank = max_rank

    def _corrected(
        self, pair: FactorPair, mean_A: torch.Tensor, mean_B: torch.Tensor, lacking: LowRank | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if lacking is not None:
            residual = LowRank(lacking.left * pair.scaling, lacking.right)
            if self.max_rank is not None:
                residual, _ = truncate(residual, self.max_rank)
            self._base_change[pair.module] = residual
        return mean_A, mean_B


class LoRAFair(MeanOfFactors):
    """
    Means of the factors, and a correction of `B` towards the mean of the products (LoRA-FAIR,
    https://huggingface.co/papers/2411.14961). Where the paper descends on a similarity, this is the closed form
    of its ridge version, `min_dB ||sum_k p_k B_k A_k - (B + dB) A||^2 + ridge ||dB||^2`:
    `dB = (sum_k p_k B_k A_k - B A) A^T (A A^T + ridge I)^-1`, solved in float64. What lies outside the rows of
    `A` stays lost.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter. All clients have their ranks and scalings.
        ridge (`float`, *optional*, defaults to `0.01`):
            Weight of the penalty, positive, on the scale of the eigenvalues of `A A^T`.
        max_columns (`int`, *optional*):
            Columns to cut back to, while clients arrive, whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    aggregation = "lora_fair"

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        ridge: float = 0.01,
        max_columns: int | None = None,
        partial: bool = False,
        weights: str = "examples",
    ) -> None:
        check_number("ridge", ridge, lambda value: value > 0, "positive and finite")
        super().__init__(pairs, max_columns, partial, weights)
        self.ridge = ridge

    def _corrected(
        self, pair: FactorPair, mean_A: torch.Tensor, mean_B: torch.Tensor, lacking: LowRank | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if lacking is None:
            return mean_A, mean_B
        A, _ = pair.whole(self._state[pair.key_A] + mean_A, self._state[pair.key_B])
        return mean_A, mean_B + ridge_correction(lacking, A, self.ridge)


def ridge_correction(lacking: LowRank, A: torch.Tensor, ridge: float) -> torch.Tensor:
    """`lacking A^T (A A^T + ridge I)^-1`, `(out, r)`, solved in float64 without forming `lacking`."""
    left, right, A = lacking.left.double(), lacking.right.double(), A.double()
    gram = A @ A.T + ridge * torch.eye(len(A), dtype=torch.float64)
    # beside large factors the penalty drowns in the Gram, which may then be singular
    if ridge < SOLVABLE * gram.trace():
        u, values, vt = torch.linalg.svd(A, full_matrices=False)
        return (left @ (right @ vt.T) * (values / (values.square() + ridge)) @ u.T).float()
    return torch.linalg.solve(gram, left @ (right @ A.T), left=False).float()
