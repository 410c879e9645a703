# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What an exchange makes of clients that come, go, are late, decline, fail or are damaged on the way. The clients are
threads that do what a test says; the way is a folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fed_trainer import Store
from fed_trainer.client.process import ClientProcess, DeclinedError, take_part
from fed_trainer.federation.packet import Packet, Reply
from fed_trainer.federation.transport import Packets, ends, exchange
from fed_trainer.federation.transport.ends import EndedError, NetworkError
from fed_trainer.federation.transport.exchange import Exchange, check_names, names_of
from fed_trainer.federation.transport.roster import Roster
from fed_trainer.federation.visits import Visits
from fed_trainer.state.client_errors import TurnFailedError


class Site:
    """Answers with the number of the round; what else it does a test says by `act`."""

    def __init__(self, act: Callable[[Packet], None] = lambda packet: None, declines: str | None = None) -> None:
        self.act, self.declines = act, declines
        self.received: list[Packet] = []

    def accept(self, client: str, invitation: Packet) -> Packet:
        if self.declines:
            raise DeclinedError(self.declines)
        return Packet("joined", {}, {"client": client, "num_examples": 8, "has_held_out": client == "b"})

    def turn(self, packet: Packet) -> Packet:
        self.received.append(packet)
        self.act(packet)
        about = {name: packet.meta[name] for name in ("round", "client")}
        figures = {"train_loss": 1.0}
        return Packet(
            "update", {"delta/x": torch.full((2,), float(packet.meta["round"]))}, {**about, "figures": figures}
        )

    def evaluate(self, packet: Packet) -> Packet:
        return Packet("metrics", {}, {"round": packet.meta["round"], "client": packet.meta["client"]})


