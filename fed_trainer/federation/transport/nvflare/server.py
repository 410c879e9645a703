# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of an NVFlare job."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers.utils import logging

from ..ends import DamagedMessageError, Envelope, Member, NetworkError, ServerEnd
from .messages import ANSWER, GREETING, HELLO, MESSAGE, OVER, STRANGER, Courier, Message


__all__ = ["NVFlareServerEnd"]

logger = logging.get_logger(__name__)

PAUSE = 5.0  # seconds after which a site is asked again of which nothing has come but an error
FAREWELL = 15.0  # seconds for the clients to hear that the run is over


@dataclass
class _Sent:
    """The last message to a client that it has not answered."""

    session: str
    number: int
    content: bytes
    given: object
    is_lost: bool = False


@dataclass(frozen=True)
class _Came:
    """What has come of a message: an answer, or why there is none."""

    client: str
    answer: Message | None
    reason: str = ""


class NVFlareServerEnd(ServerEnd):
    """
    Asks every site of the job who is there, and goes on with the process that has answered. A site has one process at
    a time: when it is gone, NVFlare says so after its heartbeats have failed, and the site is asked anew.

    A message that a site has fetched is never taken back: NVFlare would end the client's process with it. Its answer
    comes in late, and what is sent meanwhile waits for it.

    Args:
        courier ([`Courier`]):
            What NVFlare gives.
        clock, sleep, now (`Callable`, *optional*):
            `monotonic`, `sleep` and `time` of `time`.
    """

    def __init__(
        self,
        courier: Courier,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._courier, self._clock, self._sleep = courier, clock, sleep
        self._generation = max(1, int(now()))  # grows from job to job, and needs no file
        self._run, self._greeting = "", b""
        self._came: queue.SimpleQueue[_Came] = queue.SimpleQueue()  # filled by NVFlare's threads
        self._wanted: set[str] = set()  # sites that are to say who is there
        self._asked: set[str] = set()  # of them those at which the question is open
        self._not_before: dict[str, float] = {}  # by site when it is asked again
        self._members: dict[str, Member] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._sent: dict[str, _Sent] = {}
        self._answers: dict[Envelope, bytes] = {}
        self._complaints: dict[str, str] = {}  # by site the last error, to be said once
        self._heard: set[str] = set()  # have heard that the run is over

    @property
    def generation(self) -> int:
        return self._generation

    def open(self, run: str) -> None:
        self._run = run
        self._check()

    def greet(self, greeting: bytes) -> None:
        self._greeting = greeting

    def look_for(self, clients: Sequence[str] | None) -> dict[str, Member]:
        self._check()
        for client in self._courier.clients():
            if clients is None or client in clients:
                self._wanted.add(client)
        self._take_in()
        return dict(self._members)

    def next_number(self, client: str, session: str) -> int:
        return self._numbers.get((client, session), 0) + 1

    def send(self, client: str, session: str, content: bytes) -> int:
        self._check()
        if client in self._sent:
            self._courier.take_back(self._sent.pop(client).given)
        number = self._numbers[(client, session)] = self.next_number(client, session)
        self._give(client, session, number, content)
        return number

    def arrived(self) -> list[Envelope]:
        self._check()
        self._take_in()
        return list(self._answers)

    def read(self, envelope: Envelope) -> bytes:
        content = self._answers.pop(envelope, None)
        if content is None:
            raise DamagedMessageError("the answer is not there any more")
        return content

    def show(self, note: dict[str, object]) -> None:
        """In the log of the job, for those who look for it: there is no other place that the sites can read."""
        logger.debug(f"{note}")

    def end_round(self) -> None:
        """Nothing: an answer is cleared away when it is read."""

    def close(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        for sent in self._sent.values():
            self._courier.take_back(sent.given)
        if self._courier.why_over() is not None:
            return  # NVFlare tells the sites
        over = Message(OVER, {"reason": reason, "is_finished": is_finished})
        for client in self._members:
            self._courier.give(client, over, self._hears(client), lambda reason: None)
        until = self._clock() + FAREWELL
        while not self._heard.issuperset(self._members) and self._clock() < until:
            self._sleep(0.1)

    def _hears(self, client: str) -> Callable[[Message], None]:
        return lambda answer: self._heard.add(client)

    # What goes out

    def _ask(self) -> None:
        """Who is there: once at each site, until something has come of it."""
        for client in sorted(self._wanted - self._asked - self._members.keys()):
            if self._clock() >= self._not_before.get(client, 0.0):
                self._asked.add(client)
                fields = {"run": self._run, "generation": self._generation}
                self._courier.give(client, Message(GREETING, fields, self._greeting), *self._callbacks(client))

    def _give(self, client: str, session: str, number: int, content: bytes) -> None:
        fields = {"generation": self._generation, "session": session, "number": number}
        given = self._courier.give(client, Message(MESSAGE, fields, content), *self._callbacks(client))
        self._sent[client] = _Sent(session, number, content, given)

    def _callbacks(self, client: str) -> tuple[Callable[[Message], None], Callable[[str], None]]:
        return (
            lambda answer: self._came.put(_Came(client, answer)),
            lambda reason: self._came.put(_Came(client, None, reason)),
        )

    # What comes in

    def _take_in(self) -> None:
        while not self._came.empty():
            came = self._came.get()
            if came.answer is None:
                self._has_failed(came.client, came.reason)
            elif came.answer.kind == HELLO:
                self._has_come(came.client, came.answer)
            elif came.answer.kind == ANSWER:
                self._has_answered(came.client, came.answer)
            else:
                reason = "another process is there" if came.answer.kind == STRANGER else f"{came.answer.kind[:40]!r}"
                self._has_failed(came.client, reason, again=0.0)
        self._ask()

    def _has_come(self, client: str, hello: Message) -> None:
        session = str(hello.fields.get("session"))
        self._asked.discard(client)
        self._complaints.pop(client, None)
        self._members[client] = Member(session, hello.content)
        sent = self._sent.get(client)
        if sent is not None and sent.is_lost:
            if sent.session == session:  # the same process, which the message has not reached
                self._give(client, session, sent.number, sent.content)
            else:
                self._sent.pop(client)

    def _has_answered(self, client: str, answer: Message) -> None:
        session, number = str(answer.fields.get("session")), answer.fields.get("number")
        if answer.fields.get("generation") != self._generation or type(number) is not int:
            return
        sent = self._sent.get(client)
        if sent is not None and (sent.session, sent.number) == (session, number):
            self._sent.pop(client)
        if 1 <= number < self.next_number(client, session):
            self._answers[Envelope(client, session, number)] = answer.content

    def _has_failed(self, client: str, reason: str, again: float = PAUSE) -> None:
        """Nothing has come of a message: who is there is not known any more."""
        self._asked.discard(client)
        self._members.pop(client, None)
        self._not_before[client] = self._clock() + again
        if client in self._sent:
            self._sent[client].is_lost = True
        if self._complaints.get(client) != reason:
            self._complaints[client] = reason
            logger.warning(f"Nothing has come of a message to client {client!r}: {reason}. The site is asked again.")

    def _check(self) -> None:
        why = self._courier.why_over()
        if why is not None:
            raise NetworkError(
                f"The NVFlare job ends: {why}. Submit it again to go on: the run is resumed from its last checkpoint."
            )
