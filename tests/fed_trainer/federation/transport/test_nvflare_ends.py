# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Both ends of an NVFlare job, over a job in this process: who is there, what comes back, and what does not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.client.process import take_part
from fed_trainer.federation.packet import Packet
from fed_trainer.federation.transport import Packets
from fed_trainer.federation.transport.ends import DamagedMessageError, EndedError, Envelope, Network, NetworkError
from fed_trainer.federation.transport.exchange import Exchange
from fed_trainer.federation.transport.keys import Identity
from fed_trainer.federation.transport.known_keys import KnownKeys
from fed_trainer.federation.transport.nvflare import NVFlareJob
from fed_trainer.federation.transport.nvflare.client import NVFlareClientEnd
from fed_trainer.federation.transport.nvflare.messages import CONTENT, FIELDS, Message, message_of
from fed_trainer.federation.transport.nvflare.server import FAREWELL, PAUSE, NVFlareServerEnd
from fed_trainer.federation.transport.roster import Roster
from fed_trainer.federation.transport.sealed import Sealed
from fed_trainer.federation.visits import Visits
from fed_trainer.state.client_errors import TurnFailedError
from helpers.nvflare_job import Attached, Job


class House:
    """A job with its coordinator's end, and a clock that stands still unless somebody sleeps."""

    def __init__(self, sites: str = "ab") -> None:
        self.job, self.time = Job(sites), 100.0
        self.end = NVFlareServerEnd(self.job, lambda: self.time, self.sleep, lambda: 1000.5)
        self.end.open("run-1")
        self.end.greet(b"greeting")

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def process(self, site: str) -> NVFlareClientEnd:
        """A process that is attached, and has seen no message."""
        return NVFlareClientEnd(Attached(self.job, site), site, 10.0)

    def member(self, site: str, hello: bytes = b"") -> NVFlareClientEnd:
        """A process that has said that it is there."""
        process = self.process(site)
        self.end.look_for([site])
        while process.look_for_run() is None:
            self.end.look_for([site])
        process.enrol(hello)
        assert self.end.look_for([site])[site].session == process.session
        return process


@pytest.fixture
def house() -> House:
    return House()


def test_a_site_is_asked_once_who_is_there_and_what_it_says_is_known(house):
    for _ in range(3):
        assert house.end.look_for(["a", "x"]) == {}
    assert (house.job.waiting("a"), house.job.waiting("b")) == (["greeting"], [])
    process = house.process("a")
    assert process.look_for_run() == ("run-1", 1000, b"greeting")
    process.enrol(b"hello")
    (found,) = house.end.look_for(["a", "x"]).items()
    assert found[0] == "a" and (found[1].session, found[1].hello) == (process.session, b"hello")
    assert house.job.waiting("a") == [] and process.generation == house.end.generation == 1000


def test_without_names_all_sites_of_the_job_are_asked(house):
    house.end.look_for(None)
    assert house.job.waiting("a") == house.job.waiting("b") == ["greeting"]


def test_a_message_goes_there_and_its_answer_comes_back_once(house):
    process = house.member("a")
    assert house.end.next_number("a", process.session) == 1
    assert house.end.send("a", process.session, b"down") == 1
    assert house.end.arrived() == []
    assert process.look() == (1, b"down")
    process.reply(1, b"up")
    (envelope,) = house.end.arrived()
    assert envelope == Envelope("a", process.session, 1)
    assert house.end.read(envelope) == b"up" and house.end.arrived() == []
    with pytest.raises(DamagedMessageError):
        house.end.read(envelope)


def test_a_message_that_nobody_has_fetched_is_taken_back_for_the_next(house):
    process = house.member("a")
    house.end.send("a", process.session, b"first")
    assert house.end.send("a", process.session, b"second") == 2
    assert house.job.waiting("a") == ["message"] and process.look() == (2, b"second")


def test_a_late_answer_comes_in_under_its_number_and_the_next_message_waits_for_it(house):
    process = house.member("a")
    house.end.send("a", process.session, b"first")
    assert process.look() == (1, b"first")
    house.end.send("a", process.session, b"second")
    assert house.job.waiting("a") == ["message"] * 2  # NVFlare gives a site one task at a time
    process.reply(1, b"late")
    assert house.end.arrived() == [Envelope("a", process.session, 1)]
    assert process.look() == (2, b"second")


def test_a_process_that_is_gone_is_asked_for_after_a_pause_and_another_one_is_another_session(house, caplog):
    first = house.member("a")
    house.end.send("a", first.session, b"down")
    first.look()
    house.job.loses("a")
    assert house.end.look_for(["a"]) == {} and house.job.waiting("a") == []
    assert "'a': EXECUTION_EXCEPTION" in caplog.text
    house.sleep(PAUSE)
    house.end.arrived()
    assert house.job.waiting("a") == ["greeting"]
    second = house.member("a")
    assert second.session != first.session and house.job.waiting("a") == []  # what the first was sent is void
    house.end.send("a", second.session, b"again")
    assert second.look() == (1, b"again")


