# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands in a coordinator's process for clients that are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..federation.plan import Plan
from ..state.adapter_state import AdapterState


__all__ = ["ClientsElsewhere"]


class StoresElsewhere:
    """What clients keep is with them: there is nothing of it here to delete, to link or to restore."""

    def clear(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def settle(self, counted: Mapping[str, int | None]) -> None:
        pass

    def link_into(self, folder: Path, counted: Mapping[str, int]) -> dict[str, str]:
        return {}

    def restore(self, folder: Path, digests: Mapping[str, str]) -> None:
        pass


class ClientsElsewhere:
    """
    In the place of a [`~fed_trainer.client.turn.Client`].

    Args:
        plan ([`Plan`]):
            What the settings imply.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.store = plan, StoresElsewhere()

    def begin(self, state: AdapterState, done: int = 0) -> None:
        """Clients learn what is trained from their packets."""

    def model_state(self, state: AdapterState, client: str, counted: int | None) -> AdapterState:
        """
        Raises:
            ValueError: What a client keeps of its model is not here.
        """
        raise ValueError(
            f"The model of client {client!r} is made of what the client keeps, which is not here. Evaluate or save it "
            "there."
        )

    def turn(self, packet: Any) -> Any:
        """
        Raises:
            NotImplementedError: No turn is taken here.
        """
        raise NotImplementedError("The clients of this run are elsewhere: `serve` it, instead of `train`.")
