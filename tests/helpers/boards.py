# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A way between machines that consists of dictionaries, in which a test can do what the owner of a store can do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fed_trainer.federation.transport.ends import ClientEnd, Envelope, Member, Network, ServerEnd
from fed_trainer.federation.transport.keys import Identity


Place = tuple[int, str, str, int]  # generation, client, session, number


def identity_of(name: str, attempt: int = 0) -> Identity:
    """Keys that depend on the name only, and on which of several it is."""
    signing, encryption = (hashlib.sha256(f"{name} {attempt} {use}".encode()).digest() for use in ("sign", "encrypt"))
    return Identity(name, signing, encryption)


class Board(Network):
    """Everything that was said, for all to see and to change."""

    def __init__(self) -> None:
        self.run, self.generation, self.sessions = "", 0, 0
        self.greeting: bytes | None = None
        self.members: dict[str, Member] = {}
        self.down: dict[Place, bytes | str] = {}
        self.up: dict[Place, bytes] = {}

    def server_end(self) -> ServerEnd:
        return BoardServerEnd(self)

    def client_end(self, client: str) -> ClientEnd:
        self.sessions += 1
        return BoardClientEnd(self, client, f"session-{self.sessions}")

    @property
    def everything(self) -> bytes:
        """All bytes that lie here."""
        values = [self.greeting or b"", *(member.hello for member in self.members.values())]
        return b"".join(
            [*values, *self.up.values(), *(each for each in self.down.values() if isinstance(each, bytes))]
        )


class BoardServerEnd(ServerEnd):
    def __init__(self, board: Board) -> None:
        self._board = board
        self._numbers: dict[tuple[str, str], int] = {}
        self.calls: list[tuple[object, ...]] = []

    @property
    def generation(self) -> int:
        return self._board.generation

    def open(self, run: str) -> None:
        self._board.run = run
        self._board.generation += 1

    def greet(self, greeting: bytes) -> None:
        self._board.greeting = greeting

    def look_for(self, clients: Sequence[str] | None) -> dict[str, Member]:
        return {name: member for name, member in self._board.members.items() if clients is None or name in clients}

    def next_number(self, client: str, session: str) -> int:
        return self._numbers.get((client, session), 0) + 1

    def send(self, client: str, session: str, content: bytes) -> int:
        number = self._numbers[(client, session)] = self.next_number(client, session)
        self._board.down[(self.generation, client, session, number)] = content
        return number

    def arrived(self) -> list[Envelope]:
        return [
            Envelope(client, session, number)
            for generation, client, session, number in self._board.up
            if generation == self.generation
        ]

    def read(self, envelope: Envelope) -> bytes:
        return self._board.up.pop((self.generation, envelope.client, envelope.session, envelope.number))

    def show(self, note: dict[str, object]) -> None:
        self.calls.append(("show", note))

    def end_round(self) -> None:
        self.calls.append(("end_round",))

    def close(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        self.calls.append(("close", reason, is_finished))


class BoardClientEnd(ClientEnd):
    def __init__(self, board: Board, client: str, session: str) -> None:
        self._board, self.client, self._session = board, client, session
        self._generation = self._number = 0

    @property
    def session(self) -> str:
        return self._session

    @property
    def generation(self) -> int:
        return self._generation

    def look_for_run(self) -> tuple[str, int, bytes] | None:
        if self._board.greeting is None:
            return None
        self._generation, self._number = self._board.generation, 0
        return self._board.run, self._generation, self._board.greeting

    def enrol(self, hello: bytes) -> None:
        self._board.members[self.client] = Member(self._session, hello)

    def look(self) -> tuple[int, bytes | str] | None:
        if self._generation != self._board.generation:
            self._generation, self._number = self._board.generation, 0
        place = (self._generation, self.client, self._session, self._number + 1)
        if place not in self._board.down:
            return None
        self._number += 1
        return self._number, self._board.down[place]

    def reply(self, number: int, content: bytes) -> None:
        self._board.up[(self._generation, self.client, self._session, number)] = content
