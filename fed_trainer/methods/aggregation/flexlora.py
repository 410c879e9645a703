# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from ...state.factors import FactorPair
from ...state.low_rank import LowRank, product_svd
from .products import MeanOfProducts


__all__ = ["FlexLoRA"]


class FlexLoRA(MeanOfProducts):
    """
    Mean of the products, redistributed by its singular value decomposition (FlexLoRA,
    https://huggingface.co/papers/2402.11505): `dW = sum_k p_k s_k B_k A_k`, `s B A` = its best approximation of the
    global rank. `dW` is never formed: QR of both stacked factors, SVD of the core, in float64.

    The directions are in the order of their singular values, so a client of rank `r_k` gets the best approximation
    of *its* rank by [`truncate_ranks`]. The singular values are shared evenly by `A` and `B`. Directions that `dW`
    does not have keep their `A` and start with `B = 0`, or keep their `B` where `A` is zero; with both zero they
    could not be trained.

    For FeDeRA and SCL with a kept residual, the whole products are averaged and approximated: their constant start
    drops out of the difference.

    Memory: the factors of all clients, or a number of columns bounded by `max_columns` (see [`LowRankSum`]).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter; its ranks are the largest of the clients'.
        max_columns (`int`, *optional*):
            Columns to cut back to, while clients arrive, whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    def _new_factors(
        self, pair: FactorPair, mean: LowRank, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        product = LowRank(mean.left / pair.scaling, mean.right)
        return pair.stored(*principal_factors(product, *pair.whole(A, B)))


def principal_factors(product: LowRank, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors `(r, in)`, `(out, r)` of the best rank-`r` approximation of `product`; one of the given and zeros where
    its rank is less.
    """
    u, values, vt = product_svd(*product)
    rank = int((values[: len(A)] > 1e-7 * values[0]).sum())  # the resolution of float32
    root = values[:rank].sqrt()
    new_A, new_B = A.clone(), B * ~A.any(dim=1)  # PEFT starts embeddings with `A = 0`
    new_A[:rank] = root[:, None] * vt[:rank]
    new_B[:, :rank] = u[:, :rank] * root
    return new_A, new_B
