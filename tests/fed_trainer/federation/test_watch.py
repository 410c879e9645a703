# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What whoever watches a run between machines is shown."""

from __future__ import annotations

import copy
from typing import Any

from fed_trainer.federation.watch import Watch


def test_states_bytes_and_losses_add_up_and_are_shown_once_a_second_at_most():
    now, shown = [0.0], []
    watch = Watch(["a", "b"], 2, lambda content: shown.append(copy.deepcopy(content)), clock=lambda: now[0])
    watch.saw("a", "at work", 1)
    watch.moved("a", 100, 0)
    watch.saw("a", "answered", 1)  # within the second
    watch.moved("a", 0, 7)
    assert [content["clients"]["a"]["state"] for content in shown] == ["at work"]
    now[0] = 1.5
    figures: dict[str, Any] = {"train_loss": 2.5, "bytes_down": 90, "bytes_up": 5}
    watch.counted("a", figures)
    assert shown[-1] == {
        "round": 1,
        "num_rounds": 2,
        "clients": {
            "a": {"state": "counted", "round": 1, "bytes_down": 100, "bytes_up": 7, "loss": 2.5},
            "b": {"state": "absent"},
        },
    }
    watch.refused("b")
    assert len(shown) == 2
    watch.end_round()  # whenever it was shown last
    assert shown[-1]["clients"]["b"]["state"] == "left out"


def test_an_evaluation_of_the_last_state_is_of_the_last_round_and_a_loss_that_is_withheld_is_none():
    shown: list[dict[str, Any]] = []
    watch = Watch(["a"], 2, shown.append)
    watch.saw("a", "at work", 3)
    watch.counted("a", {"train_loss": None})
    assert watch.content["round"] == 2 and watch.content["clients"]["a"]["loss"] is None
