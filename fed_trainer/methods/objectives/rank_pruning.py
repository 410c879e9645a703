# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from ...state.adapter_state import AdapterState
from ...state.checks import check_number
from ...state.factors import FactorPair, refuse_start
from ..aggregation.hetlora import pruned_rank, pruning_penalty
from .base import LocalObjective, ServerHalf, add_gradient, check_positive, other_objective


__all__ = ["RankPruning"]


class RankPruning(LocalObjective):
    """
    Rank self-pruning of HetLoRA (https://huggingface.co/papers/2401.06432): adds the gradient of `penalty_weight`
    times the sum of [`~fed_trainer.methods.aggregation.pruning_penalty`] over all pairs. If the local round has
    shrunk the sum, the client's next rank is `floor(decay rank)`
    ([`~fed_trainer.methods.aggregation.pruned_rank`]), one for all pairs.

    The client's state is `{"rank": ...}`, an integer tensor, which the server is sent too: it cuts what the client
    gets. `begin` has to be given one from the first round on, and a `start` that is zero behind that rank
    ([`~fed_trainer.methods.aggregation.truncate_ranks`] with `pad=True`).

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        decay (`float`):
            `gamma` of the paper, between 0 and 1.
        penalty_weight (`float`):
            `lambda` of the paper.
    """

    keeps_client_state = True
    changes_ranks = True
    follows_factors = True
    needs_all_tensors = True
    sends: Mapping[str, torch.dtype] = MappingProxyType({"rank": torch.int64})

    def __init__(self, pairs: Sequence[FactorPair], decay: float, penalty_weight: float) -> None:
        super().__init__()
        for pair in pairs:
            refuse_start(pair, "pruned")
        check_number("decay", decay, lambda value: 0 < value < 1, "between 0 and 1")
        check_positive("penalty_weight", penalty_weight)
        self.pairs = list(pairs)
        self.decay, self.penalty_weight = decay, penalty_weight

    def server_half(self) -> ServerHalf:
        return RankPruningServer(self.pairs)

    def first_memory(self, rank: int | None, shared: AdapterState) -> AdapterState | None:
        return {"rank": torch.tensor(rank or max(len(shared[pair.key_A]) for pair in self.pairs))}

    def begin(
        self, start: AdapterState, client_state: AdapterState | None, received: AdapterState | None = None
    ) -> None:
        if client_state is None:
            raise ValueError(
                "The ranks of the clients are pruned from some rank on, but the client has no state and so no "
                'rank. Begin its first round with `{"rank": torch.tensor(rank)}`.'
            )
        super().begin(start, client_state, received)
        self._rank = int(client_state["rank"])

    def add_gradients(self, parameters: dict[str, nn.Parameter], lr: float) -> None:
        keys = [key for pair in self.pairs for key in (pair.key_A, pair.key_B)]
        factors = {key: parameters[key].detach().float().requires_grad_() for key in keys}
        gradients = torch.autograd.grad(self.penalty_weight * self._penalty(factors), list(factors.values()))
        for key, gradient in zip(factors, gradients, strict=True):
            add_gradient(parameters[key], gradient)

    def finish(self, delta: AdapterState) -> AdapterState:
        end = {key: self._start[key] + delta[key] for pair in self.pairs for key in (pair.key_A, pair.key_B)}
        before, after = self._penalty(self._start).item(), self._penalty(end).item()
        self._next_rank = pruned_rank(before, after, self._rank, self.decay)
        return {"rank": torch.tensor(self._next_rank)}

    def to_server(self) -> AdapterState:
        return {"rank": torch.tensor(self._next_rank)}

    def _penalty(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [
                pruning_penalty(tensors[pair.key_A].float(), tensors[pair.key_B].float(), self.decay, self._rank)
                for pair in self.pairs
            ]
        ).sum()


class RankPruningServer(ServerHalf):
    """
    The server's half: it cuts what a client gets to the rank that the client has told.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
    """

    remembers_clients = True

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        self.pairs = list(pairs)
        self._ranks: dict[str, int] = {}
        self._next_ranks: dict[str, int] = {}  # from the end of the round on

    def rank_of(self, client: str) -> int | None:
        return self._ranks.get(client)

    def fault_of(self, sent: AdapterState, delta: AdapterState) -> str | None:
        largest = max(len(delta[pair.key_A]) for pair in self.pairs)
        if not 1 <= sent["rank"] <= largest:
            return f"its next rank is {int(sent['rank'])}, but it should be between 1 and its present one, {largest}."
        return None

    def begin_round(self) -> None:
        self._next_ranks = {}

    def accept(self, client: str, sent: AdapterState, delta: AdapterState) -> None:
        self._next_ranks[client] = int(sent["rank"])

    def end_round(self) -> None:
        self._ranks |= self._next_ranks
        self._next_ranks = {}

    def state_dict(self) -> AdapterState:
        return {f"rank.{client}": torch.tensor(rank) for client, rank in self._ranks.items()}

    def load_state_dict(self, state: AdapterState) -> None:
        ranks = {}
        for entry, tensor in state.items():
            name, _, client = entry.partition(".")
            if name != "rank":
                raise ValueError(other_objective(entry, self))
            ranks[client] = int(tensor)
        self._ranks, self._next_ranks = ranks, {}
