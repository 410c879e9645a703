# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the server remembers of the clients' visits: who was here when, whose update counted, what went into the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


__all__ = ["Visits"]


class Visits:
    """
    The visits of a run so far.

    Attributes:
        seen (`dict[str, int]`):
            By client the last round whose packet it has answered, whatever came of its turn. What was in a packet
            that may not have arrived is sent again.
        counted (`dict[str, int]`):
            By client the last round in which its update counted.
        saved (`dict[str, int]`):
            `counted` as of the last checkpoint, to which the server may go back.
        base_bytes (`dict[int, int]`):
            By round the bytes of what it has added to base weights, where it has added something.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.base_bytes: dict[int, int] = {}

    def save(self) -> None:
        """There is a checkpoint of the last round."""
        self.saved = dict(self.counted)

    def meets_anew(self, client: str | None = None) -> None:
        """What the client has been sent, or all have, may not be there any more: the next packet has everything."""
        if client is None:
            self.seen.clear()
        else:
            self.seen.pop(client, None)

    def end_round(self, round: int, answered: Collection[str], taken: Collection[str], base_bytes: int) -> None:
        """Enter a round that has come to its end: who has answered, whose update counts, what went into the base."""
        self.seen |= dict.fromkeys(answered, round)
        self.counted |= dict.fromkeys(taken, round)
        if base_bytes:
            self.base_bytes[round] = base_bytes

    def missed_bytes(self, client: str) -> int:
        """Bytes of what went into base weights since the client was last here; all of it for one that was not."""
        since = self.seen.get(client, 0)
        return sum(size for round, size in self.base_bytes.items() if round >= since)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "seen": self.seen,
            "counted": self.counted,
            "base_bytes": {str(round): size for round, size in self.base_bytes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.seen, self.counted = ({str(c): int(r) for c, r in state[name].items()} for name in ("seen", "counted"))
        self.saved = dict(self.counted)
        self.base_bytes = {int(round): int(size) for round, size in state["base_bytes"].items()}

    def load_rounds(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Take over what the record of a run says, of which earlier versions did not keep the visits."""
        self.seen, self.counted, self.base_bytes = {}, {}, {}
        for entry in rounds:
            answered = [*entry["clients"], *entry["refused"]]
            self.end_round(entry["round"], answered, entry["clients"], entry["base_change_bytes"])
