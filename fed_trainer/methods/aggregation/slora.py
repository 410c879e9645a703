# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The two stages of SLoRA (https://huggingface.co/papers/2308.06522).

Stage 1 federates a sparse change of the full target weights: `values` at the places of a random mask that all
machines draw from one seed, so that only the values travel; their mean is FedAvg, exact. Stage 2 starts LoRA from
the change. On a live model [`LiveSparseChange`] does both.
"""

from __future__ import annotations

import hashlib

import torch

from peft_scl.linalg import truncated_svd

from ...state.checks import check_integer, check_number
from ...state.low_rank import LowRank
from .fedavg import FedAvg


__all__ = ["SLoRA", "densify", "lora_start", "shared_mask"]


class SLoRA(FedAvg):
    """
    FedAvg in both stages of SLoRA (https://huggingface.co/papers/2308.06522): of the values of a sparse change of
    the full target weights first, then of the LoRA that starts from it.

    Args:
        sparse_rounds (`int`):
            Rounds of the first stage.
        density (`float`, *optional*, defaults to `0.01`):
            Share of every target weight that the first stage trains.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    def __init__(self, sparse_rounds: int, density: float = 0.01, weights: str = "examples") -> None:
        check_integer("sparse_rounds", sparse_rounds, 1)
        check_number("density", density, lambda value: 0 < value <= 1, "a number in (0, 1]")
        super().__init__(weights=weights)
        self.sparse_rounds, self.density = sparse_rounds, density


def shared_mask(name: str, shape: torch.Size | tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    """
    Places of a weight that stage 1 trains: `round(density * numel)` sorted flat indices (at least one), drawn
    uniformly without replacement. The same on every machine, whatever other weights there are and in whatever order
    they are asked for.

    Args:
        name (`str`):
            Name of the weight.
        shape (`tuple[int, ...]`):
            Its shape, as stored.
        density (`float`):
            Share of the entries; the paper uses about 0.01.
        seed (`int`):
            Seed of the run.
    """
    if not 0 < density <= 1:
        raise ValueError(f"`density` should be in (0, 1] but the value passed is {density!r}")
    numel = torch.Size(shape).numel()
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = max(1, round(density * numel))
    return torch.randperm(numel, generator=generator)[:count].sort().values


def densify(values: torch.Tensor, indices: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The change `(out, in)` of one weight in float32: `values` at `indices`, zero elsewhere."""
    dense = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=values.device)
    dense[indices] = values.float()
    return dense.view(shape)


def lora_start(change: torch.Tensor, r: int, scaling: float, A: torch.Tensor) -> tuple[LowRank, float]:
    """
    Stage 2: factors `B = U_r sqrt(S_r / scaling)`, `A = sqrt(S_r / scaling) Vt_r` that start LoRA from the change
    of stage 1; the pretrained weight stays as it was, so what `r` directions do not hold of the change is lost.

    Args:
        change (`torch.Tensor`):
            `(out, in)`, oriented as `nn.Linear`. One weight at a time is dense here, once in a run.
        r (`int`):
            Rank of the LoRA.
        scaling (`float`):
            Its scaling.
        A (`torch.Tensor`):
            Random `(r, in)`, kept (with `B = 0`) for directions that the change does not have. On the device of
            `change`.

    Returns:
        `tuple`: `LowRank(B, A)`, without the scaling, and the relative error
        `||change - scaling B A||_F / ||change||_F`.
    """
    norm = float(change.norm())
    if norm == 0:
        return LowRank(torch.zeros(change.shape[0], r, device=change.device), A.float().clone()), 0.0
    rank = min(r, *change.shape)
    left, values, right = truncated_svd(change, rank)
    rank = int((values > 1e-6 * values[0]).sum())  # the resolution of float32
    root = (values[:rank] / scaling).sqrt()
    new_A, B = A.float().clone(), torch.zeros(change.shape[0], r, device=change.device)
    new_A[:rank] = (root[:, None] * right[:rank]).float()
    B[:, :rank] = (left[:, :rank] * root).float()
    return LowRank(B, new_A), float((change - scaling * (B @ new_A)).norm()) / norm
