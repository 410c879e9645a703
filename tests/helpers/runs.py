# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs that end early, files that are damaged, and recipes that run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback


class _InRound(TrainerCallback):
    may_differ = True  # the run that resumes has none

    def __init__(self, event: str, round: int) -> None:
        self.round = round
        setattr(self, event, self._happens)

    def _happens(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.round:
            self._act(control)

    def _act(self, control: Any) -> None:
        raise NotImplementedError


class Dies(_InRound):
    """
    Dies as by Ctrl-C. `on_log` comes after the last client of a round, before its checkpoint; `on_save` after that.
    """

    def __init__(self, event: str = "on_log", round: int = 2) -> None:
        super().__init__(event, round)

    def _act(self, control: Any) -> None:
        raise KeyboardInterrupt


class Stops(_InRound):
    """Asks the run to stop, which it does after the round."""

    def __init__(self, event: str = "on_log", round: int = 1) -> None:
        super().__init__(event, round)

    def _act(self, control: Any) -> None:
        control.should_training_stop = True


class DiesAtStep(TrainerCallback):
    """Dies in the midst of a local round, once: after the local step number `step`, counted over clients."""

    may_differ = True

    def __init__(self, step: int = 1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = step, error

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def flip_bit(path: Path, where: float = 1.0) -> None:
    """Damages a byte of a file, by default the last: of a safetensors file, a number."""
    content = bytearray(path.read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def run_recipe(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    """What `python <recipe> --key value ...` does, in this process; returns `output_dir`."""
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *words])
    main()
    return settings["output_dir"]