def test_the_same_process_is_sent_a_message_again_that_has_not_reached_it(house):
    process = house.member("a")
    house.end.send("a", process.session, b"down")
    assert house.job.fetch("a") is not None  # by the site, which fails before the process has it
    house.job.loses("a")
    house.end.arrived()
    house.sleep(PAUSE)
    house.end.arrived()
    assert process.look() is None  # the question, which it answers
    house.end.arrived()
    assert process.look() == (1, b"down")
    process.reply(1, b"up")
    assert house.end.arrived() == [Envelope("a", process.session, 1)]


def test_a_message_to_a_process_that_was_there_before_is_not_for_its_successor(house):
    first = house.member("a")
    house.end.send("a", first.session, b"for the first")
    second = house.process("a")
    assert second.look_for_run() is None  # it says that it is another one
    assert house.end.look_for(["a"]) == {}
    assert second.look_for_run() is not None
    second.enrol(b"")
    assert house.end.look_for(["a"])["a"].session == second.session and house.end.arrived() == []


def test_a_process_that_has_come_does_not_do_what_its_predecessor_is_sent(house):
    first = house.member("a")
    house.end.send("a", first.session, b"down")
    first.look()
    house.job.loses("a")
    house.end.arrived()
    house.sleep(PAUSE)
    second = house.member("a")
    house.end.send("a", first.session, b"by one who does not know it yet")
    assert second.look() is None and house.end.arrived() == []
    assert second.look() is None  # it is asked who it is
    assert house.end.look_for(["a"])["a"].session == second.session and house.job.waiting("a") == []


@pytest.mark.parametrize(
    "fields", [{"generation": 999}, {"number": 2}, {"number": 0}, {"number": "1"}, {"number": True}]
)
def test_an_answer_to_what_was_not_asked_is_dropped(house, fields):
    process = house.member("a")
    house.end.send("a", process.session, b"down")
    process.look()
    right: dict[str, Any] = {"generation": 1000, "session": process.session, "number": 1}
    house.job.at_work["a"].answered(Message("answer", {**right, **fields}, b"up"))
    assert house.end.arrived() == []
    house.job.at_work["a"].answered(Message("answer", right, b"up"))
    assert len(house.end.arrived()) == 1


def test_an_aborted_job_is_a_sentence_and_nobody_waits_for_its_sites(house):
    house.member("a")
    house.job.aborted = "it was aborted"
    for act in (lambda: house.end.look_for(None), house.end.arrived, lambda: house.end.send("a", "s", b"")):
        with pytest.raises(NetworkError, match="Submit it again"):
            act()
    before = house.time
    house.end.close("aborted", False)
    assert house.time == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_all_hear_that_the_run_is_over(house, is_finished):
    processes = [house.member(site) for site in "ab"]
    house.end.send("a", processes[0].session, b"nobody reads this any more")
    heard: list[bool] = []

    def listen(seconds: float) -> None:
        house.time += seconds
        if len(heard) < 2:
            with pytest.raises(EndedError, match="over: all is done") as ended:
                processes[len(heard)].look()
            heard.append(ended.value.is_finished)

    house.end._sleep = listen
    house.end.close("all is done", is_finished)
    assert heard == [is_finished] * 2 and house.time < 100 + FAREWELL


def test_a_site_that_does_not_hear_the_end_is_not_waited_for_for_ever(house):
    house.member("a")
    house.end.close("all is done", True)
    assert 100 + FAREWELL <= house.time < 101 + FAREWELL


def test_a_job_that_is_gone_ends_the_process_with_a_sentence(house):
    process = house.member("a")
    house.job.aborted = "it was aborted"
    with pytest.raises(EndedError, match="Start this client again") as ended:
        process.look()
    assert not ended.value.is_finished
    with pytest.raises(EndedError, match="'b'.*Start this client again"):
        house.process("b").look_for_run()


def test_a_job_that_does_not_come_ends_the_wait_with_a_sentence(house):
    process = house.process("a")
    process._attachment.is_lost = True
    with pytest.raises(EndedError, match="for 10 seconds.*submitted"):
        process.look_for_run()


@pytest.mark.parametrize(
    ("meta", "params"),
    [
        (None, {CONTENT: b""}),
        ({}, {CONTENT: b""}),
        ({FIELDS: {}}, {CONTENT: b""}),
        ({FIELDS: {"kind": "x"}}, {CONTENT: "x"}),
    ],
)
def test_what_others_send_is_no_message(meta, params):
    with pytest.raises(ValueError, match="not sent by fed-trainer"):
        message_of(meta, params)
    assert message_of({FIELDS: {"kind": "x", "n": 1}, "other": 1}, {CONTENT: b"y"}) == Message("x", {"n": 1}, b"y")


EVENTS = st.lists(st.sampled_from(["send", "look", "reply", "die", "rest"]), max_size=40)


