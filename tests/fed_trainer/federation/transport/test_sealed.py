# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A network on which only known sites speak, over one in which anybody can change anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation.packet import Packet
from fed_trainer.federation.transport import sealed as sealed_module
from fed_trainer.federation.transport.ends import DamagedMessageError, Envelope, Member, NetworkError
from fed_trainer.federation.transport.introductions import introduce
from fed_trainer.federation.transport.keys import Identity, KeyFileError
from fed_trainer.federation.transport.known_keys import KnownKeys
from fed_trainer.federation.transport.roster import DECLINED, JOINED, Roster
from fed_trainer.federation.transport.seal import Header, seal
from fed_trainer.federation.transport.sealed import (
    Sealed,
    SealedClientEnd,
    SealedServerEnd,
    refuse_a_greeting_with_keys,
)
from fed_trainer.federation.transport.store import Store
from helpers.boards import Board, identity_of


COORDINATOR, WARD_1, WARD_2, STRANGER = map(identity_of, ("coordinator", "ward-1", "ward-2", "stranger"))
RUN, WARDS = "run-1", ["ward-1", "ward-2"]
WAYS = pytest.mark.parametrize("encrypts", [False, True], ids=["signed", "encrypted"])


class Study:
    """A coordinator and sites that know each other, with files in a folder."""

    def __init__(self, folder: Path, encrypts: bool = False, network: Any = None) -> None:
        self.folder, self.encrypts = folder, encrypts
        self.board = Board() if network is None else network

    def known(self, name: str, identities: Iterable[Identity]) -> KnownKeys:
        path = self.folder / name
        path.write_text("".join(f"{identity.public}\n" for identity in identities))
        return KnownKeys(path)

    def coordinator(self, identity: Identity = COORDINATOR, greeting: bytes = b"hello, all") -> SealedServerEnd:
        known = self.known("known of the coordinator", [WARD_1, WARD_2])
        end = Sealed(self.board, identity, known, self.encrypts).server_end()
        end.open(RUN)
        end.greet(greeting)
        return end

    def site(self, identity: Identity = WARD_1, name: str = "ward-1", insists: bool = False) -> SealedClientEnd:
        """One that has not looked for the run yet."""
        known = self.known(f"known of {name}", [COORDINATOR])
        return Sealed(self.board, identity, known, insists).client_end(name)

    def joined(self, identity: Identity = WARD_1, name: str = "ward-1", hello: bytes = b"") -> SealedClientEnd:
        end = self.site(identity, name)
        assert end.look_for_run() is not None
        end.enrol(hello)
        return end

    def asked(self, end: SealedServerEnd, client: SealedClientEnd, content: bytes = b"question") -> int:
        """Send a client a message, and let it read it; returns the number."""
        number = end.send(client.client, client.session, content)
        assert client.look() == (number, content)
        return number


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def answer(end: SealedServerEnd, client: SealedClientEnd, number: int) -> bytes:
    return end.read(Envelope(client.client, client.session, number))


# What goes through


@given(
    contents=st.lists(st.tuples(st.sampled_from(WARDS), st.binary(max_size=50), st.binary(max_size=50)), max_size=6),
    hello=st.binary(max_size=20),
    greeting=st.binary(max_size=20),
    encrypts=st.booleans(),
)
def test_what_is_said_arrives_as_it_was_said(contents, hello, greeting, encrypts, tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("study"), encrypts)
    end = study.coordinator(greeting=greeting)
    assert study.site().look_for_run() == (RUN, 1, greeting)
    clients = {identity.name: study.joined(identity, identity.name, hello) for identity in (WARD_1, WARD_2)}
    assert end.look_for(None) == {name: Member(client.session, hello) for name, client in clients.items()}
    for name, question, reply in contents:
        number = study.asked(end, clients[name], question)
        assert clients[name].look() is None
        clients[name].reply(number, reply)
        assert end.arrived() == [Envelope(name, clients[name].session, number)]
        assert answer(end, clients[name], number) == reply
    for name, client in clients.items():
        assert end.next_number(name, client.session) == 1 + sum(each[0] == name for each in contents)


