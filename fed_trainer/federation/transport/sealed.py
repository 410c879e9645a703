# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A way between machines on which only known sites speak: every message is signed, and encrypted if asked for.

What is signed says which message it is ([`Header`]), so that none can be repeated in another's place: a client's
session is new in every process, and numbers only grow. An answer names the message that it answers by its SHA-256, so
that it cannot be repeated to a coordinator that has begun anew, whatever the store makes it believe of its generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.utils import logging

from .ends import ClientEnd, Envelope, Member, Network, NetworkError, ServerEnd
from .introductions import introduce, is_introduction, offered_by, open_introduction
from .keys import Identity, PublicIdentity
from .known_keys import KnownKeys, UntrustedKeyError
from .seal import Header, RefusedMessageError, seal, unseal


__all__ = ["Sealed", "SealedClientEnd", "SealedServerEnd", "refuse_a_greeting_with_keys"]

logger = logging.get_logger(__name__)

ALL = "*"  # the recipient of a greeting
EVERY_GENERATION = 0  # of a hello, which stays when the run is taken up again
NOTHING = bytes(hashlib.sha256().digest_size)  # what an answer to a message that could not be read answers


class Sealed(Network):
    """
    Another [`Network`], on which messages are signed.

    Args:
        network ([`Network`]):
            What carries them.
        identity ([`Identity`]):
            The keys of this side. A client joins under their name.
        known ([`KnownKeys`]):
            Whom this side trusts: at the coordinator the clients, at a client the coordinator. Whoever is in the list
            of a client may coordinate it, so that other clients do not belong there.
        encrypts (`bool`, *optional*, defaults to `False`):
            At the coordinator: encrypt the messages between it and each client. At a client: refuse a coordinator that
            does not.
    """

    def __init__(self, network: Network, identity: Identity, known: KnownKeys, encrypts: bool = False) -> None:
        self._network, self._identity, self._known, self.encrypts = network, identity, known, encrypts

    def server_end(self) -> SealedServerEnd:
        return SealedServerEnd(self._network.server_end(), self._identity, self._known, self.encrypts)

    def client_end(self, client: str) -> SealedClientEnd:
        if client != self._identity.name:
            raise ValueError(
                f"The keys are those of {self._identity.name!r}, but the client is called {client!r}: join under the "
                "name of the keys, or make keys for this name."
            )
        return SealedClientEnd(self._network.client_end(client), self._identity, self._known, self.encrypts)


def refuse_a_greeting_with_keys(greeting: bytes) -> None:
    """
    What a client without keys asks of a greeting.

    Raises:
        NetworkError: If the coordinator lets only known clients in.
    """
    if is_introduction(greeting):
        raise NetworkError(
            "The coordinator of this run lets only clients with known keys take part, and this one has none. Make "
            "keys, send their public line to the coordinator, and join with them."
        )


@dataclass
class _Asked:
    """What a process was sent and has not answered: by number the SHA-256 of the message."""

    session: str
    digests: dict[int, bytes] = field(default_factory=dict)


