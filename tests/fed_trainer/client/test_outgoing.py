# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What leaves a client is on a list, in words, and what may not leave is held back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.client.outgoing import OUTGOING, contents, held_back, refuse_unlisted
from fed_trainer.client.policy import MayLeave, Policy
from fed_trainer.federation.packet import Packet
from fed_trainer.state.client_errors import ClientError


# of every field an example; the numbers and labels of the data are such that they would be seen
META: dict[str, Any] = {
    "round": 3,
    "client": "ward",
    "versions": {"torch": "2.9"},
    "has_held_out": True,
    "base_digest": "ab" * 32,
    "num_examples": 8101,
    "num_tokens": 8102,
    "label_counts": {"sepsis": 8103},
    "num_steps": 7,
    "numbers": ["num_steps"],
    "figures": {
        "train_loss": 0.8104,
        "num_steps": 7,
        "epoch": 0.8105,
        "training_metrics": {"entropy": 0.8106, "num_tokens": 8107.0},
    },
    "metrics": {"eval_loss": 0.8108, "eval_samples_per_second": 8109, "eval_runtime": 81.1, "eval_accuracy": 0.8111},
    "moved": True,
    "has_rate": True,
    "seconds": {"prepare": 8112.0},
    "reason": "its local round failed: OutOfMemoryError",
    "is_damaged": True,
}
SWITCHES = [entry.name for entry in fields(MayLeave)]
# what a policy holds back, by its field: the whole, or names within
HELD_BACK = {
    "example_counts": {
        "num_examples": None,
        "num_tokens": None,
        "label_counts": None,
        "seconds": {},
        "figures": {"train_loss": 0.8104, "num_steps": 7, "training_metrics": {"entropy": 0.8106}},
        "metrics": {"eval_loss": 0.8108, "eval_accuracy": 0.8111},
    },
    "label_counts": {"label_counts": None},
    "metrics": {
        "has_held_out": None,
        "figures": {"figures_withheld": True},
        "metrics": {"figures_withheld": True},
        "seconds": {},
    },
    "client_name": {},  # the coordinator knows it; the run that would publish it is refused
}


def test_there_is_an_example_of_every_field() -> None:
    assert META.keys() == OUTGOING.keys()
    assert {switch for field in OUTGOING.values() for switch in field.closed_by} == set(SWITCHES) - {"client_name"}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_holds_back_what_it_names(switch: str) -> None:
    before = repr(META)
    assert held_back(META, [switch]) == META | HELD_BACK[switch]
    assert held_back(META, []) == META
    assert repr(META) == before


@given(closed=st.sets(st.sampled_from(SWITCHES)), further=st.sets(st.sampled_from(SWITCHES)))
def test_what_holds_back_more_lets_out_no_more(closed: set[str], further: set[str]) -> None:
    def told(closed: set[str]) -> set[tuple[str, str]]:
        packet = Packet("update", {}, held_back(META, closed))
        return {
            (name, quote) for name, content in contents(packet).items() for quote in content.quotes or (content.words,)
        }

    assert told(closed | further) <= told(closed)


def test_a_policy_tightens_by_its_switches() -> None:
    policy = Policy(may_leave={"metrics": False, "label_counts": True, "client_name": True})
    assert policy.tightened(META) == META | HELD_BACK["metrics"]


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (Packet("update", {}, {"round": 1, "rows": ["secret"]}), "the field 'rows' \\('update'\\)"),
        (Packet("update", {"gradients/a": torch.zeros(1)}, {}), "the tensor 'gradients/a'"),
        (Packet("update", {"delta": torch.zeros(1), "deltas/a": torch.zeros(1)}, {}), "the tensor 'deltas/a'"),
        (Packet("metrics", {"delta/a": torch.zeros(1)}, {}), "the tensor 'delta/a' \\('metrics'\\)"),
        (Packet("joined", {"extras/a": torch.zeros(1)}, {}), "the tensor 'extras/a'"),
        (Packet("train", {}, {}), "a message of the kind 'train'"),
    ],
)
def test_nothing_leaves_that_is_not_on_the_list(packet: Packet, expected: str) -> None:
    with pytest.raises(ClientError, match=f"it would send {expected}"):
        refuse_unlisted(packet)


def test_what_is_on_the_list_may_leave() -> None:
    refuse_unlisted(Packet("update", {"delta/a": torch.zeros(1), "extras/b": torch.zeros(1)}, META))
    refuse_unlisted(Packet("failed", {}, META))


def test_contents_are_words_and_names_and_no_value() -> None:
    tensors = {
        "delta/a": torch.full((2, 3), 81.13),
        "delta/b": torch.full((2,), 81.14, dtype=torch.bfloat16),
        "extras/norm": torch.tensor(81.15),
    }
    told = {name: str(content) for name, content in contents(Packet("update", tensors, META)).items()}
    assert told.keys() == META.keys() | {"delta", "extras"}
    assert told["delta"] == "change of the trained weights: 2 tensors of bfloat16, float32, 28 bytes"
    assert told["extras"] == "numbers that the local objective sends along: 1 tensor of float32, 4 bytes"
    assert told["figures"] == (
        "figures of the training: train_loss, num_steps, epoch, training_metrics/entropy, training_metrics/num_tokens"
    )
    assert told["label_counts"] == "number of examples by label"
    assert told["reason"] == "reason: its local round failed: OutOfMemoryError"
    text = " ".join(told.values())
    assert "81" not in text and "sepsis" not in text


def test_what_is_not_said_is_not_told() -> None:
    meta = {"num_tokens": None, "label_counts": {}, "numbers": [], "moved": False, **HELD_BACK["metrics"]}
    assert contents(Packet("update", {}, meta)).keys() == {"moved"}
