# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What one end of a store sends, the other one receives: once, in order, whole, and the newest counts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_trainer import Store
from fed_trainer.federation.transport.ends import DamagedMessageError, EndedError, Envelope
from fed_trainer.federation.transport.store.client import LOOKS_PER_NOTE, StoreClientEnd
from fed_trainer.federation.transport.store.lease import Lease
from fed_trainer.federation.transport.store.objects import Objects, StoreError
from fed_trainer.federation.transport.store.server import StoreServerEnd
from helpers.lagging import World


RUN = "run-1"
LAG = 4.0  # seconds; less than a payload is waited for


class QuietLease(Lease):
    """Is renewed when the test says so."""

    def _keep(self) -> None:
        pass


class Meeting:
    """A coordinator and its clients at one address."""

    def __init__(self, world: World | None = None) -> None:
        self.world = World() if world is None else world
        self.objects = Objects("lagging://run", 600.0, **self.world.options())
        self.serve()

    def serve(self) -> StoreServerEnd:
        self.lease = QuietLease(self.objects, 20.0, self.world.sleep)
        self.server = StoreServerEnd(self.objects, self.lease)
        self.server.open(RUN)
        self.server.greet(b"hello")
        return self.server

    def end(self, client: str = "ward-1", patience: float = 600.0) -> StoreClientEnd:
        return StoreClientEnd(self.objects, client, patience, self.world.clock)

    def joined(self, client: str = "ward-1", patience: float = 600.0) -> StoreClientEnd:
        end = self.end(client, patience)
        assert end.look_for_run() is not None
        end.enrol(b"I am here")
        return end

    def send(self, end: StoreClientEnd, content: bytes) -> int:
        return self.server.send(end.client, end.session, content)

    def look(self, end: StoreClientEnd) -> Any:
        """As often as it takes to look at everything."""
        for _ in range(LOOKS_PER_NOTE):
            found = end.look()
            if found is not None:
                return found
        return None

    def messages(self) -> list[str]:
        return sorted(path for path in self.world.files if path.startswith("run/g") and "greeting" not in path)


@pytest.fixture
def meeting() -> Meeting:
    return Meeting()


# Coming


def test_a_client_finds_the_run(meeting: Meeting) -> None:
    assert meeting.end().look_for_run() == (RUN, 1, b"hello")


def test_before_there_is_one_it_waits_and_not_for_ever() -> None:
    world = World()
    end = StoreClientEnd(Objects("lagging://run", **world.options()), "ward-1", 60.0, world.clock)
    assert end.look_for_run() is None
    world.now += 59
    assert end.look_for_run() is None
    world.now += 1
    with pytest.raises(
        EndedError, match="Nothing was heard of a coordinator at 'lagging://run' for 60 seconds"
    ) as ended:
        end.look_for_run()
    assert not ended.value.is_finished


def test_the_coordinator_finds_those_who_come(meeting: Meeting) -> None:
    assert meeting.server.look_for(None) == {} == meeting.server.look_for(["ward-1", "ward-2"])
    ends = {name: meeting.joined(name) for name in ("ward-1", "ward-2")}
    for found in (meeting.server.look_for(["ward-2", "ward-1"]), meeting.server.look_for(None)):
        assert {name: member.session for name, member in found.items()} == {
            name: end.session for name, end in ends.items()
        }
        assert found["ward-1"].hello == b"I am here"


