# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Local rounds of single clients, a look at those of a federation, and what its clients keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fed_trainer.client.tasks import Task, Trained


def local_round(trainer: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and figures of one local round; the arguments are those of its [`Task`]."""
    (trained,) = trainer.local_rounds([Task(*args, **kwargs)])
    return trained.state, trained.metrics


def after_local_rounds(monkeypatch: Any, trainer: Any, look: Callable[[Task, Trained], None]) -> None:
    """Have `look` called after every local round, in which it may change what was trained."""
    local_rounds = trainer.local_rounds

    def watched(tasks: list[Task]) -> list[Trained]:
        results = local_rounds(tasks)
        for task, trained in zip(tasks, results, strict=True):
            look(task, trained)
        return results

    monkeypatch.setattr(trainer, "local_rounds", watched)


def kept_by(trainer: Any, client: str) -> dict[str, dict[str, Any]]:
    """What a client keeps by now, by part."""
    return trainer.client.store.read(client, trainer.federation.server.visits.counted.get(client))
