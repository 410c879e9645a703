# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...state.adapter_state import AdapterState
from ...state.low_rank import LowRank
from .limits import LARGEST_VALUE, relative_limit


__all__ = ["Aggregator", "ClientUpdate"]

WEIGHTS = ("examples", "uniform", "tokens")


@dataclass
class ClientUpdate:
    """
    What a client sends back after a local round.

    Args:
        client (`str`):
            Name of the client.
        num_examples (`int`, *optional*):
            Number of training examples the client holds; `None` if it keeps that to itself, which rules that weight
            by it cannot take.
        delta (`dict[str, torch.Tensor]`):
            Local adapter minus what the client was sent, keyed as PEFT saves it.
        metrics (`dict[str, Any]`):
            Figures for the record; no aggregation reads them.
        num_steps (`int`, *optional*):
            Number of local optimiser steps, for [`FedNova`].
        scalings (`dict[str, float]`, *optional*):
            The client's own `lora_alpha / r` by module, where its rank and therefore its scaling is not the server's.
        base_digest (`str`, *optional*):
            [`base_digest`] of the base model the client trained on.
        num_tokens (`int`, *optional*):
            Number of tokens that carry a loss in what the client holds, for rules with `weights="tokens"`.
        extras (`dict[str, torch.Tensor]`):
            What the local objective sends beside the delta ([`LocalObjective.to_server`]).
    """

    client: str
    num_examples: int | None
    delta: AdapterState
    metrics: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    scalings: dict[str, float] | None = None
    base_digest: str | None = None
    num_tokens: int | None = None
    extras: AdapterState = field(default_factory=dict)


class Aggregator(ABC):
    """
    Turns the updates of one round into one; takes them one at a time, so memory need not grow with their number.

    A rule sees only what is shared (see [`TensorRoles`]). A round is `begin`, an `add` per client and one `finish`.

    Attributes:
        sparse_rounds (`int`):
            Rounds of a first stage, which trains a sparse change of the target weights in place of the adapter; for
            most rules there is none.
        density (`float`):
            Share of every target weight that this stage trains.
    """

    sparse_rounds: int = 0
    density: float = 0.0

    @classmethod
    def options_from(cls, args: TrainingArguments) -> dict[str, Any]:
        """
        Options that follow from the settings of the local rounds, beside those that the user gives.

        Raises:
            ValueError: If the user has given others.
        """
        return {}

    @classmethod  # noqa: B027 (few rules need it)
    def check_ranks(cls, ranks: Collection[int], largest: int) -> None:
        """
        Refuse ranks of all the clients that the rule could not work with, beside the `largest`, that of the adapter.

        Raises:
            ValueError: Saying what to set.
        """

    @property
    def numbers(self) -> tuple[str, ...]:
        """Fields of a [`ClientUpdate`] that the rule reads beside the delta, a number each."""
        return ("num_examples",)

    @abstractmethod
    def begin(self, state: AdapterState, round: int = 1) -> None:
        """Start round number `round` from the global adapter `state`, dropping what an abandoned round left."""

    @abstractmethod
    def add(self, update: ClientUpdate) -> None:
        """
        Take one client's update, which is not changed. An update that does not fit is refused before any of it counts,
        so the round can go on without it. Rules that compare clients keep the tensors themselves until `finish`.

        Raises:
            ValueError: If the update does not fit.
        """

    def check(self, update: ClientUpdate) -> None:  # noqa: B027 (few rules need it)
        """Raise what `add` would raise, and change nothing."""

    def largest_value(self, state: AdapterState) -> float:
        """
        The largest magnitude in a client's delta with which the rule is finite and accurate in float32, for the global
        adapter `state`: [`relative_limit`], unless a rule bounds what it takes.
        """
        return min(LARGEST_VALUE, relative_limit(state))

    def bear(self, num_faulty: int) -> None:  # noqa: B027
        """
        Before `finish`: so many clients of the round were refused for what they sent, so they are not among the
        updates.
        """

    @abstractmethod
    def finish(self) -> AdapterState:
        """The aggregated delta of the round, in float32; the caller's from then on."""

    @property
    def min_updates(self) -> int:
        """The least number of updates the rule can work with; rules that bear arbitrary clients need more than one."""
        return 1

    @property
    def base_change(self) -> dict[str, LowRank]:
        """
        After `finish`: what the rule adds to base weights, by module, as factors `left (out, k)`, `right (k, in)` with
        the scaling in them. Empty for most rules.
        """
        return {}

    def state_dict(self) -> AdapterState:
        """What the rule remembers between rounds, as flat names for safetensors; copies. Nothing for most rules."""
        return {}

    def load_state_dict(self, state: AdapterState) -> None:
        """
        Take over a `state_dict`; an empty one is that of a rule that has seen no round.

        Raises:
            ValueError: If it is that of another rule.
        """
        if state:
            raise ValueError(
                f"The state has {next(iter(state))!r}, which {type(self).__name__} does not keep. Resume with the "
                "aggregation the run was started with."
            )


def check_weights(weights: object, name: str = "weights", choices: tuple[str, ...] = WEIGHTS) -> None:
    """Refuse what is no way to weight clients."""
    if weights not in choices:
        raise ValueError(f"`{name}` should be one of {list(choices)} but the value passed is {weights!r}")


def numbers_of(weights: str) -> tuple[str, ...]:
    """The fields of a [`ClientUpdate`] that `weight_of` reads."""
    return {"examples": ("num_examples",), "uniform": (), "tokens": ("num_tokens",)}[weights]


def weights_of(rule: Aggregator) -> str:
    """By what of the clients a rule weights them: one of `weight_of`'s `weights`; those of the user's own, too."""
    return next((weights for weights in WEIGHTS if set(numbers_of(weights)) & set(rule.numbers)), "uniform")


def weight_of(update: ClientUpdate, weights: str) -> int:
    """
    The weight of a client in a mean.

    Args:
        update ([`ClientUpdate`]):
            Its update.
        weights (`str`):
            `"examples"`: its number of examples, `"uniform"`: 1, `"tokens"`: its number of tokens that carry a loss.

    Raises:
        ValueError: If it does not say its number of examples, or of tokens.
    """
    if weights == "uniform":
        return 1
    if weights == "examples":
        if update.num_examples is None:
            raise ValueError(
                f"`weights='examples'`, but client {update.client!r} does not say its number of examples. Weight all "
                "clients alike: `weights='uniform'`."
            )
        return update.num_examples
    if update.num_tokens is None:
        raise ValueError(
            f"`weights='tokens'`, but client {update.client!r} does not say its number of tokens (`num_tokens`). "
            "Fill it in where the update is made, or weight by examples."
        )
    return update.num_tokens


def check_tensors(update: ClientUpdate, reference: AdapterState, partial: bool = False) -> None:
    """Refuse an update without the tensors of `reference`, or with other shapes, which could broadcast."""
    for key, expected in reference.items():
        if key not in update.delta:
            if partial:
                continue
            raise ValueError(
                f"The update of client {update.client!r} lacks the tensor {key}. Leave the client out of the "
                "round, or, if clients train different layers, aggregate with `partial=True`."
            )
        if update.delta[key].shape != expected.shape:
            raise ValueError(
                f"The tensor {key} of client {update.client!r} has the shape {tuple(update.delta[key].shape)} "
                f"instead of {tuple(expected.shape)}. Leave the client out, or give all clients the same PEFT config."
            )