@WAYS
def test_the_owner_of_the_store_reads_what_is_not_encrypted(study, encrypts):
    study.encrypts = encrypts
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    client.reply(study.asked(end, client, b"the global weights"), b"the weights of ward 1")
    for secret in (b"the global weights", b"the weights of ward 1"):
        assert (secret in study.board.everything) is not encrypts


def test_the_rest_is_passed_on(study):
    end = study.coordinator()
    end.show({"round": 1})
    end.end_round()
    end.close("done", True)
    assert end._inner.calls == [("show", {"round": 1}), ("end_round",), ("close", "done", True)]
    client = study.site()
    assert (client.client, client.session, client.generation) == ("ward-1", client._inner.session, 0)
    study.board.greeting = None
    assert client.look_for_run() is None


def test_a_client_reads_on_after_its_coordinator_has_begun_anew(study):
    client = (end := study.coordinator()) and study.joined()
    end.look_for(WARDS)
    study.asked(end, client)
    anew = study.coordinator()
    assert anew.look_for(WARDS)["ward-1"].session == client.session  # its hello is that of the first time
    client.reply(study.asked(anew, client), b"answer")
    assert answer(anew, client, 1) == b"answer"


# Answers


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@WAYS
def test_every_changed_byte_of_an_answer_is_refused(study, encrypts):
    study.encrypts = encrypts
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    client.reply(number := study.asked(end, client), b"answer")
    ((place, sealed),) = study.board.up.items()
    for byte in range(len(sealed)):
        study.board.up[place] = flipped(sealed, byte)
        with pytest.raises(DamagedMessageError):
            answer(end, client, number)
    study.board.up[place] = sealed
    assert answer(end, client, number) == b"answer"


@WAYS
@pytest.mark.parametrize("of", ["another client", "an earlier message", "another session", "another generation"])
def test_an_answer_in_the_place_of_another_is_refused(study, encrypts, of):
    study.encrypts = encrypts
    end, client = study.coordinator(), study.joined()
    other = study.joined(WARD_2, "ward-2")
    end.look_for(WARDS)
    number = study.asked(end, other if of == "another client" else client)
    (other if of == "another client" else client).reply(number, b"of another")
    (sealed,) = study.board.up.values()
    study.board.up.clear()
    if of == "another session":
        client = study.joined()
    elif of == "another generation":
        end = study.coordinator()
    end.look_for(WARDS)
    number = study.asked(end, client)
    study.board.up[(end.generation, "ward-1", client.session, number)] = sealed
    reason = {
        "another client": "`sender` is 'ward-2', but 'ward-1' is expected",
        "an earlier message": "`number` is 1, but 2 is expected",
        "another session": "`session` is 'session-1', but 'session-3' is expected",
        "another generation": "`generation` is 1, but 2 is expected",
    }[of]
    with pytest.raises(DamagedMessageError, match=reason):
        answer(end, client, number)


def test_an_answer_of_another_run_is_refused(tmp_path):
    one, two = Study(tmp_path), Study(tmp_path)
    for study, run in ((one, "run-1"), (two, "run-2")):
        end = Sealed(study.board, COORDINATOR, study.known("known", [WARD_1])).server_end()
        end.open(run)
        end.greet(b"")
        client = study.joined()
        client.reply(study.asked(end, client), b"answer")
    two.board.up = one.board.up
    with pytest.raises(DamagedMessageError, match="`run` is 'run-1', but 'run-2' is expected"):
        answer(end, client, 1)


def up(client: SealedClientEnd, kind: str = "up", sender: str = "ward-1") -> Header:
    return Header(RUN, sender, "coordinator", 1, client.session, 1, kind)


