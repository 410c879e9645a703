# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How the clients of a run between machines are doing, for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


__all__ = ["Watch"]

SECONDS_BETWEEN = 1.0


class Watch:
    """
    The state of each client, and what it has sent and been sent so far.

    Args:
        clients (`Sequence[str]`):
            Their names.
        num_rounds (`int`):
            Rounds of the run.
        show (`Callable`):
            Called with all of it when something has changed, once a second at most.
        clock (`Callable`, *optional*):
            That of `time`.
    """

    def __init__(
        self,
        clients: Sequence[str],
        num_rounds: int,
        show: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._clock, self._shown = show, clock, -SECONDS_BETWEEN
        self.content: dict[str, Any] = {
            "round": 0,
            "num_rounds": num_rounds,
            "clients": {client: {"state": "absent"} for client in clients},
        }

    def saw(self, client: str, state: str, round: int) -> None:
        """A client does something else now."""
        round = min(round, self.content["num_rounds"])  # an evaluation of the last state is of the round after it
        self.content["round"] = max(round, self.content["round"])
        self.content["clients"][client] |= {"state": state, "round": round}
        self._changed()

    def moved(self, client: str, down: int, up: int) -> None:
        """Messages of so many bytes have gone to a client, and come from it."""
        about = self.content["clients"][client]
        about |= {"bytes_down": about.get("bytes_down", 0) + down, "bytes_up": about.get("bytes_up", 0) + up}

    def counted(self, client: str, figures: Mapping[str, Any]) -> None:
        """The update of a client counts."""
        about, loss = self.content["clients"][client], figures.get("train_loss")
        about |= {"state": "counted", "loss": loss if isinstance(loss, (int, float)) else None}
        self._changed()

    def refused(self, client: str) -> None:
        """The update of a client was left out."""
        self.content["clients"][client]["state"] = "left out"
        self._changed()

    def end_round(self) -> None:
        """Show how it stands, whenever that was done last."""
        self._shown = self._clock()
        self._show(self.content)

    def _changed(self) -> None:
        if self._clock() - self._shown >= SECONDS_BETWEEN:
            self.end_round()
