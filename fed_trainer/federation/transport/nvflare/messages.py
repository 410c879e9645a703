# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What travels in an NVFlare task and in its result, and what both sides are given by NVFlare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


__all__ = [
    "ANSWER",
    "CONTENT",
    "FIELDS",
    "GREETING",
    "HELLO",
    "MESSAGE",
    "OVER",
    "STRANGER",
    "Attachment",
    "Courier",
    "LostError",
    "Message",
    "message_of",
]

# from the coordinator: who is there; a message; the run is over
GREETING, MESSAGE, OVER = "greeting", "message", "over"
# from a client: this process is; what it answers to a message; that the message was for a process before it
HELLO, ANSWER, STRANGER = "hello", "answer", "stranger"

# where it stands in an `FLModel`: in its `meta`, and in its `params`
FIELDS, CONTENT = "fed_trainer", "content"


class LostError(RuntimeError):
    """The connection with the site's NVFlare process is over; the message says why."""


@dataclass(frozen=True)
class Message:
    """
    What one side says to the other.

    Args:
        kind (`str`):
            `"greeting"`, `"message"` or `"over"` from the coordinator; `"hello"`, `"answer"` or `"stranger"` from a
            client.
        fields (`dict[str, Any]`):
            Texts and numbers: `run`, `generation`, `session`, `number`, `reason`, `is_finished`.
        content (`bytes`):
            What it carries.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    content: bytes = b""


def message_of(meta: Any, params: Any) -> Message:
    """
    The message in what NVFlare has carried.

    Raises:
        ValueError: If it is something else.
    """
    told = meta.get(FIELDS) if isinstance(meta, dict) else None
    content = params.get(CONTENT) if isinstance(params, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("kind"), str) or not isinstance(content, bytes):
        raise ValueError("it was not sent by fed-trainer")
    return Message(told["kind"], {name: value for name, value in told.items() if name != "kind"}, content)


class Courier(Protocol):
    """What NVFlare gives a coordinator."""

    def clients(self) -> list[str]:
        """The sites that take part in the job."""

    def give(
        self, client: str, message: Message, answered: Callable[[Message], None], failed: Callable[[str], None]
    ) -> object:
        """
        Send a message. One of the two is called with what has come of it, at some time, in another thread.

        Returns:
            `object`: What `take_back` needs.
        """

    def take_back(self, given: object) -> None:
        """Do not send a message any more, if the site has not fetched it yet."""

    def why_over(self) -> str | None:
        """Why the job ends, if it was aborted."""


class Attachment(Protocol):
    """What NVFlare gives a client."""

    def open(self, wait: float) -> None:
        """
        Wait until a job attaches this process, at most these seconds.

        Raises:
            LostError: If none does.
            NetworkError: If the profile cannot be used.
        """

    def receive(self, wait: float) -> Message | None:
        """
        The next message, if it comes within these seconds.

        Raises:
            LostError: If the connection is over.
        """

    def answer(self, message: Message) -> None:
        """
        Answer the message that was received last.

        Raises:
            LostError: If the connection is over.
        """

    def close(self) -> None:
        """Leave the job."""
