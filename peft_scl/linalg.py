# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import torch


__all__ = ["truncated_svd"]


def truncated_svd(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Leading `r` singular triplets of a matrix, from the eigenvectors of its smaller Gram matrix.

    One `k x k` symmetric eigenproblem in float64 (`k = min(n, m)`) instead of a full SVD. The product
    `left @ diag(values) @ right` is the projection of `weight` on `left` (or on `right`), hence a best rank-`r`
    approximation as far as that subspace is exact; float64 Grams are, for weights stored in float32 or less.

    The signs are fixed (the entry of largest magnitude of each left vector is positive), so that independent machines
    agree.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(n, m)`, any floating dtype and device.
        r (`int`):
            Number of triplets, `1 <= r <= min(n, m)`.

    Returns:
        `tuple`: `left (n, r)`, `values (r,)` in falling order and `right (r, m)`, float32 (float64 for a float64
        `weight`) on the device of `weight`.
    """
    matrix = weight.detach().to(torch.float64)
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :r]  # eigh sorts upwards
    if wide:
        left, right = vectors, vectors.T @ matrix
        values = right.norm(dim=1)
        right = right / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    else:
        left, right = matrix @ vectors, vectors.T
        values = left.norm(dim=0)
        left = left / values.clamp_min(torch.finfo(torch.float64).tiny)
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    left, right = left * signs, right * signs.T
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return left.to(dtype), values.to(dtype), right.to(dtype)
