# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a whole run adds to base weights: applied to the live model, saved and put back, and published as a LoRA."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from peft_scl.linalg import WeightChange
from peft_scl.lora import PREFIX, LoraExport, LoraModule, lora_export, other_tensors

from ...federation.broken_state import WAY_BACK, BrokenStateError
from ...state.adapter_state import AdapterState
from ...state.factors import FactorPair
from ...state.low_rank import LowRank, bounded, stacked
from .pairs import add_to_base


__all__ = ["BaseChanges"]

# The starts of LoRA that leave the base weight alone and change nothing; the others are PiSSA and the like
NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class BaseChanges:
    """
    What the rounds so far have added to base weights: `W = W0 + sum over rounds of left @ right`.

    The sum is kept in float32, and the base weight is always `W0` plus the whole sum, rounded once. So a base
    in bfloat16 does not lose the small changes of single rounds, and a run that is resumed has the same
    weights, bit for bit.

    Memory, on the CPU: a copy `W0` of every weight that was changed, from its first change on, and the factors of
    the sum. These grow by the columns of each round, up to `min(out, in)`.

    Args:
        model ([`~peft.PeftModel`]):
            The live model, with its adapter unmerged.
        pairs (`Sequence[FactorPair]`):
            [`factor_pairs`] of the model, all of which can be added to the base (see [`check_foldable`]).

    Raises:
        ValueError: If the LoRA has a start that moves the base weights, such as PiSSA.
    """

    def __init__(self, model: PeftModel, pairs: Sequence[FactorPair]) -> None:
        start = getattr(model.peft_config[model.active_adapter], "init_lora_weights", True)
        if start not in NEUTRAL_STARTS:
            raise ValueError(
                f"The LoRA has `init_lora_weights={start!r}`, which moves the base weights, so an aggregation that "
                "adds to them cannot publish its result for the untouched base model. Use `init_lora_weights=True` "
                "or FeDeRA."
            )
        self._model = model
        self._pairs = {pair.module: pair for pair in pairs}
        self._originals: dict[str, torch.Tensor] = {}
        self._sums: dict[str, LowRank] = {}

    def add(self, change: dict[str, LowRank]) -> None:
        """
        Add what one round has for the base, and write the new base weights into the live model.

        Args:
            change (`dict[str, LowRank]`):
                `Aggregator.base_change`: by module `left (out, k)` and `right (k, in)`.

        Raises:
            BrokenStateError: If a weight can no longer be represented.
        """
        for module, (left, right) in change.items():
            terms = [LowRank(left.to("cpu", torch.float32), right.to("cpu", torch.float32))]
            if module in self._sums:
                terms.insert(0, self._sums[module])
            self._sums[module] = bounded(stacked(terms))
        self._apply(change)
        for module in change:
            if not torch.isfinite(self._weight(module)).all():
                raise BrokenStateError(
                    f"With the change of this round the base weight of {module}, in {self._weight(module).dtype}, "
                    f"has values that are not finite. {WAY_BACK}"
                )

    def reset(self) -> None:
        """Forget everything and put `W0` back, bit for bit."""
        self._restore()
        self._originals, self._sums = {}, {}

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """
        Within, the live model has the base weights `W0`.

        For what reads them: [`base_digest`], and saving an adapter on an embedding or on the head, with which PEFT
        writes the base weight of that module too.
        """
        self._restore()
        try:
            yield
        finally:
            self._apply(self._sums)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        The sum, in float32, as `"<module>.left" (out, k)` and `"<module>.right" (k, in)`; not the weights. The
        tensors are not copied, and never changed in place.
        """
        return {
            f"{module}.{side}": factor
            for module, total in self._sums.items()
            for side, factor in total._asdict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Put a sum in the place of this one and write the base weights: those of the run that saved it, bit for bit.

        The weights of the model, apart from what this object has added, must be `W0`. To load an adapter too,
        `reset` first, load the adapter (FeDeRA moves a residual base with it), then call this.

        Args:
            state (`dict[str, torch.Tensor]`):
                What [`BaseChanges.state_dict`] gave.

        Raises:
            ValueError: If it belongs to another model.
        """
        modules = sorted({key.rpartition(".")[0] for key in state})
        for module in modules:
            if module not in self._pairs:
                raise ValueError(
                    f"The saved base changes hold {module}, which has no factors of low rank in this model. They "
                    "belong to another base model or another PEFT config."
                )
            shape = len(state[f"{module}.left"]), state[f"{module}.right"].shape[1]
            if shape != self._shape(module):
                raise ValueError(
                    f"The saved base changes do not fit: that of {module} has the shape {shape} instead of "
                    f"{self._shape(module)}. They belong to another base model."
                )
        self.reset()
        for module in modules:
            # copies: sums of a memory-mapped file may be rounded differently, as its tensors are aligned differently
            left, right = (state[f"{module}.{side}"].to("cpu", torch.float32, copy=True) for side in LowRank._fields)
            self._sums[module] = LowRank(left, right)
        self._apply(modules)

    def to_lora(self, state: AdapterState, dtype: torch.dtype = torch.float32) -> LoraExport:
        """
        Adapter and base changes together as one plain LoRA for the untouched base model, with the scaling 1.

        Its factors are those of the sum beside those of the adapter: exact, up to rounding to `dtype`. If these are
        more than `min(out, in)`, one factor is their whole product and the other the identity.

        Args:
            state (`dict[str, torch.Tensor]`):
                The whole adapter: `LiveAdapter.read(include_frozen=True)`.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of the factors.

        Returns:
            [`~peft_scl.LoraExport`]: The tuple `(config, state_dict, error, errors)`, with a method
            `save_pretrained`. Trained modules, tokens and biases come along.
        """
        config: Any = self._model.peft_config[self._model.active_adapter]
        others = other_tensors(state, self._pairs)
        for module, original in self._originals.items():
            if (key := f"{PREFIX}{module}.base_layer.weight") in others:  # PEFT saves those of embeddings and heads
                others[key] = original
        fan_in_fan_out = any(pair.transposed and not is_embedding(pair) for pair in self._pairs.values())
        base: Any = self._model.get_base_model()
        return lora_export(base, config, self._whole_changes(state), others, fan_in_fan_out, dtype)

    def lacking(self, saved: Mapping[str, tuple[int, ...]]) -> str | None:
        """What a file that is to hold the result of `to_lora` lacks, in words, if it does."""
        for module, pair in self._pairs.items():
            for letter in "AB":
                factor = f"lora_embedding_{letter}" if is_embedding(pair) else f"lora_{letter}.weight"
                if 0 in saved.get(key := f"{PREFIX}{module}.{factor}", (0,)):
                    return f"{key} is missing or empty"
        return None

    def _whole_changes(self, state: AdapterState) -> Iterator[LoraModule]:
        for module, pair in self._pairs.items():
            left, right = pair.change(*pair.whole(state[pair.key_A], state[pair.key_B]))
            terms = [LowRank(pair.scaling * left.float(), right.float())]
            if module in self._sums:
                terms.insert(0, self._sums[module])
            whole = stacked(terms)
            exact = WeightChange(whole.left.double(), whole.right.double(), None, None)
            yield LoraModule(module, exact, *bounded(whole), is_embedding(pair))

    def _apply(self, modules: Collection[str]) -> None:
        for module in modules:
            if module not in self._originals:
                self._originals[module] = self._weight(module).detach().to("cpu", copy=True)
        changes = {module: self._sums[module] for module in modules}
        add_to_base(self._model, changes, list(self._pairs.values()), self._originals)

    @torch.no_grad()
    def _restore(self) -> None:
        for module, original in self._originals.items():
            self._weight(module).copy_(original)

    def _weight(self, module: str) -> torch.Tensor:
        base: Any = self._model.get_base_model()
        return base.get_submodule(module).get_base_layer().weight

    def _shape(self, module: str) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = self._weight(module).shape
        return (columns, rows) if self._pairs[module].transposed else (rows, columns)


def is_embedding(pair: FactorPair) -> bool:
    """Whether the factors are those of an `nn.Embedding`."""
    return pair.key_A.endswith(".lora_embedding_A")
