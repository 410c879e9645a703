# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Singular vectors, the changes of weights that adapters amount to, and samples of tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F


__all__ = ["WeightChange", "add_products", "evenly_spaced", "full_precision", "principal_factors", "truncated_svd"]

# Columns of the start beyond `r`. With fewer than `r` columns, copies of a repeated singular value would be missed; a
# few more save steps, and more than 8 cost more in the products than they save in steps.
OVERSAMPLING = 8
# The step that lowers the squared error by less than this part is the last one. Even on a flat spectrum, where the
# gain falls as slowly as one over the square of the number of steps, less than 1e-3 of the squared error is then left
# to gain. 1e-5 takes one step more on weights of trained models, but 5 more on 4096 x 4096 Gaussian entries.
TOLERANCE = 1e-4
MAX_STEPS = 16  # Gaussian entries, the slowest spectrum, take up to 10
# Below this many rows per column of the start, the dense eigenproblem is as fast as the basis that all steps together
# build.
ROWS_PER_COLUMN = 12
# Up to this size the dense eigenproblem takes milliseconds, and its subspace is exact however small the gap is.
DENSE_ROWS = 512
# A magnitude this close to the largest counts as equal to it when a sign is chosen.
SIGN_TIE = 1e-4
SAMPLES = 64
ROWS_PER_BLOCK = 256


class WeightChange(NamedTuple):
    """What a linear adapter does to a layer: `W' - W = left @ right + rest` and `b' - b = shift`, in float64."""

    left: torch.Tensor  # (out, k)
    right: torch.Tensor  # (k, in)
    rest: torch.Tensor | None  # (out, in), if the change has full rank
    shift: torch.Tensor | None  # (out,), if the adapter has biases

    def dense(self) -> torch.Tensor:
        """`W' - W` as one matrix."""
        product = self.left @ self.right
        return product if self.rest is None else product + self.rest