NO_DIGEST = bytes(32)
FORGERIES = {
    "signed by a stranger": lambda client: seal(NO_DIGEST, up(client), STRANGER, COORDINATOR.public),
    "signed by another client": lambda client: seal(NO_DIGEST, up(client), WARD_2, COORDINATOR.public),
    "of another kind": lambda client: seal(NO_DIGEST, up(client, "hello"), WARD_1, COORDINATOR.public),
    "in the clear": lambda client: seal(NO_DIGEST, up(client), WARD_1),
    "for another client": lambda client: seal(NO_DIGEST, up(client), WARD_1, WARD_2.public),
    "not sealed": lambda client: NO_DIGEST + b"answer",
    "empty": lambda client: b"",
    "the question itself": lambda client: next(iter(client._inner._board.down.values())),
    "too short for what it answers": lambda client: seal(b"answer", up(client), WARD_1, COORDINATOR.public),
    "to another question": lambda client: seal(bytes(31) + b"\1answer", up(client), WARD_1, COORDINATOR.public),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_answer_is_refused(study, forgery):
    study.encrypts = True
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    number = study.asked(end, client)
    study.board.up[(1, "ward-1", client.session, number)] = FORGERIES[forgery](client)
    with pytest.raises(DamagedMessageError):
        answer(end, client, number)


@WAYS
def test_an_answer_is_not_repeated_to_a_coordinator_that_is_made_to_believe_in_its_first_generation(study, encrypts):
    """The number of the generation lies in the store, whose owner can put it back: an answer names its question."""
    study.encrypts = encrypts
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    client.reply(study.asked(end, client, b"round 1"), b"the update of round 1")
    place = (1, "ward-1", client.session, 1)
    recorded = study.board.up[place]
    study.board.generation = 0
    anew = study.coordinator()
    assert anew.generation == 1 and "ward-1" in anew.look_for(WARDS)
    anew.send("ward-1", client.session, b"round 2")
    study.board.up[place] = recorded
    with pytest.raises(DamagedMessageError, match="The answer of 'ward-1' is to another message 1 than it was sent"):
        answer(anew, client, 1)


def test_what_was_sent_is_forgotten_once_it_is_answered_or_its_process_is_gone(study):
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    for _ in range(3):
        end.send("ward-1", client.session, b"void")
        number = end.send("ward-1", client.session, b"question")
        while (found := client.look()) and found[0] < number:
            pass
        client.reply(number, b"answer")
        assert answer(end, client, number) == b"answer"
        assert not end._asked["ward-1"].digests
    late = end.send("ward-1", client.session, b"question")
    client.look()
    client.reply(late, b"late")
    again = study.joined()
    end.look_for(WARDS)
    end.send("ward-1", again.session, b"question")
    assert list(end._asked) == ["ward-1"] and end._asked["ward-1"].session == again.session
    with pytest.raises(DamagedMessageError, match="it was repeated"):
        answer(end, client, late)
    again.look()
    again.reply(1, b"answer")
    assert answer(end, again, 1) == b"answer"  # what was late has taken nothing of it


# Messages to a client


@WAYS
def test_every_changed_byte_of_a_message_is_refused_and_said(study, encrypts):
    study.encrypts = encrypts
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    end.send("ward-1", client.session, b"question")
    ((place, sealed),) = study.board.down.items()
    for byte in range(len(sealed)):
        study.board.down[place] = flipped(sealed, byte)
        client._inner._number = 0
        number, reason = client.look()
        assert number == 1 and isinstance(reason, str)
    client.reply(1, b"I could not read it")
    assert answer(end, client, 1) == b"I could not read it"


def down(client: SealedClientEnd, number: int = 1, **changes: Any) -> Header:
    told = {"sender": "coordinator", "recipient": "ward-1", "generation": 1, "kind": "down", **changes}
    return Header(RUN, session=client.session, number=number, **told)


MESSAGES = {
    "signed by a stranger": (lambda client: seal(b"", down(client), STRANGER, WARD_1.public), "not signed with the"),
    "signed by a client": (lambda client: seal(b"", down(client), WARD_2, WARD_1.public), "not signed with the"),
    "said to be of a client": (lambda client: seal(b"", down(client, sender="ward-2"), WARD_2), "`sender`"),
    "for another client": (lambda client: seal(b"", down(client, recipient="ward-2"), COORDINATOR), "`recipient`"),
    "an answer": (lambda client: seal(b"", down(client, kind="up"), COORDINATOR), "`kind`"),
    "an earlier generation": (lambda client: seal(b"", down(client, generation=0), COORDINATOR), "`generation`"),
    "another number": (lambda client: seal(b"", down(client, number=2), COORDINATOR), "`number`"),
    "in the clear": (lambda client: seal(b"", down(client), COORDINATOR), "in the clear"),
    "not sealed": (lambda client: b"question", "no message of a federation"),
}


@pytest.mark.parametrize("message, reason", MESSAGES.values(), ids=MESSAGES)
def test_a_forged_message_is_refused_and_said(study, message, reason):
    study.encrypts = True
    study.coordinator()
    client = study.joined()
    study.board.down[(1, "ward-1", client.session, 1)] = message(client)
    number, said = client.look()
    assert number == 1 and isinstance(said, str) and reason in said


def test_what_the_network_cannot_read_is_passed_on(study):
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    client.reply(study.asked(end, client), b"")
    number = end.send("ward-1", client.session, b"question")
    study.board.down[(1, "ward-1", client.session, number)] = "half of it is missing"
    assert client.look() == (number, "half of it is missing")
    client.reply(number, b"it was damaged")
    assert answer(end, client, number) == b"it was damaged"


def test_what_was_read_in_another_generation_is_not_what_is_answered(study):
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    study.asked(end, client)
    anew = study.coordinator()
    anew.look_for(WARDS)
    anew.send("ward-1", client.session, b"question")
    study.board.down[(2, "ward-1", client.session, 1)] = "half of it is missing"
    assert client.look() == (1, "half of it is missing")
    client.reply(1, b"it was damaged")
    assert answer(anew, client, 1) == b"it was damaged"


def test_a_message_is_not_read_again_when_the_generation_is_put_back(study):
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    study.asked(end, client)
    anew = study.coordinator()
    anew.look_for(WARDS)
    study.asked(anew, client)
    study.board.generation = 1
    number, reason = client.look()
    assert number == 1 and "message 1 of generation 1 was repeated: 1 of 2 was read before it" in reason


# Who may take part


def forged_hello(identity: Identity, client: str, session: str, line: Identity | None = None, run: str = RUN) -> bytes:
    hello = introduce(b"", Header(run, client, "coordinator", 0, session, 0, "hello"), identity)
    if line is not None:
        hello = f"{line.public}\n".encode() + hello.partition(b"\n")[2]
    return hello


AGAIN = identity_of("ward-1", attempt=1)
MIXED = Identity("ward-1", WARD_1.signing, STRANGER.encryption)
HELLOS = {
    "without keys": (b"", "It shows no keys, but this run asks for them: start it with its keys"),
    "of a client without keys": (b"hello", "It shows no keys"),
    "another key": (forged_hello(AGAIN, "ward-1", "new"), f"{AGAIN.fingerprint}, but {WARD_1.fingerprint} is known"),
    "another key for encryption": (forged_hello(MIXED, "ward-1", "new"), f"{WARD_1.fingerprint} is known"),
    "the line of the client": (forged_hello(AGAIN, "ward-1", "new", line=WARD_1), "not signed with the key"),
    "another client": (forged_hello(WARD_2, "ward-1", "new"), "It shows the keys of 'ward-2': start it with its own"),
    "another session": (forged_hello(WARD_1, "ward-1", "old"), "`session` is 'old', but 'new' is expected"),
    "another run": (forged_hello(WARD_1, "ward-1", "new", run="run-2"), "`run` is 'run-2', but 'run-1' is expected"),
    "a line that is none": (b"fed-ed25519 abc ward-1\n", "The keys in it cannot be read"),
    "a line without end": (b"fed-ed25519 " + b"A" * 10000, "The keys in it cannot be read"),
    "a line of another spelling": (b"fed-ed25519  " + forged_hello(WARD_1, "ward-1", "new")[12:], "cannot be read"),
    "spaces after the line": (forged_hello(WARD_1, "ward-1", "new").replace(b"\n", b" \n", 1), "not written as"),
    "cut off": (forged_hello(WARD_1, "ward-1", "new")[:-1], "damaged on the way, or cut off"),
}


@pytest.mark.parametrize("hello, reason", HELLOS.values(), ids=HELLOS)
def test_a_process_that_is_not_the_client_is_not_let_in_and_named_once(study, caplog, hello, reason):
    end = study.coordinator()
    study.joined(WARD_2, "ward-2")
    study.board.members["ward-1"] = Member("new", hello)
    for _ in range(3):
        assert list(end.look_for(WARDS)) == ["ward-2"]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "'ward-1' is not let in" in record.message and reason in record.message
    study.board.members["ward-1"] = Member("new", hello + b"\0")
    assert list(end.look_for(WARDS)) == ["ward-2"] and len(caplog.records) == 1
    client = study.joined()
    assert end.look_for(WARDS)["ward-1"].session == client.session


def test_an_unknown_site_is_not_let_in_and_what_to_add_is_said(study, caplog):
    end = study.coordinator()
    study.joined(STRANGER, "stranger")
    assert end.look_for(None) == {}
    assert "'stranger' is unknown here" in caplog.text and str(STRANGER.public) in caplog.text


def test_a_process_that_is_not_let_in_takes_nobodys_place(study):
    end, client = study.coordinator(), study.joined(hello=b"here")
    before = end.look_for(WARDS)
    study.board.members["ward-1"] = Member("new", forged_hello(STRANGER, "ward-1", "new"))
    assert end.look_for(WARDS) == before == {"ward-1": Member(client.session, b"here")}


def test_a_hello_is_opened_once(study, monkeypatch):
    opened = []
    monkeypatch.setattr(sealed_module, "open_introduction", lambda *told: opened.append(told) or b"")
    end = study.coordinator()
    study.board.members["ward-1"] = Member("new", forged_hello(WARD_1, "ward-1", "new"))
    for _ in range(3):
        end.look_for(WARDS)
    assert len(opened) == 1


def accepting(study: Study) -> SealedServerEnd:
    """A coordinator that accepts the first key of each client."""
    known = KnownKeys(study.folder / "first", accept_first=True)
    end = Sealed(study.board, COORDINATOR, known, encrypts=True).server_end()
    end.open(RUN)
    end.greet(b"")
    return end


def test_the_first_key_of_a_client_is_the_only_one(study, caplog):
    end, client = accepting(study), study.joined()
    assert list(end.look_for(WARDS)) == ["ward-1"]
    client.reply(study.asked(end, client), b"answer")
    assert answer(end, client, 1) == b"answer"
    other = study.joined(AGAIN)
    assert end.look_for(WARDS)["ward-1"].session == client.session != other.session
    assert f"{AGAIN.fingerprint}, but {WARD_1.fingerprint} is known" in caplog.text
    assert KnownKeys(study.folder / "first").names == ["ward-1"]


@pytest.mark.parametrize("line", [WARD_1, MIXED], ids=["of somebody else", "with another key for encryption"])
def test_nobody_gets_a_key_accepted_that_he_has_not_signed_with(study, caplog, line):
    end = accepting(study)
    signer = STRANGER if line is WARD_1 else WARD_1
    study.board.members["ward-1"] = Member("new", forged_hello(signer, "ward-1", "new", line=line))
    assert end.look_for(WARDS) == {} and "is not let in" in caplog.text
    assert KnownKeys(study.folder / "first", accept_first=True).names == []


def test_a_list_that_cannot_be_written_is_an_error_of_the_coordinator(study):
    (study.folder / "first").mkdir()
    with pytest.raises(KeyFileError):
        accepting(study)


# Whom a client takes for its coordinator


def test_a_coordinator_without_keys_is_refused(study):
    end = study.board.server_end()
    end.open(RUN)
    end.greet(b"{}")
    with pytest.raises(NetworkError, match="Its coordinator shows no keys.*started with keys, or join without"):
        study.site().look_for_run()


def test_a_client_without_keys_is_told(study):
    study.coordinator()
    _, _, greeting = study.board.client_end("ward-1").look_for_run()
    with pytest.raises(NetworkError, match="lets only clients with known keys take part, and this one has none"):
        refuse_a_greeting_with_keys(greeting)
    refuse_a_greeting_with_keys(b'{"run": "run-1"}')


def test_an_unknown_coordinator_is_refused(study):
    study.coordinator(STRANGER)
    with pytest.raises(NetworkError, match="does not take part in the run 'run-1'. No key of 'stranger' is known"):
        study.site().look_for_run()


def test_a_coordinator_with_another_key_is_refused(study):
    other = identity_of("coordinator", attempt=1)
    study.coordinator(other)
    with pytest.raises(NetworkError, match=f"{other.fingerprint}, but {COORDINATOR.public.fingerprint} is known"):
        study.site().look_for_run()


@WAYS
def test_every_changed_byte_of_a_greeting_is_refused(study, encrypts):
    """Also the one that says whether messages are encrypted."""
    study.encrypts = encrypts
    study.coordinator()
    client, greeting = study.site(), study.board.greeting
    for byte in range(len(greeting)):
        study.board.greeting = flipped(greeting, byte)
        with pytest.raises(NetworkError):
            client.look_for_run()
    study.board.greeting = greeting
    assert client.look_for_run() == (RUN, 1, b"hello, all")


@pytest.mark.parametrize("place, value", [("run", "run-2"), ("generation", 7)])
def test_a_greeting_of_another_run_or_time_is_refused(study, place, value):
    study.coordinator()
    setattr(study.board, place, value)
    with pytest.raises(NetworkError, match=f"says that its `{place}` is"):
        study.site().look_for_run()


def test_the_first_coordinator_is_the_only_one(study):
    study.coordinator()
    path = study.folder / "first"
    client = Sealed(study.board, WARD_1, KnownKeys(path, accept_first=True)).client_end("ward-1")
    assert client.look_for_run() is not None and KnownKeys(path).names == ["coordinator"]
    for other, reason in ((identity_of("coordinator", 1), "is known"), (STRANGER, "No key of 'stranger' is known")):
        study.coordinator(other)
        again = Sealed(study.board, WARD_1, KnownKeys(path, accept_first=True)).client_end("ward-1")
        with pytest.raises(NetworkError, match=reason):
            again.look_for_run()
        assert KnownKeys(path).names == ["coordinator"]


def test_a_client_can_insist_on_encryption(study):
    study.coordinator()
    with pytest.raises(NetworkError, match="'coordinator' does not encrypt, which this client insists on"):
        study.site(insists=True).look_for_run()
    study.encrypts = True
    study.coordinator()
    assert study.site(insists=True).look_for_run() is not None


def test_keys_of_another_name_are_refused(study):
    with pytest.raises(ValueError, match="The keys are those of 'ward-2', but the client is called 'ward-1'"):
        study.site(WARD_2, "ward-1")


# With the parts around it


@WAYS
def test_over_a_store(tmp_path, encrypts):
    study = Study(tmp_path, encrypts, Store(f"memory://sealed-{encrypts}", lease=0.05))
    end, client = study.coordinator(), study.joined()
    try:
        roster = Roster(end, WARDS, lambda: Packet("invite", {}, {"secret": "the settings"}))
        assert roster.look() == ["ward-1"] and roster.look() == []
        number, content = client.look()
        assert Packet.from_bytes(content).meta == {"secret": "the settings"}
        client.reply(number, Packet("joined", {}, {"client": "ward-1"}).to_bytes())
        files = fsspec.filesystem("memory")
        contents = b"".join(files.cat_file(path) for path in files.find(f"/sealed-{encrypts}"))
        assert (b"the settings" in contents) is not encrypts
        (envelope,) = end.arrived()
        assert roster.is_invitation(envelope)
        roster.take(envelope)
        assert roster.state("ward-1") == JOINED
    finally:
        end.close("the test is over", True)


def test_an_answer_to_an_invitation_that_is_forged_is_refused_by_name(study, caplog):
    end, client = study.coordinator(), study.joined()
    roster = Roster(end, WARDS, lambda: Packet("invite", {}, {}))
    roster.look()
    client.look()
    envelope = Envelope("ward-1", client.session, 1)
    study.board.up[(1, "ward-1", client.session, 1)] = seal(
        bytes(32) + Packet("joined", {}, {"client": "ward-1"}).to_bytes(), up(client), STRANGER
    )
    roster.take(envelope)
    assert roster.state("ward-1") == DECLINED
    assert f"'ward-1' is not signed with the key that is known ({WARD_1.fingerprint})" in caplog.text


def test_what_is_signed_is_in_the_clear_in_the_header(study):
    """Nothing is hidden there: names, numbers and kinds can be read by the owner of the store."""
    end, client = study.coordinator(), study.joined()
    end.look_for(WARDS)
    end.send("ward-1", client.session, b"question")
    (sealed,) = study.board.down.values()
    told = json.loads(sealed[13 : 13 + int.from_bytes(sealed[9:13], "big")])
    assert told == {
        "run": RUN, "sender": "coordinator", "recipient": "ward-1", "generation": 1, "session": client.session,
        "number": 1, "kind": "down",
    }  # fmt: skip
