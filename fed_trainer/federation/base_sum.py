# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes into base weights, for clients that hold a base model of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..state.adapter_state import AdapterState
from ..state.low_rank import LowRank


__all__ = ["BaseSum", "as_changes"]


class BaseSum:
    """
    What a rule adds to base weights, as it is sent: the change of one round to a client that has all before it, the
    sum of all rounds to any other.

    Args:
        total (`Callable`):
            The sum so far, as `"<module>.left" (out, k)` and `"<module>.right" (k, in)` in float32.
    """

    def __init__(self, total: Callable[[], AdapterState]) -> None:
        self._total = total
        self._last: tuple[int, AdapterState] = (0, {})  # round, and its change

    def end_round(self, round: int, change: Mapping[str, LowRank]) -> None:
        """A round has changed the base by `change`."""
        factors = {
            f"{module}.{side}": factor for module, each in change.items() for side, factor in each._asdict().items()
        }
        self._last = (round, factors)

    def for_client(self, seen: int | None, round: int) -> tuple[AdapterState, str | None]:
        """
        What a client is sent.

        Args:
            seen (`int`, *optional*):
                The last round whose packet it has answered.
            round (`int`):
                The round of the packet: the client is to have the base as it is before that round.

        Returns:
            `tuple[dict[str, torch.Tensor], str]`: the factors and what they are, `"change"` or `"sum"`; none and
            `None` if it has everything.
        """
        if seen == round:
            return {}, None
        if seen == round - 1 and self._last[0] == seen:
            return self._last[1], "change"
        return self._total(), "sum"


def as_changes(factors: AdapterState) -> dict[str, LowRank]:
    """The change by module, of the factors under the names that they are sent with."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in factors)
    return {module: LowRank(factors[f"{module}.left"], factors[f"{module}.right"]) for module in modules}
