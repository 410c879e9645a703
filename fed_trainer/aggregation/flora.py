# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from ..adapter_state import AdapterState
from .base import ClientUpdate
from .factors import FactorAggregator, FactorPair, check_foldable
from .low_rank import LowRank, LowRankSum


__all__ = ["FLoRA", "restart_factors"]


class FLoRA(FactorAggregator):
    """
    Stacking (FLoRA, https://huggingface.co/papers/2409.05976): with `A = [A_1; ...; A_K]` and `B = [p_1 s_1 B_1, ..., p_K s_K
    B_K]`, `B A = sum_k p_k s_k B_k A_k` exactly, for clients of any ranks and scalings. The stack is added to the base weight
    ([`FLoRA.base_change`]), and `finish` gives the delta that starts the adapter afresh, so it must reach the adapter as it is:
    no server optimiser.

    A LoRA restarts with a random `A` (uniform as PEFT draws it, from `seed`, the round and the name, the same on every machine)
    and `B = 0`. FeDeRA and SCL go back to their start `A0`, `B0`, whose product stays subtracted, so that the model is continued
    exactly; the start is then the principal part of the pretrained weight, not of the present one.

    Memory: the factors of all clients, as much as they sent; or a bounded number of columns with `max_columns`, which is then
    an approximation (see [`LowRankSum`]).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the restarts.
        max_columns (`int`, *optional*):
            Columns to cut a stack back to whenever there are more than twice as many.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules.
    """

    def __init__(
        self, pairs: Sequence[FactorPair], seed: int = 0, max_columns: int | None = None, partial: bool = False
    ) -> None:
        check_foldable(pairs, "flora")
        super().__init__(pairs, partial)
        self.seed = seed
        self.max_columns = max_columns

    def begin(self, state: AdapterState, round: int = 1) -> None:
        super().begin(state, round)
        self._stacks = {pair.module: LowRankSum(self.max_columns) for pair in self.pairs}

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        A, B, scaling = self._local(pair, update)
        self._stacks[pair.module].add(B * (update.num_examples * scaling), A)

    def finish(self) -> AdapterState:
        delta = self._finish_others()
        for pair in self.pairs:
            A, B = (self._state[key].float() for key in (pair.key_A, pair.key_B))
            if self._weights[pair.module] == 0:  # nobody trained it
                delta[pair.key_A], delta[pair.key_B] = torch.zeros_like(A), torch.zeros_like(B)
                continue
            left, right = self._stacks[pair.module].product(1 / self._weights[pair.module])
            if pair.start is not None:
                start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in pair.start)
                left, right = torch.cat([left, -pair.scaling * start_B], dim=1), torch.cat([right, start_A])
            self._base_change[pair.module] = LowRank(left, right)
            new_A, new_B = restart_factors(pair, A, B, self.seed, self._round)
            delta[pair.key_A], delta[pair.key_B] = new_A - A, new_B - B
        return delta


def restart_factors(
    pair: FactorPair, A: torch.Tensor, B: torch.Tensor, seed: int, round: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the shapes of `A` and `B` that change nothing, as an adapter starts with."""
    if pair.start is not None:
        start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in pair.start)
        return pair.stored(start_A, start_B)
    digest = hashlib.sha256(f"{seed} {round} {pair.module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(A.shape[1])  # kaiming_uniform_ with a = sqrt(5), as PEFT
    return torch.empty_like(A).uniform_(-bound, bound, generator=generator), torch.zeros_like(B)