@pytest.mark.parametrize("name", ["a/b", "../b", "", ".", ".b", "a b", "a\\b", "a" * 65, "a.", "ä", "a\n"])
def test_names_that_cannot_stand_in_an_address(meeting: Meeting, name: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in an address. Use up to 64 letters, digits"):
        meeting.end(name)


@pytest.mark.parametrize("name", ["a", "ward-3", "A.b_c-9", "greeting", "members", "coordinator.json", "a" * 64])
def test_names_that_can(meeting: Meeting, name: str) -> None:
    end = meeting.joined(name)
    number = meeting.send(end, b"work")
    assert meeting.look(end) == (number, b"work")


def test_a_session_that_is_a_path_is_not_believed(meeting: Meeting) -> None:
    """It becomes part of names, and comes from whoever can write there."""
    meeting.objects.put("members/ward-1/000001", b"../../../x\nhello")
    assert meeting.server.look_for(["ward-1"]) == {}
    end = meeting.joined()
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == end.session


def test_a_damaged_enrolment_hides_none_that_follows(meeting: Meeting) -> None:
    meeting.joined()
    meeting.world.put("run/members/ward-1/000001.bin", b"x")
    assert meeting.server.look_for(["ward-1"]) == {}
    end = meeting.joined()
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == end.session


# There and back


def test_a_message_is_received_once_and_answered_once(meeting: Meeting) -> None:
    end = meeting.joined()
    number = meeting.send(end, b"work")
    assert meeting.look(end) == (number, b"work") and meeting.look(end) is None
    assert meeting.server.arrived() == []
    end.reply(number, b"done")
    envelope = Envelope("ward-1", end.session, number)
    assert meeting.server.arrived() == [envelope] == meeting.server.arrived()
    assert meeting.server.read(envelope) == b"done"
    assert meeting.server.arrived() == []
    with pytest.raises(DamagedMessageError, match="not there any more"):
        meeting.server.read(envelope)


def test_of_several_messages_the_newest_counts(meeting: Meeting) -> None:
    end = meeting.joined()
    for content in (b"1", b"2", b"3"):
        assert meeting.server.next_number(end.client, end.session) == meeting.send(end, content)
    assert meeting.look(end) == (3, b"3") and meeting.look(end) is None


def test_a_late_answer_is_seen_as_what_it_is(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"1")
    meeting.look(end)
    meeting.send(end, b"2")
    end.reply(1, b"late")
    assert meeting.server.arrived() == [Envelope("ward-1", end.session, 1)]
    assert meeting.server.read(Envelope("ward-1", end.session, 1)) == b"late"
    assert meeting.look(end) == (2, b"2")
    end.reply(2, b"in time")
    assert meeting.server.arrived() == [Envelope("ward-1", end.session, 2)]
    assert meeting.server.read(Envelope("ward-1", end.session, 2)) == b"in time"


def test_a_late_answer_is_named_even_if_the_next_one_has_come_before_anybody_looked(meeting: Meeting) -> None:
    end = meeting.joined()
    for number in (1, 2):
        meeting.send(end, b"work")
        meeting.look(end)
        end.reply(number, b"done")
    assert [path.partition("/up/")[2] for path in meeting.messages() if "/up/" in path] == ["000002.bin"]
    late, in_time = meeting.server.arrived()
    assert (late.number, in_time.number) == (1, 2)
    with pytest.raises(DamagedMessageError, match="not there any more"):
        meeting.server.read(late)
    assert meeting.server.arrived() == [in_time] and meeting.server.read(in_time) == b"done"


def test_an_answer_to_nothing_is_ignored(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"1")
    end.reply(7, b"what was never asked")
    assert meeting.server.arrived() == []


def test_a_damaged_answer_is_refused_and_the_next_one_is_not(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"1")
    meeting.look(end)
    end.reply(1, b"done")
    path = next(path for path in meeting.messages() if path.endswith("up/000001.bin"))
    meeting.world.put(path, b"dune")
    [envelope] = meeting.server.arrived()
    with pytest.raises(DamagedMessageError, match=r"up/000001.bin has 4 bytes of another content"):
        meeting.server.read(envelope)
    assert meeting.server.arrived() == []
    assert meeting.send(end, b"again") == 2 and meeting.look(end) == (2, b"again")
    end.reply(2, b"done")
    assert meeting.server.read(*meeting.server.arrived()) == b"done"


def test_a_damaged_message_is_told(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"work")
    path = next(path for path in meeting.messages() if path.endswith("down/000001.bin"))
    meeting.world.put(path, b"wxrk")
    number, wrong = meeting.look(end)
    assert number == 1 and isinstance(wrong, str) and "damaged on the way" in wrong
    assert meeting.look(end) is None


def test_a_message_that_became_void_while_it_was_read_is_no_damage(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"1")
    read = end._objects.files.read

    def slow(name: str) -> bytes | None:
        if name.endswith("down/000001.bin"):
            end._objects.files.read = read  # type: ignore[method-assign]
            meeting.send(end, b"2")
        return read(name)

    end._objects.files.read = slow  # type: ignore[method-assign]
    assert meeting.look(end) == (2, b"2")


# The end


def test_the_end_is_told(meeting: Meeting) -> None:
    end, late = meeting.joined(), meeting.end("ward-2")
    meeting.server.close("3 of 3 rounds are done", is_finished=True)
    for look in (end.look, late.look_for_run):
        with pytest.raises(EndedError, match="The run is over: 3 of 3 rounds are done") as ended:
            look()
        assert ended.value.is_finished


def test_a_coordinator_that_stops_ends_its_clients_but_not_those_that_come(meeting: Meeting) -> None:
    end, late = meeting.joined(), meeting.end("ward-2")
    meeting.server.close("it was stopped", is_finished=False)
    with pytest.raises(EndedError, match="it was stopped") as ended:
        end.look()
    assert not ended.value.is_finished and late.look_for_run() is None
    meeting.serve()
    assert late.look_for_run() == (RUN, 2, b"hello")


def test_a_coordinator_that_shows_no_sign_of_life_is_not_waited_for_longer_than_the_patience(meeting: Meeting) -> None:
    end = meeting.joined(patience=60)
    end._waits_since = None  # it was invited
    for _ in range(3):
        meeting.world.now += 50
        meeting.lease.renew()
        assert meeting.look(end) is None
    meeting.world.now += 60
    with pytest.raises(EndedError, match="Nothing was heard of a coordinator .* what was kept is kept"):
        meeting.look(end)


def test_a_coordinator_that_does_not_invite_is_not_waited_for_for_ever_either(meeting: Meeting) -> None:
    """It shows signs of life, but does not want this client."""
    end = meeting.joined(patience=60)
    with pytest.raises(EndedError, match="has not invited 'ward-1' within 60 seconds"):
        for _ in range(3):
            meeting.world.now += 25
            meeting.lease.renew()
            meeting.look(end)


def test_a_run_that_is_taken_up_again_goes_on_with_the_same_process(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"of the first")
    meeting.look(end)
    meeting.serve()
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == end.session
    assert meeting.send(end, b"of the second") == 1
    assert meeting.look(end) == (1, b"of the second") and end.generation == 2


def test_an_older_coordinator_that_is_seen_late_is_not_listened_to_again(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"of the first")
    old = meeting.world.files["run/coordinator.json"]
    assert meeting.look(end) == (1, b"of the first")
    meeting.serve()
    assert meeting.look(end) is None and end.generation == 2
    meeting.world.put("run/coordinator.json", old)
    assert meeting.look(end) is None and end.generation == 2


# Two under one name


def test_the_later_one_takes_the_place_and_the_earlier_one_is_told(meeting: Meeting) -> None:
    first, second = meeting.joined(), meeting.joined()
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == second.session
    with pytest.raises(EndedError, match="Another process has joined under the name 'ward-1'.*a name of its own"):
        meeting.look(first)
    assert meeting.look(second) is None


@pytest.mark.parametrize("known", [True, False])
def test_of_two_who_come_at_once_one_stays(meeting: Meeting, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Both have seen that nobody was there, and the second one has written over what the first one has said."""
    first = meeting.joined()
    if known:
        meeting.server.look_for(["ward-1"])
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "is_there", lambda self, name: False)
        second = meeting.joined()
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == second.session
    assert meeting.look(first) is None
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == first.session
    with pytest.raises(EndedError, match="Another process has joined"):
        meeting.look(second)
    assert meeting.look(first) is None


# What is there


def test_the_files_do_not_grow_with_the_rounds(meeting: Meeting) -> None:
    """Of one who answers, one who is always late, one who has gone silent and one who begins anew."""
    ends = {name: meeting.joined(name) for name in ("good", "late", "silent", "anew")}
    counts, open_numbers = [], 0
    for number in range(1, 41):
        meeting.server.end_round()
        if number % 2:
            ends["anew"] = meeting.joined("anew")
            meeting.server.look_for(list(ends))
        for end in ends.values():
            meeting.send(end, b"work")
        for name in ("good", "late", "anew"):
            found = meeting.look(ends[name])
            if found is not None and (name != "late" or number % 2):
                ends[name].reply(found[0], b"done")
        for envelope in meeting.server.arrived():
            meeting.server.read(envelope)
        counts.append(len(meeting.messages()))
        open_numbers = max(open_numbers, len(meeting.server._talks))
    assert max(counts[20:]) == max(counts[:20]) <= 5 * len(ends) and open_numbers <= len(ends) + 1


def test_looks_do_not_grow_with_the_rounds_either(meeting: Meeting) -> None:
    end = meeting.joined()
    costs = []
    for _ in range(20):
        meeting.send(end, b"work")
        meeting.world.looked_at.clear()
        meeting.server.arrived()
        end.look()
        costs.append(len(meeting.world.looked_at))
    assert max(costs[1:]) == min(costs[1:]) <= 6


def test_what_was_read_is_deleted(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"work")
    meeting.look(end)
    end.reply(1, b"done")
    meeting.server.read(*meeting.server.arrived())
    assert [path.rpartition("/")[2] for path in meeting.messages()] == ["down.json", "up.json"]


def test_what_went_to_a_process_that_was_replaced_is_deleted(meeting: Meeting) -> None:
    first = meeting.joined()
    meeting.send(first, b"work")
    meeting.look(first)
    first.reply(1, b"done")
    meeting.joined()
    meeting.server.look_for(["ward-1"])
    meeting.server.end_round()
    assert meeting.messages() == [] and meeting.server.arrived() == []


def test_what_an_earlier_coordinator_has_left_is_deleted_and_the_enrolments_stay(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"work")
    meeting.serve()
    assert not [path for path in meeting.world.files if path.startswith("run/g1/")]
    assert meeting.server.look_for(["ward-1"])["ward-1"].session == end.session


def test_at_the_end_nothing_but_notes_and_enrolments_is_there(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"work")
    meeting.server.show({"round": 1})
    meeting.server.close("done", is_finished=True)
    assert sorted(path.split("/")[1] for path in meeting.world.files) == [
        "coordinator.json",
        "members",
        "members",
        "status.json",
    ]


def test_one_whose_run_is_not_finished_keeps_what_resuming_needs(meeting: Meeting) -> None:
    end = meeting.joined()
    meeting.send(end, b"work")
    meeting.server.close("it was stopped", is_finished=False)
    assert len(meeting.messages()) == 2


# A store that shows late what was written


ACTIONS = (
    "send",
    "client looks",
    "client replies",
    "server looks",
    "time passes",
    "server resumes",
    "client restarts",
)


class Talk:
    """What two ends have received, beside what was sent."""

    def __init__(self, draw: random.Random) -> None:
        self.meeting = Meeting(World(draw=draw))
        self.end = self.meeting.joined()
        self.meeting.server.look_for(["ward-1"])
        self.meeting.world.lag, self.meeting.world.failure = LAG, 0.2
        self.sent: dict[tuple[int, str, int], bytes] = {}
        self.replied: dict[tuple[int, str, int], bytes] = {}
        self.received: list[tuple[int, str, int]] = []
        self.arrived: list[tuple[int, str, int]] = []

    def act(self, action: str) -> None:
        getattr(self, action.replace(" ", "_"))()

    def send(self) -> None:
        member = self.meeting.server.look_for(["ward-1"])["ward-1"]
        content = bytes(f"message {len(self.sent)}", "ascii") * 20
        number = self.meeting.server.send("ward-1", member.session, content)
        self.sent[(self.meeting.server.generation, member.session, number)] = content

    def client_looks(self) -> None:
        found = self.end.look()
        if found is None:
            return
        number, content = found
        key = (self.end.generation, self.end.session, number)
        assert key not in self.received, "received twice"
        mine = [other for other in self.received if other[1] == self.end.session]
        assert not mine or key > mine[-1], "out of order"
        if isinstance(content, str):  # it was deleted, since a newer one was there or it was of an earlier coordinator
            assert key < max(other for other in self.sent if other[1] == self.end.session), content
        else:
            assert content == self.sent[key], "not what was sent"
        self.received.append(key)

    def client_replies(self) -> None:
        if not self.received or self.received[-1] in self.replied or self.received[-1][1] != self.end.session:
            return
        key = self.received[-1]
        if key[0] == self.end.generation:
            self.replied[key] = bytes(f"answer to {key}", "ascii") * 20
            self.end.reply(key[2], self.replied[key])

    def server_looks(self) -> None:
        for envelope in self.meeting.server.arrived():
            key = (self.meeting.server.generation, envelope.session, envelope.number)
            assert key in self.replied and key not in self.arrived, "arrived twice"
            mine = [other for other in self.arrived if other[:2] == key[:2]]
            assert not mine or key > mine[-1], "out of order"
            try:
                assert self.meeting.server.read(envelope) == self.replied[key], "not what was answered"
            except DamagedMessageError:  # its sender has answered a newer one
                assert key < max(other for other in self.replied if other[:2] == key[:2])
            self.arrived.append(key)

    def time_passes(self) -> None:
        self.meeting.world.now += 1.5

    def server_resumes(self) -> None:
        self.meeting.world.now += LAG  # of an earlier one everything is known: it has been dead for a while
        self.meeting.serve()
        self.meeting.server.look_for(["ward-1"])
        self.meeting.world.now += LAG
        self.meeting.server.look_for(["ward-1"])

    def client_restarts(self) -> None:
        self.meeting.world.now += LAG  # it takes a process longer to start
        self.end = self.meeting.end()
        while self.end.look_for_run() is None:
            self.meeting.world.now += 1
        self.end.enrol(b"")

    def settle(self) -> None:
        """Once everything shows, the newest of both sides has come, if it was for the process that is there."""
        self.meeting.world.settle()
        member = self.meeting.server.look_for(["ward-1"])["ward-1"]
        assert member.session == self.end.session
        self.send()
        for _ in range(LOOKS_PER_NOTE + 1):
            self.client_looks()
        assert self.received[-1] == max(key for key in self.sent if key[1] == self.end.session)
        self.client_replies()
        self.server_looks()
        assert self.arrived[-1] == self.received[-1]
        self.meeting.server.end_round()
        assert len(self.meeting.messages()) <= 5, self.meeting.messages()


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ACTIONS), max_size=40), st.integers(0, 2**32))
def test_whatever_shows_when_each_message_comes_once_in_order_and_whole(actions: list[str], seed: int) -> None:
    talk = Talk(random.Random(seed))
    for action in actions:
        talk.act(action)
    talk.settle()


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_many_rounds_in_a_store_that_lags_behind(seed: int) -> None:
    talk = Talk(random.Random(seed))
    for _ in range(10):
        talk.send()
        key = max(talk.sent)
        for _ in range(40):
            talk.client_looks()
            talk.client_replies()
            talk.server_looks()
            talk.time_passes()
            if key in talk.arrived:
                break
        assert key in talk.arrived
    assert talk.received == talk.arrived == sorted(talk.sent)


# As it is used


def test_a_store_opens_its_ends(tmp_path: Path) -> None:
    store = Store(str(tmp_path), lease=0.05)
    server = store.server_end()
    server.open(RUN)
    server.greet(b"hello")
    end = store.client_end("ward-1")
    assert end.look_for_run() == (RUN, 1, b"hello")
    end.enrol(b"")
    number = server.send("ward-1", server.look_for(None)["ward-1"].session, b"work")
    assert end.look() == (number, b"work")
    server.close("done", is_finished=True)
    with pytest.raises(StoreError, match="another run"):
        store.server_end().open("run-2")


@pytest.mark.parametrize("name", ["patience", "lease"])
def test_settings_of_a_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be a positive number of seconds"):
        Store(str(tmp_path), **{name: 0})