class SealedServerEnd(ServerEnd):
    """The coordinator's end of [`Sealed`]."""

    def __init__(self, inner: ServerEnd, identity: Identity, known: KnownKeys, encrypts: bool) -> None:
        self._inner, self._identity, self._known, self._encrypts = inner, identity, known, encrypts
        self._run = ""
        self._seen: dict[str, Member] = {}  # by name the last process that was looked at
        self._members: dict[str, Member] = {}  # and the last one that was let in
        self._warned: set[tuple[str, str]] = set()
        self._asked: dict[str, _Asked] = {}

    @property
    def generation(self) -> int:
        return self._inner.generation

    def open(self, run: str) -> None:
        self._run = run
        self._inner.open(run)

    def begin(self) -> None:
        self._inner.begin()

    def greet(self, greeting: bytes) -> None:
        told = json.dumps({"encrypts": self._encrypts}).encode() + b"\n" + greeting
        header = Header(self._run, self._identity.name, ALL, self.generation, "", 0, "greeting")
        self._inner.greet(introduce(told, header, self._identity))

    def look_for(self, clients: Sequence[str] | None) -> dict[str, Member]:
        for client, member in self._inner.look_for(clients).items():
            if self._seen.get(client) == member:
                continue
            self._seen[client] = member
            try:
                self._members[client] = Member(member.session, self._open_hello(client, member))
            except (RefusedMessageError, UntrustedKeyError) as refused:
                if (client, member.session) not in self._warned:
                    self._warned.add((client, member.session))
                    logger.warning(f"A process that calls itself {client!r} is not let in. {refused}")
        return dict(self._members)

    def _open_hello(self, client: str, member: Member) -> bytes:
        """What a process says of itself, if it has the client's keys."""
        if not is_introduction(member.hello):
            raise RefusedMessageError("It shows no keys, but this run asks for them: start it with its keys.")
        offered = offered_by(member.hello)
        if offered.name != client:
            raise UntrustedKeyError(f"It shows the keys of {offered.name!r}: start it with its own.")
        header = Header(self._run, client, self._identity.name, EVERY_GENERATION, member.session, 0, "hello")
        hello = open_introduction(member.hello, header, offered, self._identity)
        self._known.accept(offered)  # after the signature, so that nobody gets a key of somebody else accepted
        return hello

    def next_number(self, client: str, session: str) -> int:
        return self._inner.next_number(client, session)

    def send(self, client: str, session: str, content: bytes) -> int:
        number = self.next_number(client, session)
        header = Header(self._run, self._identity.name, client, self.generation, session, number, "down")
        sealed = seal(content, header, self._identity, self._known.key_of(client) if self._encrypts else None)
        if client not in self._asked or self._asked[client].session != session:
            self._asked[client] = _Asked(session)
        self._asked[client].digests[number] = hashlib.sha256(sealed).digest()
        return self._inner.send(client, session, sealed)

    def arrived(self) -> list[Envelope]:
        return self._inner.arrived()

    def read(self, envelope: Envelope) -> bytes:
        client, session, number = envelope.client, envelope.session, envelope.number
        sealed = self._inner.read(envelope)
        header = Header(self._run, client, self._identity.name, self.generation, session, number, "up")
        content = unseal(sealed, header, self._known.key_of(client), self._identity, must_be_encrypted=self._encrypts)
        if content[: len(NOTHING)] not in (self._digest_of(client, session, number), NOTHING):
            raise RefusedMessageError(
                f"The answer of {client!r} is to another message {number} than it was sent: it was repeated."
            )
        return content[len(NOTHING) :]

    def _digest_of(self, client: str, session: str, number: int) -> bytes | None:
        """That of a message, which is forgotten with those before it."""
        asked = self._asked.get(client)
        if asked is None or asked.session != session:
            return None
        digest = asked.digests.get(number)
        asked.digests = {later: kept for later, kept in asked.digests.items() if later > number}
        return digest

    def show(self, note: dict[str, object]) -> None:
        self._inner.show(note)

    def end_round(self) -> None:
        self._inner.end_round()

    def close(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        self._inner.close(reason, is_finished, is_void)


class SealedClientEnd(ClientEnd):
    """A client's end of [`Sealed`]."""

    def __init__(self, inner: ClientEnd, identity: Identity, known: KnownKeys, encrypts: bool) -> None:
        self._inner, self._identity, self._known, self._encrypts = inner, identity, known, encrypts
        self.client = inner.client
        self._run = ""
        self._coordinator: PublicIdentity | None = None
        self._last = (0, 0)  # generation and number of the last message that was taken
        self._read: dict[int, bytes] = {}  # the SHA-256 of that message, by its number

    @property
    def session(self) -> str:
        return self._inner.session

    @property
    def generation(self) -> int:
        return self._inner.generation

    def look_for_run(self) -> tuple[str, int, bytes] | None:
        found = self._inner.look_for_run()
        if found is None:
            return None
        run, generation, greeting = found
        try:
            return run, generation, self._open_greeting(run, generation, greeting)
        except (RefusedMessageError, UntrustedKeyError) as refused:
            raise NetworkError(f"This client does not take part in the run {run!r}. {refused}") from refused

    def _open_greeting(self, run: str, generation: int, greeting: bytes) -> bytes:
        """What the coordinator shows, if it is one that this client knows."""
        if not is_introduction(greeting):
            raise RefusedMessageError(
                "Its coordinator shows no keys, so that nobody knows who it is: ask for it to be started with keys, "
                "or join without."
            )
        offered = offered_by(greeting)
        if self._known.names:
            self._known.key_of(offered.name)  # on first use one coordinator is accepted, and no second one
        content = open_introduction(
            greeting, Header(run, offered.name, ALL, generation, "", 0, "greeting"), offered, self._identity
        )
        coordinator = self._known.accept(offered)
        told, _, shown = content.partition(b"\n")
        is_encrypted = json.loads(told)["encrypts"]
        if self._encrypts and not is_encrypted:
            raise RefusedMessageError(
                f"Its coordinator {coordinator.name!r} does not encrypt, which this client insists on: ask for it to "
                "be started so that it does."
            )
        self._run, self._coordinator, self._encrypts = run, coordinator, is_encrypted
        return shown

    def enrol(self, hello: bytes) -> None:
        header = Header(
            self._run, self.client, self._known_coordinator.name, EVERY_GENERATION, self.session, 0, "hello"
        )
        self._inner.enrol(introduce(hello, header, self._identity))

    def look(self) -> tuple[int, bytes | str] | None:
        found = self._inner.look()
        if found is None:
            return None
        number, sealed = found
        self._read = {}
        if isinstance(sealed, str):
            return number, sealed
        try:
            content = self._open(number, sealed)
        except RefusedMessageError as refused:
            return number, str(refused)
        self._last = (self.generation, number)
        self._read = {number: hashlib.sha256(sealed).digest()}
        return number, content

    def _open(self, number: int, sealed: bytes) -> bytes:
        if (self.generation, number) <= self._last:
            raise RefusedMessageError(
                f"The message {number} of generation {self.generation} was repeated: {self._last[1]} of "
                f"{self._last[0]} was read before it."
            )
        coordinator = self._known_coordinator
        header = Header(self._run, coordinator.name, self.client, self.generation, self.session, number, "down")
        return unseal(sealed, header, coordinator, self._identity, must_be_encrypted=self._encrypts)

    def reply(self, number: int, content: bytes) -> None:
        coordinator = self._known_coordinator
        header = Header(self._run, self.client, coordinator.name, self.generation, self.session, number, "up")
        content = self._read.get(number, NOTHING) + content
        self._inner.reply(number, seal(content, header, self._identity, coordinator if self._encrypts else None))

    def close(self) -> None:
        self._inner.close()

    @property
    def _known_coordinator(self) -> PublicIdentity:
        assert self._coordinator is not None, "`look_for_run` comes first"
        return self._coordinator