@given(EVENTS)
def test_whatever_dies_when_an_answer_is_that_to_its_message_and_comes_once(events):
    """Every process answers with what it was sent, and with its session."""
    house = House("a")
    process = house.member("a")
    at: tuple[int, bytes | str] | None = None
    read: set[Envelope] = set()
    sent: dict[tuple[str, int], bytes] = {}
    for step, event in enumerate(events):
        members = house.end.look_for(["a"])
        if event == "send" and "a" in members:
            session, content = members["a"].session, f"message {step}".encode()
            sent[(session, house.end.send("a", session, content))] = content
        elif event == "look" and at is None:
            if process._hello is None:
                if process.look_for_run() is not None:
                    process.enrol(b"")
            else:
                at = process.look()
        elif event == "reply" and at is not None and isinstance(at[1], bytes):
            process.reply(at[0], process.session.encode() + at[1])
            at = None
        elif event == "die":
            house.job.loses("a")
            process, at = house.process("a"), None
        elif event == "rest":
            house.sleep(PAUSE)
        for envelope in house.end.arrived():
            assert envelope not in read
            read.add(envelope)
            expected = envelope.session.encode() + sent[(envelope.session, envelope.number)]
            assert house.end.read(envelope) == expected
    if "a" in (members := house.end.look_for(["a"])):
        house.end.send("a", members["a"].session, b"a process that was idle is missed with the next message")
    for _ in range(8):  # whatever was, in the end it goes on
        house.sleep(PAUSE)
        if at is not None:
            process.reply(at[0], process.session.encode())
            at = None
        elif process._hello is None:
            if process.look_for_run() is not None:
                process.enrol(b"")
        else:
            at = process.look()
        house.end.arrived()
    assert house.end.look_for(["a"])["a"].session == process.session


class Site:
    """Answers with the number of the round."""

    def __init__(self, fails_in: int | None = None) -> None:
        self.fails_in, self.turns = fails_in, 0

    def accept(self, client: str, invitation: Packet) -> Packet:
        return Packet("joined", {}, {"client": client, "num_examples": 8})

    def turn(self, packet: Packet) -> Packet:
        self.turns += 1
        if packet.meta["round"] == self.fails_in:
            raise TurnFailedError("the disk is full", {"train": 1.0})
        about = {"figures": {"train_loss": 1.0}, **packet.meta}
        return Packet("update", {"delta/x": torch.full((2,), float(packet.meta["round"]))}, about)

    def evaluate(self, packet: Packet) -> Packet:
        raise AssertionError("nobody asks for it")


class Attachable(NVFlareJob):
    """A job in this process, to which clients are attached."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.job, self.attached = job, []  # type: ignore[var-annotated]

    def client_end(self, client: str) -> NVFlareClientEnd:
        self.attached.append(Attached(self.job, client))
        return NVFlareClientEnd(self.attached[-1], client, 20.0)


def sealed(network: Network, name: str, folder: Path) -> Network:
    """As what a process with keys sees of it."""
    identity = Identity.create(folder / f"{name}.key", name)
    return Sealed(network, identity, KnownKeys(folder / f"{name}.known", accept_first=True), encrypts=True)


@pytest.mark.parametrize("has_keys", [False, True], ids=["plain", "encrypted"])
def test_rounds_over_a_job_and_a_client_that_fails_has_its_name_and_its_error(tmp_path, has_keys):
    network, endings = Attachable(Job("abc")), {}

    def seen_by(name: str) -> Network:
        return sealed(network, name, tmp_path) if has_keys else network

    end = seen_by("coordinator").server_end()
    end.open("run")
    end.greet(b"{}")

    def live(name: str, site: Site) -> None:
        endings[name] = take_part(site, seen_by(name), [name])

    sites = {"a": Site(), "b": Site(fails_in=2), "c": Site()}
    threads = [threading.Thread(target=live, args=each, daemon=True) for each in sites.items()]
    for thread in threads:
        thread.start()
    visits = Visits()
    roster = Roster(end, ["a", "b", "c"], lambda: Packet("invite", {}, {}))
    exchange = Exchange(end, roster, 20.0)
    exchange.gather(20.0, 3)
    for number in (1, 2, 3):
        make = lambda client, number=number: Packet("train", {}, {"round": number, "client": client})  # noqa: E731
        replies = {reply.client: reply for reply in exchange.exchange(Packets(make, visits, ["a", "b", "c"]), number)}
        assert list(replies) == ["a", "b", "c"]
        for client, reply in replies.items():
            if (client, number) == ("b", 2):
                assert (reply.status, reply.reason) == ("error", "the disk is full")
            else:
                assert reply.status == "ok" and reply.packet is not None
                assert torch.equal(reply.packet.tensors["delta/x"], torch.full((2,), float(number)))
    end.close("3 of 3 rounds are done", True)
    for thread in threads:
        thread.join(20)
    assert endings == dict.fromkeys("abc", "The run is over: 3 of 3 rounds are done")
    assert all(attached.is_closed for attached in network.attached) and len(network.attached) == 3
    assert {name: site.turns for name, site in sites.items()} == {"a": 3, "b": 3, "c": 3}
