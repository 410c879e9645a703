# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


__all__ = ["RoundProgress"]


class RoundProgress:
    """
    A progress bar over rounds with a line per client.

    Args:
        num_rounds (`int`):
            Number of rounds in all.
        done (`int`):
            Rounds that a resumed run has behind it.
        enabled (`bool`):
            Nothing is shown if `False`, as on all processes but the first.
    """

    def __init__(self, num_rounds: int, done: int, enabled: bool) -> None:
        self.num_rounds = num_rounds
        self.enabled = enabled
        self._bar = tqdm(total=num_rounds, initial=done, desc="rounds", unit="round", disable=not enabled)

    def client(self, round: int, client: str, num_examples: int | None, metrics: Mapping[str, Any]) -> None:
        """A line for a client that has finished its local round, with what it says of that."""
        if self.enabled:
            tqdm.write(
                f"round {round}/{self.num_rounds}  {client:<24} {_shown(num_examples, '>8,')} examples  "
                f"{_shown(metrics.get('num_steps'), '>5')} steps  loss {_shown(metrics.get('train_loss'), '.4f')}  "
                f"{_shown(metrics.get('seconds'), '.1f')} s"
            )

    def round(self, train_loss: float | None, eval_metrics: dict[str, float]) -> None:
        """The round is over; `eval_metrics` are those of [`held_out_metrics`], none if it was not evaluated."""
        shown = {"train_loss": _shown(train_loss, ".4f")}
        shown |= {key: f"{value:.4f}" for key, value in eval_metrics.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> RoundProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()


def _shown(value: Any, form: str) -> str:
    """A number in a form; `-` for what a client does not say."""
    return f"{value:{form}}" if isinstance(value, (int, float)) else f"{'-':{form.rstrip(',').split('.')[0]}}"
