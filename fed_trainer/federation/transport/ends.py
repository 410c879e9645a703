# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The two ends of a way between machines, on which messages travel as bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass


__all__ = [
    "ClientEnd",
    "DamagedMessageError",
    "EndedError",
    "Envelope",
    "Member",
    "Network",
    "NetworkError",
    "Pauses",
    "ServerEnd",
]

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0  # seconds between two looks
PAUSE_PER_WAIT = 0.05  # so that what is waited for is noticed with a delay of a twentieth of the time that it took


class NetworkError(RuntimeError):
    """A way between machines that cannot be used; the message says what to do."""


class DamagedMessageError(ValueError):
    """A message that is not what was sent; the message says in what."""


class EndedError(RuntimeError):
    """The run is over, or its coordinator is gone. `is_finished` says whether it has come to its end."""

    def __init__(self, message: str, is_finished: bool = False) -> None:
        super().__init__(message)
        self.is_finished = is_finished


@dataclass(frozen=True)
class Member:
    """
    A process that takes part as a client.

    Args:
        session (`str`):
            Of this process: another one under the same name has another.
        hello (`bytes`):
            What it has said of itself.
    """

    session: str
    hello: bytes


@dataclass(frozen=True)
class Envelope:
    """
    An answer that has come in, and was not read yet.

    Args:
        client (`str`), session (`str`), number (`int`):
            From whom, and the number of the message that it answers.
    """

    client: str
    session: str
    number: int


class ServerEnd(ABC):
    """The coordinator's end."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """How often the run has been taken up, from 1: messages of an earlier time are void."""

    @abstractmethod
    def open(self, run: str) -> None:
        """
        Begin to serve a run, of this id.

        Raises:
            NetworkError: If another coordinator or another run is there.
        """

    @abstractmethod
    def greet(self, greeting: bytes) -> None:
        """Show what a client has to know before it says that it takes part; once, after `open`."""

    def begin(self) -> None:  # noqa: B027
        """From now on the run can be resumed: another one may not take its place any more."""

    @abstractmethod
    def look_for(self, clients: Sequence[str] | None) -> dict[str, Member]:
        """By name those who are there, the latest process of each; of these names only, if there is a list."""

    @abstractmethod
    def next_number(self, client: str, session: str) -> int:
        """The number of the message that is sent next."""

    @abstractmethod
    def send(self, client: str, session: str, content: bytes) -> int:
        """Send a message, and return its number; of the same session an earlier one is void."""

    @abstractmethod
    def arrived(self) -> list[Envelope]:
        """The answers that have come in and were not read yet, also those that are late."""

    @abstractmethod
    def read(self, envelope: Envelope) -> bytes:
        """
        An answer that has arrived; once.

        Raises:
            DamagedMessageError: If it is not what was sent.
        """

    @abstractmethod
    def show(self, note: dict[str, object]) -> None:
        """Let whoever can look in see how the run goes: small, and only numbers and names."""

    @abstractmethod
    def end_round(self) -> None:
        """Clear away what nobody will read."""

    @abstractmethod
    def close(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        """
        Tell all that the run is over.

        Args:
            reason (`str`):
                Why.
            is_finished (`bool`):
                Whether it has come to its end.
            is_void (`bool`, *optional*, defaults to `False`):
                Whether nothing has come of it, so that another run may take its place.
        """


class ClientEnd(ABC):
    """The end of a process that takes part under a name. Nothing here waits."""

    client: str
    """The name."""

    @abstractmethod
    def look_for_run(self) -> tuple[str, int, bytes] | None:
        """
        The id of the run, the generation and the greeting of its coordinator; `None` if there is none yet.

        Raises:
            EndedError: If nobody has served for longer than the patience of this end, or the run is over.
        """

    @abstractmethod
    def enrol(self, hello: bytes) -> None:
        """Say that this process takes part."""

    @property
    @abstractmethod
    def session(self) -> str:
        """That of this process."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """That of the coordinator whose messages are read."""

    @abstractmethod
    def look(self) -> tuple[int, bytes | str] | None:
        """
        The next message and its number, if it is there; what is wrong with it as a text, if it cannot be read.

        Raises:
            EndedError: If the run is over, the coordinator is gone for longer than the patience of this end, or
                another process has joined under the same name.
        """

    @abstractmethod
    def reply(self, number: int, content: bytes) -> None:
        """Answer a message."""

    def close(self) -> None:  # noqa: B027
        """Give back what this end holds, which is nothing where it only reads and writes."""


class Network(ABC):
    """Where the two sides of a federation meet."""

    @abstractmethod
    def server_end(self) -> ServerEnd:
        """
        A coordinator's end.

        Raises:
            NetworkError: If it cannot be opened.
        """

    @abstractmethod
    def client_end(self, client: str) -> ClientEnd:
        """
        The end of a process that takes part as a client.

        Raises:
            NetworkError: If it cannot be opened.
            ValueError: For a name that it cannot carry.
        """


class Pauses:
    """
    Pauses between looks, which grow with the time in which nothing has come in, up to a limit.

    Args:
        limit (`float`):
            Seconds after which `is_over`.
        sleep, clock (`Callable`, *optional*):
            Those of `time`.
    """

    def __init__(
        self,
        limit: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._sleep, self._clock = limit, sleep, clock
        self.restart()

    def restart(self) -> None:
        """Begin to wait anew."""
        self._began = self._clock()
        self.something_came()

    def something_came(self) -> None:
        """More may be under way: look soon."""
        self._since = self._clock()

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return self._clock() - self._began >= self._limit

    def wait(self) -> None:
        """Pause."""
        now = self._clock()
        pause = min(max(FIRST_PAUSE, PAUSE_PER_WAIT * (now - self._since)), LONGEST_PAUSE)
        self._sleep(max(0.0, min(pause, self._limit - (now - self._began))))