def truncated_svd(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Leading `r` singular triplets of a matrix.

    Large matrices go through a randomised block Krylov iteration ([Musco and Musco,
    2015](https://huggingface.co/papers/1504.05477); [Halko et al., 2011](https://huggingface.co/papers/0909.4061))
    with products in float32 and small problems in float64, small ones (fewer than `12 (r + 8)` rows or columns, or up
    to 512) through the eigenvectors of their smaller Gram matrix in float64. Either way `left @ diag(values) @ right`
    is the projection of `weight` on `r` orthonormal vectors. Its distance to `weight` is within 1.001 of the least
    that rank `r` allows, or, where the weight is that close to rank `r`, below 1e-6 of the norm of `weight`.

    The random start has a generator of its own, on the CPU, with a fixed seed, TF32 and autocast are off inside, and
    the signs are fixed: the entry of largest magnitude of each left vector is positive (the first of those within 1e-4
    of it, so that rounding does not decide between ties). Hence machines agree on a singular vector as far as rounding
    determines it: to about 1e-6 over its gap to the neighbouring singular values, relative to the largest value.
    Within a cluster of equal values only the spanned space is determined. Should rounding change after which step the
    iteration stops, results differ by what is left of its error, so send the factors where they must be equal.
    Triplets beyond the rank of `weight` have values of zero, up to rounding, and finite vectors without a meaning.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(n, m)`, any floating dtype and device. One in 16 bits is copied to float32.
        r (`int`):
            Number of triplets, `1 <= r <= min(n, m)`.

    Returns:
        `tuple`: `left (n, r)`, `values (r,)` in falling order and `right (r, m)`, float32 (float64 for a float64
        `weight`) on the device of `weight`.
    """
    matrix = weight.detach()
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if tall else matrix
    rows = matrix.shape[0]
    dense = rows <= DENSE_ROWS or rows < ROWS_PER_COLUMN * (r + OVERSAMPLING)
    with full_precision(matrix.device):
        vectors, images = _dense(matrix, r) if dense else _krylov(matrix.to(dtype), r)
    values = images.norm(dim=1)
    images = images / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    left, right = (images.T, vectors) if tall else (vectors.T, images)
    signs = _signs(left)
    return (left * signs).to(dtype), values.to(dtype), (right * signs[:, None]).to(dtype)


def principal_factors(weight: torch.Tensor, r: int, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The start of FeDeRA and SCL: `scaling up @ down` is the best approximation of `weight` of rank `r`, its singular
    values shared evenly.

    Directions that `weight` does not have start as those of a LoRA: `down` random (from a generator of its own, with a
    fixed seed), `up` zero. With both zero they could not be trained.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(n, m)`, any floating dtype and device.
        r (`int`):
            Rank; it may exceed that of `weight`.
        scaling (`float`, *optional*, defaults to `1.0`):
            Positive factor on the product.

    Returns:
        `tuple`: `down (r, m)` and `up (n, r)`, float32 (float64 for a float64 `weight`) on the device of `weight`.
    """
    n, m = weight.shape
    left, values, right = truncated_svd(weight, min(r, n, m))
    rank = int((values > 1e-6 * values[0]).sum())  # the resolution of float32
    root = (values[:rank] / scaling).sqrt()
    bound = m**-0.5
    down = torch.empty(r, m).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0)).to(right)
    down[:rank] = root[:, None] * right[:rank]
    up = left.new_zeros(n, r)
    up[:, :rank] = left[:, :rank] * root
    return down, up


@torch.no_grad()
def add_products(
    weight: torch.Tensor, terms: Sequence[tuple[float, torch.Tensor, torch.Tensor]], out: torch.Tensor
) -> None:
    """
    `out = weight + sum_k c_k B_k A_k` of terms `(c, A, B)`, summed in float64 and rounded once; `out` may be `weight`.

    In blocks of rows, so that no copy of a large weight in float64 is made.
    """
    wide = [
        (coefficient, factor_A.detach().double(), factor_B.detach().double())
        for coefficient, factor_A, factor_B in terms
    ]
    for first in range(0, len(weight), ROWS_PER_BLOCK):
        rows = slice(first, first + ROWS_PER_BLOCK)
        total = weight[rows].to(torch.float64, copy=True)
        for coefficient, factor_A, factor_B in wide:
            total.addmm_(factor_B[rows], factor_A, alpha=coefficient)
        out[rows] = total


def evenly_spaced(tensor: torch.Tensor, count: int = SAMPLES) -> torch.Tensor:
    """At most `count` evenly spaced entries of a tensor, a copy."""
    flat = tensor.detach().flatten()
    if flat.numel() > count:
        # in integers: in float32 the last index of a large tensor is rounded up to its length
        flat = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // (count - 1)]
    return flat.clone()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """
    Products as exact as their dtype, under autocast and TF32 too (which transformers' `TrainingArguments` turns on).
    """
    matmul, saved = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    # if it follows the setting for all backends, it shall do so again
    inherited = saved == torch.backends.fp32_precision  # type: ignore[attr-defined]
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = "none" if inherited else saved


def _dense(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows: the leading `r` left singular vectors of a wide matrix, and their products with it, in float64."""
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    parts = matrix.split(1024, dim=1)  # no copy of the whole in float64
    for part in parts:
        gram.addmm_(part.to(gram), part.to(gram).T)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :r].T  # eigh sorts upwards
    return vectors, torch.cat([vectors @ part.to(gram) for part in parts], dim=1)


def _krylov(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As `_dense`, from the Krylov space of a random block.

    Blocks are kept as rows: `thin @ matrix` is up to five times as fast as `matrix.T @ thin.T` in BLAS.
    """
    eps, total = torch.finfo(matrix.dtype).eps, matrix.norm().to(torch.float64).square()
    start = torch.randn(r + OVERSAMPLING, matrix.shape[1], generator=torch.Generator().manual_seed(0))
    image = start.to(matrix)
    basis, images = matrix.new_empty(0, matrix.shape[0]), total.new_empty(0, matrix.shape[1])
    gram = total.new_empty(0, 0)
    captured = torch.zeros_like(total)
    for _ in range(MAX_STEPS):
        block = torch.linalg.qr(image.T).Q.T @ matrix.T
        block, _ = _orthonormal(block - (block @ basis.T) @ basis)
        while True:  # again, as the rounding errors of what was taken away are left
            block, sizes = _orthonormal(block - (block @ basis.T) @ basis)
            outside = sizes > 0.5
            if outside.all():
                break
            block = block[outside]  # the others were nothing but rounding errors: the basis is complete there
        image = block @ matrix
        basis, images = torch.cat([basis, block]), torch.cat([images, image.to(images)])
        old = len(gram)
        gram = F.pad(gram, (0, len(block), 0, len(block)))
        gram[old:] = images[old:] @ images.T  # eigh reads the lower triangle
        energies, rotation = torch.linalg.eigh(gram)
        growth, captured = energies[-r:].sum() - captured, energies[-r:].sum()
        if growth <= TOLERANCE * (total - captured) + eps * total:
            break
    rotation = rotation.flip(-1)[:, :r].T
    return rotation @ basis.to(images), rotation @ images


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Orthonormal rows with the same span, and the size of each row's part that was not in the span of those before.
    """
    columns, triangle = torch.linalg.qr(rows.T)
    return columns.T, triangle.diagonal().abs()


def _signs(left: torch.Tensor) -> torch.Tensor:
    """1 or -1 for each column, to make its first entry among those of largest magnitude positive."""
    magnitudes = left.abs()
    largest = magnitudes >= (1 - SIGN_TIE) * magnitudes.amax(dim=0)
    entries = left.gather(0, largest.int().argmax(dim=0, keepdim=True))[0]
    return torch.where(entries < 0, -1.0, 1.0).to(left)
