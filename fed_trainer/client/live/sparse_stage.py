# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""When the two stages of SLoRA begin and end on the live model; a method with one stage has none of it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from ...config import FederationArguments
from ...federation.plan import Plan
from .adapter import LiveAdapter
from .sparse_change import LiveSparseChange, check_sparse_change
from .state import LiveState


__all__ = ["SparseStage"]


class SparseStage:
    """
    The first stage of SLoRA, in which a sparse change of the target weights is trained in place of the LoRA.

    Args:
        model (`nn.Module`):
            The live model.
        plan ([`Plan`]):
            Whether there is a first stage (`sparse_rounds`), and for what weights.
        seed (`int`):
            Seed of the places that are trained, the same on all machines.
    """

    def __init__(self, model: Any, plan: Plan, seed: int) -> None:
        self._model, self._plan, self._seed = model, plan, seed
        self._live: LiveSparseChange | None = None
        self.errors: dict[str, float] = {}
        """How much of the sparse change the start of the LoRA does not hold, by module, once the stage has ended."""

    @property
    def rounds(self) -> int:
        """Rounds of the stage; 0 for a method that has none."""
        return self._plan.sparse_rounds

    @property
    def is_on(self) -> bool:
        """Whether the live model is in it."""
        return self._live is not None

    def check(self, args: FederationArguments, has_optimizer: bool) -> None:
        """
        Refuse what the stage cannot begin with.

        Raises:
            ValueError: For an optimiser or an adapter that was given, or weights that cannot be changed.
        """
        if not self.rounds or not isinstance(self._model, PeftModel):
            return
        if has_optimizer or args.initial_adapter is not None:
            what = (
                "`optimizers`, which hold the LoRA" if has_optimizer else f"`initial_adapter={args.initial_adapter!r}`"
            )
            raise ValueError(
                f"{args.aggregation!r} trains a sparse change of the base weights first and starts the LoRA from "
                f"it, but was given {what}. Leave it out, or use 'fedavg'."
            )
        check_sparse_change(self._model, self._plan.pairs)

    def begin(self) -> LiveState:
        """The stage begins: what is trained from now on."""
        self._live = LiveSparseChange(self._model, self._plan.pairs, self._plan.rule.density, self._seed)
        return self._live

    def begin_again(self, live: LiveState) -> LiveState:
        """Of a run that is resumed in the stage: `live` may have got to a later one."""
        state = live.read(include_frozen=True)
        live.write({pair.key_B: torch.zeros_like(state[pair.key_B]) for pair in self._plan.pairs})
        return self.begin()

    def abandon(self) -> LiveState:
        """Leave the stage, in which a run was broken off, without a start for the LoRA."""
        assert self._live is not None
        self._live.abandon()
        self._live = None
        return LiveAdapter(self._model)

    def end(self) -> LiveState:
        """The LoRA starts from what the stage has learnt; it is what is trained from now on."""
        assert self._live is not None
        self.errors = self._live.finish()
        self._live = None
        return LiveAdapter(self._model)