class House:
    """A coordinator's end in this thread, and clients in threads of their own."""

    def __init__(self, folder: Any, clients: list[str], round_timeout: float = 20.0) -> None:
        self.store = Store(str(folder), patience=20.0, lease=0.5)
        self.visits, self.clients = Visits(), clients
        self.whole: list[tuple[str, int]] = []  # who was sent a packet of someone who has nothing, in which round
        self.end = self.store.server_end()
        self.end.open("run")
        self.end.greet(b"{}")
        self.seen: list[tuple[str, str, int]] = []
        self.roster = Roster(self.end, clients, lambda: Packet("invite", {"adapter/x": torch.zeros(2)}, {}))
        self.exchange = Exchange(self.end, self.roster, round_timeout, lambda *seen: self.seen.append(seen))
        self.endings: dict[str, BaseException | str] = {}
        self.threads: list[threading.Thread] = []

    def start(self, client: str, site: Site | None = None) -> Site:
        site = site or Site()

        def live() -> None:
            try:
                self.endings[client] = take_part(site, self.store, [client])
            except BaseException as error:
                self.endings[client] = error

        self.threads.append(threading.Thread(target=live, daemon=True))
        self.threads[-1].start()
        return site

    def packets(self, round: int, kind: str = "train") -> Packets:
        def make(client: str) -> Packet:
            if client not in self.visits.seen:
                self.whole.append((client, round))
            return Packet(kind, {"state/x": torch.zeros(2)}, {"round": round, "client": client})

        return Packets(make, self.visits, self.clients)

    def round(self, round: int, kind: str = "train") -> dict[str, Reply]:
        replies: dict[str, Reply] = {}
        for reply in self.exchange.exchange(self.packets(round, kind), round):
            assert reply.client not in replies
            replies[reply.client] = reply
            if reply.status in ("ok", "error"):
                self.visits.seen[reply.client] = round
        assert replies.keys() == set(self.clients)
        return replies

    def close(self, is_finished: bool = True) -> None:
        self.end.close("the test is over", is_finished)
        for thread in self.threads:
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(ends, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(exchange, "SECONDS_PER_ROLL_CALL", 0.1)


@pytest.fixture
def house_of(tmp_path) -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def make(clients: str, **options: Any) -> House:
        houses.append(House(tmp_path / f"store-{len(houses)}", list(clients), **options))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


def statuses(replies: dict[str, Reply]) -> dict[str, str]:
    return {client: reply.status for client, reply in replies.items()}


def test_answers_come_in_the_order_of_the_packets_whoever_is_faster(house_of):
    house = house_of("abc")
    house.start("a", Site(lambda packet: time.sleep(0.3)))
    for client in "bc":
        house.start(client)
    house.exchange.gather(20.0, 3)
    for number in (1, 2):
        order = []
        for reply in house.exchange.exchange(house.packets(number), number):
            order.append(reply.client)
            house.visits.seen[reply.client] = number
            assert reply.status == "ok" and reply.packet is not None
            assert torch.equal(reply.packet.tensors["delta/x"], torch.full((2,), float(number)))
        assert order == ["a", "b", "c"]
    assert house.whole == [("a", 1), ("b", 1), ("c", 1)]  # in the second round they have what the first has brought
    assert house.exchange.evaluators == ["b"]


def test_a_turn_that_fails_is_an_error_with_its_reason_and_the_client_stays(house_of):
    def fail(packet: Packet) -> None:
        if packet.meta["round"] == 1:
            raise TurnFailedError("its local round failed: out of memory", {"local": 2.0})

    house = house_of("ab")
    house.start("a", Site(fail))
    house.start("b")
    house.exchange.gather(20.0, 2)
    reply = house.round(1)["a"]
    assert (reply.status, reply.reason, reply.seconds) == (
        "error",
        "its local round failed: out of memory",
        {"local": 2.0},
    )
    assert statuses(house.round(2)) == {"a": "ok", "b": "ok"}


def test_what_an_error_quotes_does_not_leave_the_client(house_of):
    def fail(packet: Packet) -> None:
        raise RuntimeError("the row 'Mrs Example has ...' is too long")

    house = house_of("a")
    house.start("a", Site(fail))
    house.exchange.gather(20.0, 1)
    assert house.round(1)["a"].reason == "RuntimeError"


def test_a_disk_that_is_full_at_one_site_is_that_site_s_and_passes(house_of):
    def fail(packet: Packet) -> None:
        if packet.meta["round"] == 1:
            raise OSError(28, "No space left on device")

    house = house_of("ab")
    house.start("a", Site(fail))
    house.start("b")
    house.exchange.gather(20.0, 2)
    assert statuses(house.round(1)) == {"a": "error", "b": "ok"}
    assert statuses(house.round(2)) == {"a": "ok", "b": "ok"}


def test_a_late_answer_is_dropped_and_named_and_counts_in_no_round(house_of, caplog):
    go_on = threading.Event()

    def dawdle(packet: Packet) -> None:
        if packet.meta["round"] == 1:
            assert go_on.wait(20)

    house = house_of("ab", round_timeout=1.0)
    slow = house.start("a", Site(dawdle))
    house.start("b", Site(lambda packet: time.sleep(1.5 if packet.meta["round"] == 2 else 0)))
    house.exchange.gather(20.0, 2)
    replies = house.round(1)
    assert statuses(replies) == {"a": "timeout", "b": "ok"}
    assert replies["a"].reason == "it has not answered within 1 seconds"
    house.exchange._round_timeout = 20.0
    threading.Timer(0.5, go_on.set).start()
    with caplog.at_level(logging.WARNING):
        replies = house.round(2)
    assert statuses(replies) == {"a": "ok", "b": "ok"}
    assert replies["a"].packet is not None and replies["a"].packet.meta["round"] == 2
    assert "Client 'a' has answered too late" in caplog.text
    assert [packet.meta["round"] for packet in slow.received] == [1, 2]
    assert ("a", 2) in house.whole  # whether the packet of the first round has arrived was not known


def test_a_client_that_was_late_is_not_waited_for_until_it_is_heard_again(house_of):
    go_on = threading.Event()
    house = house_of("ab", round_timeout=1.0)
    house.start("a", Site(lambda packet: None if packet.meta["round"] > 1 else assert_set(go_on)))
    house.start("b")
    house.exchange.gather(20.0, 2)
    assert statuses(house.round(1)) == {"a": "timeout", "b": "ok"}
    house.exchange._round_timeout = 3600.0  # which nobody waits for
    replies = house.round(2)
    assert statuses(replies) == {"a": "timeout", "b": "ok"}
    assert replies["a"].reason == "it has been silent for a while"
    assert house.roster.about("a")["num_examples"] == 8  # which the record still says
    go_on.set()
    deadline = time.monotonic() + 20
    while house.roster.state("a") != "joined" and time.monotonic() < deadline:
        house.exchange._look(None)
    assert statuses(house.round(3)) == {"a": "ok", "b": "ok"}


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_a_client_that_nobody_stands_for_is_not_waited_for_and_may_come_later(house_of):
    house = house_of("ab")
    house.start("a")
    house.exchange.gather(2.0, 1)
    replies = house.round(1)  # the limit of a round is 20 seconds, which nobody waits for
    assert statuses(replies) == {"a": "ok", "b": "lost"}
    assert replies["b"].reason == "it has not joined"
    house.start("b")
    house.exchange.gather(20.0, 2)
    assert statuses(house.round(2)) == {"a": "ok", "b": "ok"}


def test_a_client_that_begins_anew_in_its_turn_is_sent_everything_again(house_of):
    class Gone(BaseException):
        pass

    def die(packet: Packet) -> None:
        if packet.meta["round"] == 2:
            threading.Timer(0.2, house.start, ("a",)).start()  # another process under this name
            raise Gone

    house = house_of("ab")
    house.start("a", Site(die))
    house.start("b")
    house.exchange.gather(20.0, 2)
    house.round(1)
    assert statuses(house.round(2)) == {"a": "ok", "b": "ok"}
    assert house.whole == [("a", 1), ("b", 1), ("a", 2)]
    assert house.roster.about("a")["num_examples"] == 8
    assert isinstance(house.endings["a"], Gone)


def test_of_two_under_one_name_the_first_stops_and_says_so(house_of):
    house = house_of("a")
    house.start("a")
    house.exchange.gather(20.0, 1)
    house.start("a")
    deadline = time.monotonic() + 20
    while "a" not in house.endings and time.monotonic() < deadline:
        time.sleep(0.05)
    error = house.endings["a"]
    assert isinstance(error, EndedError) and "Another process has joined under the name 'a'" in str(error)
    assert statuses(house.round(1)) == {"a": "ok"}


def test_one_that_declines_is_not_waited_for_and_both_sides_know_why(house_of):
    house = house_of("ab")
    house.start("a", Site(declines="`most_rounds`: the run has 9 rounds, but the policy allows 3."))
    house.start("b")
    house.exchange.gather(20.0, 1)
    reply = house.round(1)["a"]
    assert reply.status == "lost"
    assert reply.reason == "it has declined: `most_rounds`: the run has 9 rounds, but the policy allows 3."
    error = house.endings["a"]
    assert isinstance(error, DeclinedError) and "`most_rounds`" in str(error)
    with pytest.raises(
        NetworkError, match=r"1 of 2 clients take part, but the run needs 2.*'a' has declined: `most_r"
    ):
        house.exchange.gather(20.0, 2)


def test_one_that_cannot_get_ready_ends_and_does_not_wait_for_packets_that_nobody_sends(house_of):
    class Unready(Site):
        def accept(self, client: str, invitation: Packet) -> Packet:
            raise RuntimeError("out of memory")

    house = house_of("ab")
    house.start("a", Unready())
    house.start("b")
    house.exchange.gather(20.0, 1)
    house.threads[0].join(timeout=20)
    assert isinstance(house.endings["a"], DeclinedError)


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_packet_that_was_damaged_on_the_way_is_sent_again_twice_at_most(house_of, monkeypatch, direction, times):
    house = house_of("ab")
    site = house.start("a")
    house.start("b")
    house.exchange.gather(20.0, 2)
    left = times
    files = type(house.end._objects.files)
    write = files.write

    def damaging(self: Any, name: str, content: bytes) -> None:
        nonlocal left
        if left > 0 and "/a/" in name and f"/{direction}/" in name and (direction == "down" or b"update" in content):
            left -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        write(self, name, content)

    monkeypatch.setattr(files, "write", damaging)
    replies = house.round(1)
    assert left == 0
    assert statuses(replies) == {"a": "ok" if times == 1 else "error", "b": "ok"}
    if times == 3:
        assert "another content" in str(replies["a"].reason)
    assert len(site.received) == {("down", 1): 1, ("down", 3): 0, ("up", 1): 2, ("up", 3): 3}[direction, times]


def test_an_answer_that_is_no_packet_is_refused_and_named(house_of, monkeypatch):
    house = house_of("a")
    house.start("a")
    house.exchange.gather(20.0, 1)
    monkeypatch.setattr(
        ClientProcess, "_reply", lambda self, message, answer: self._ends["a"].reply(message.number, b"x")
    )
    reply = house.round(1)["a"]
    assert reply.status == "error" and "This is no packet of a federation" in str(reply.reason)


def test_evaluations_travel_as_turns_do(house_of):
    house = house_of("ab")
    for client in "ab":
        house.start(client)
    house.exchange.gather(20.0, 2)
    replies = house.round(3, kind="evaluate")
    assert {reply.packet.kind for reply in replies.values() if reply.packet} == {"metrics"}


def test_clients_go_on_when_the_coordinator_is_taken_up_again(house_of, tmp_path):
    house = house_of("ab")
    for client in "ab":
        house.start(client)
    house.exchange.gather(20.0, 2)
    house.round(1)
    house.end._lease._over.set()  # as if it were killed
    again = house.end = house.store.server_end()
    again.open("run")
    again.greet(b"{}")
    assert again.generation == 2
    house.roster = Roster(again, house.clients, lambda: Packet("invite", {}, {}))
    house.exchange = Exchange(again, house.roster, 20.0)
    house.visits.meets_anew()
    house.exchange.gather(20.0, 2)
    assert statuses(house.round(2)) == {"a": "ok", "b": "ok"}
    assert house.whole[-2:] == [("a", 2), ("b", 2)]


def test_a_run_that_is_broken_off_ends_the_clients_with_its_reason(tmp_path):
    house = House(tmp_path, ["a"])
    house.start("a")
    house.exchange.gather(20.0, 1)
    house.close(is_finished=False)
    error = house.endings["a"]
    assert isinstance(error, EndedError) and not error.is_finished and "the test is over" in str(error)


def test_too_few_clients_after_the_wait_are_counted_and_named(house_of):
    house = house_of("ab")
    with pytest.raises(
        NetworkError, match=r"After 0.2 seconds 0 of 2 clients take part, but the run needs 1. 'a' has not"
    ):
        house.exchange.gather(0.2, 1)


def test_names_are_those_of_the_first_that_come_where_only_their_number_is_known(house_of):
    house = house_of("ab")
    with pytest.raises(NetworkError, match="After 0.2 seconds 0 of 2 clients have come"):
        names_of(house.end, 2, 0.2)
    for client in "ba":
        house.start(client)
    assert names_of(house.end, 2, 20.0) == ["a", "b"]


@pytest.mark.parametrize(
    ("clients", "complaint"), [([], "is empty"), (["a", "b", "a"], r"has \['a'\] more than once")]
)
def test_names_of_clients_are_each_once(clients, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_names(clients)
    assert check_names(["b", "a"]) == ["a", "b"]
