# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums of products of thin factors, truncated without ever forming the `(out, in)` matrix they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


__all__ = ["LowRank", "LowRankSum", "bounded", "product_norm", "product_svd", "stacked", "truncate"]


class LowRank(NamedTuple):
    """The matrix `left @ right`, by its factors."""

    left: torch.Tensor  # (out, k)
    right: torch.Tensor  # (k, in)

    @property
    def num_columns(self) -> int:
        """`k`, which bounds the rank."""
        return self.left.shape[1]


def product_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Thin singular value decomposition of `left @ right`, by QR of both factors and an SVD of the core between them.

    In float64. The signs are fixed (the entry of largest magnitude of each left vector is positive), so that
    independent machines agree.

    Args:
        left (`torch.Tensor`): `(out, k)`.
        right (`torch.Tensor`): `(k, in)`.

    Returns:
        `tuple`: `U (out, q)`, the singular values `(q,)` in descending order, `Vt (q, in)`, with
        `q = min(k, out, in)`.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, vt = q_left @ u, vt @ q_right.T
    largest = u.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(u.gather(0, largest) < 0, -1.0, 1.0).to(u)
    return u * signs, values, vt * signs.T


def truncate(product: LowRank, rank: int) -> tuple[LowRank, float]:
    """
    The best approximation of rank `rank`, its singular values shared evenly, and the Frobenius norm of what it drops.
    """
    u, values, vt = product_svd(*product)
    root = values[:rank].sqrt()
    kept = LowRank((u[:, :rank] * root).to(product.left.dtype), (root[:, None] * vt[:rank]).to(product.right.dtype))
    return kept, float(values[rank:].norm())


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """
    `||left @ right||_F` from the two `(k, k)` Grams, in float64: `trace((left^T left) (right right^T))` under the
    root.
    """
    left, right = left.double(), right.double()
    squared = ((left.T @ left) * (right @ right.T)).sum()  # both Grams are symmetric
    return float(squared.clamp(min=0).sqrt())


def stacked(terms: Sequence[LowRank]) -> LowRank:
    """The sum of products, as new factors with the columns of all."""
    return LowRank(torch.cat([term.left for term in terms], dim=1), torch.cat([term.right for term in terms]))


def bounded(product: LowRank) -> LowRank:
    """
    The same matrix with at most `min(out, in)` columns: itself, or, if it has more, the whole product and the
    identity, which costs one matrix product where an SVD, of no lower rank as a rule, costs about thirty.
    """
    left, right = product
    rows, columns = len(left), right.shape[1]
    if product.num_columns <= min(rows, columns):
        return product
    if rows < columns:
        return LowRank(torch.eye(rows, device=left.device), left @ right)
    return LowRank(left @ right, torch.eye(columns, device=left.device))


class LowRankSum:
    """
    `sum_k left_k @ right_k`, kept as stacked float32 factors.

    Exact by default, with `sum_k r_k` columns: as many numbers as the factors of all clients, until that is more
    than twice what the whole matrix takes. With `max_columns` it is cut back to the best approximation of that many
    columns whenever there are more than twice as many; [`LowRankSum.dropped`] bounds the error. So memory does not
    grow with the number of summands for good.

    Args:
        max_columns (`int`, *optional*):
            Columns to cut back to.
    """

    def __init__(self, max_columns: int | None = None) -> None:
        self.max_columns = max_columns
        self._left: list[torch.Tensor] = []
        self._right: list[torch.Tensor] = []
        self._dropped = 0.0

    @property
    def dropped(self) -> float:
        """Bound on the Frobenius norm of what cutting back has lost so far."""
        return self._dropped

    @property
    def num_columns(self) -> int:
        return sum(left.shape[1] for left in self._left)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add `left (out, k) @ right (k, in)`; both are copied."""
        self._left.append(left.to(torch.float32, copy=True))
        self._right.append(right.to(torch.float32, copy=True))
        if self.max_columns is not None and self.num_columns > 2 * self.max_columns:
            kept, dropped = truncate(self.product(), self.max_columns)
            self._left, self._right = [kept.left], [kept.right]
            self._dropped += dropped
        elif self.num_columns > 2 * min(len(left), right.shape[1]):
            whole = bounded(self.product())
            self._left, self._right = [whole.left], [whole.right]

    def product(self, factor: float = 1.0) -> LowRank:
        """`factor` times the sum; the factor is on `left` alone."""
        return LowRank(torch.cat(self._left, dim=1) * factor, torch.cat(self._right))
