# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ...state.adapter_state import AdapterState


__all__ = ["Pipeline", "Step"]


class Step(ABC):
    """
    One step of a message: what its sender does to the tensors, and what its receiver undoes.

    What a step is, it states itself. What does not go together is refused from these statements, not from lists of
    names.

    Attributes:
        linear (`bool`):
            Whether the sum of encoded messages is the encoded sum, so that somebody may add up what nobody can read.
        lossless (`bool`):
            Whether `decode` gives back every bit.
        unbiased (`bool`):
            Whether it gives back the tensors in expectation.
        needs_memory (`bool`):
            Whether a client has to keep something from round to round, such as what was not sent yet. There is no
            place for it so far, so such a step is refused.
        needs_returning_clients (`bool`):
            Whether it works only if a client comes back soon, as what it keeps grows old.
    """

    linear: bool = False
    lossless: bool = False
    unbiased: bool = False
    needs_memory: bool = False
    needs_returning_clients: bool = False

    @abstractmethod
    def encode(self, state: AdapterState, seed: int) -> AdapterState:
        """
        What is sent of `state`, which is not changed.

        Args:
            state (`dict[str, torch.Tensor]`):
                On the CPU, of any dtypes.
            seed (`int`):
                Seed of whatever is drawn: the same message is encoded to the same bits.

        Raises:
            ClientError: If it cannot be sent, in words that may stand in the record.
        """

    @abstractmethod
    def decode(self, state: AdapterState, like: Mapping[str, torch.Tensor]) -> AdapterState:
        """
        What was meant by what came in; it may be anything, and what is not as `encode` makes it is left as it is.

        Args:
            state (`dict[str, torch.Tensor]`):
                What came in.
            like (`Mapping[str, torch.Tensor]`):
                Tensors of the names, shapes and dtypes that were encoded: what comes in may lie about them.
        """


class Pipeline:
    """
    The steps of a message, in the order of its sender; its receiver takes them the other way round.

    Without steps a message is the tensors themselves.

    Args:
        steps (`Sequence[Step]`, *optional*):
            The steps.
    """

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        self.steps = list(steps)

    def encode(self, state: AdapterState, seed: int = 0) -> AdapterState:
        """What is sent of `state`; see [`Step.encode`]."""
        for step in self.steps:
            state = step.encode(state, seed)
        return state

    def decode(self, state: AdapterState, like: Mapping[str, torch.Tensor]) -> AdapterState:
        """What was meant; see [`Step.decode`]."""
        for step in reversed(self.steps):
            state = step.decode(state, like)
        return state

    @property
    def is_linear(self) -> bool:
        """Whether sums can be formed of encoded messages."""
        return all(step.linear for step in self.steps)

    @property
    def is_lossless(self) -> bool:
        """Whether every bit arrives."""
        return all(step.lossless for step in self.steps)

    def check(self, needs_exact: str | None, some_are_sampled: bool) -> None:
        """
        Refuse what does not go together.

        Args:
            needs_exact (`str`, *optional*):
                What of the run needs that updates arrive as they were sent, in words; nothing, if not given.
            some_are_sampled (`bool`):
                Whether a round has fewer clients than the run.

        Raises:
            ValueError: Naming the step.
        """
        for step in self.steps:
            name = type(step).__name__
            if needs_exact is not None and not step.lossless:
                raise ValueError(
                    f"{needs_exact} draws the same conclusions on both sides from one update, but {name} changes "
                    "it on the way. Send it as it is, or use another one."
                )
            if step.needs_memory:
                raise ValueError(
                    f"{name} has to keep something at the client from round to round, for which there is no place "
                    f"yet. Use "
                    "a step without memory."
                )
            if some_are_sampled and step.needs_returning_clients:
                raise ValueError(
                    f"{name} keeps at a client what it has not sent yet, but a round has only some of the clients, "
                    "so that it may be old when they come back. Leave `clients_per_round` out, or send whole updates."
                )
