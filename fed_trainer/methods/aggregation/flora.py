# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from ...state.checks import check_integer
from ...state.factors import FactorPair, check_foldable
from ...state.low_rank import LowRank
from .products import MeanOfProducts


__all__ = ["FLoRA", "restart_factors"]


class FLoRA(MeanOfProducts):
    """
    Stacking (FLoRA, https://huggingface.co/papers/2409.05976): with `A = [A_1; ...; A_K]` and
    `B = [p_1 s_1 B_1, ..., p_K s_K B_K]`, `B A = sum_k p_k s_k B_k A_k` exactly, for clients of any ranks and
    scalings. The stack is added to the base weight ([`FLoRA.base_change`]), and `finish` gives the delta that
    starts the adapter afresh, so it must reach the adapter as it is: no server optimiser.

    A LoRA restarts with a random `A` (uniform as PEFT draws it, from `seed`, the round and the name, the same on
    every machine) and `B = 0`; on embeddings, as PEFT starts them, with `A = 0` and a random `B` of variance 1.
    FeDeRA and SCL go back to their start `A0`, `B0`, whose product stays subtracted, so that the model is continued
    exactly; the start is then the principal part of the pretrained weight, not of the present one.

    Memory: the factors of all clients, as much as they sent; or a bounded number of columns with `max_columns`,
    which is then an approximation (see [`LowRankSum`]).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the restarts.
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
        seed: int = 0,
        max_columns: int | None = None,
        partial: bool = False,
        weights: str = "examples",
    ) -> None:
        check_foldable(pairs, "flora")
        super().__init__(pairs, max_columns, partial, weights)
        check_integer("seed", seed, least=0)
        self.seed = seed

    def _new_factors(
        self, pair: FactorPair, mean: LowRank, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = mean
        if pair.start is not None:
            start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in pair.start)
            left, right = torch.cat([left, -pair.scaling * start_B], dim=1), torch.cat([right, start_A])
        self._base_change[pair.module] = LowRank(left, right)
        return restart_factors(pair, A, B, self.seed, self._round)


def restart_factors(
    pair: FactorPair, A: torch.Tensor, B: torch.Tensor, seed: int, round: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the shapes of `A` and `B` that change nothing, as an adapter starts with."""
    if pair.start is not None:
        start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in pair.start)
        return pair.stored(start_A, start_B)
    digest = hashlib.sha256(f"{seed} {round} {pair.module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if "lora_embedding_" in pair.key_A:
        # a random `A` has entries of 1 / sqrt(vocabulary), and each input is one of its columns: `B` would hardly
        # learn
        bound = math.sqrt(3)  # variance 1, as PEFT's normal `B`, but the same bits on processors of all kinds
        return torch.zeros_like(A), torch.empty_like(B).uniform_(-bound, bound, generator=generator)
    bound = 1 / math.sqrt(A.shape[1])  # kaiming_uniform_ with a = sqrt(5), as PEFT
    return torch.empty_like(A).uniform_(-bound, bound, generator=generator), torch.zeros_like(B)
