# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One coordinator at a time."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fed_trainer.federation.transport.store.lease import COORDINATOR, Lease, LeaseLostError, read_lease
from fed_trainer.federation.transport.store.objects import Objects, StoreError
from helpers.lagging import World


NOTE = "run/coordinator.json"


class QuietLease(Lease):
    """Is renewed when the test says so."""

    def _keep(self) -> None:
        pass


class Study:
    """Coordinators of one address, and what others do while one of them sleeps."""

    def __init__(self) -> None:
        self.world = World()
        self.objects = Objects("lagging://run", 60.0, **self.world.options())
        self.meanwhile: Callable[[], None] = lambda: None

    def lease(self, seconds: float = 20.0) -> QuietLease:
        def sleep(duration: float) -> None:
            self.world.sleep(duration)
            self.meanwhile()

        return QuietLease(self.objects, seconds, sleep)

    def served(self, run: str = "run-1", seconds: float = 20.0) -> QuietLease:
        lease = self.lease(seconds)
        lease.acquire(run)
        return lease


@pytest.fixture
def study() -> Study:
    return Study()


def test_the_first_has_it(study: Study) -> None:
    lease = study.served()
    lease.renew()
    lease.check()
    note = read_lease(study.objects)
    assert lease.generation == 1 and note is not None and (note["run"], note["beat"]) == ("run-1", 1)


def test_a_second_one_is_refused_while_the_first_lives(study: Study) -> None:
    first = study.served()
    study.meanwhile = first.renew
    before = study.world.now
    with pytest.raises(StoreError, match="Another coordinator serves the run at 'lagging://run' at this moment"):
        study.lease().acquire("run-1")
    first.renew()
    first.check()
    assert study.world.now - before <= 20


def test_also_one_with_less_patience(study: Study) -> None:
    first = study.served(seconds=100)
    beats = iter([40, 80, 120])

    def meanwhile() -> None:
        if study.world.now >= next(beats, float("inf")):
            first.renew()

    study.meanwhile = meanwhile
    with pytest.raises(StoreError, match="Another coordinator serves"):
        study.lease(seconds=1).acquire("run-1")


def test_nothing_of_the_first_is_changed_by_it(study: Study) -> None:
    first = study.served()
    study.objects.put("g1/greeting", b"hello")
    study.meanwhile = first.renew
    before = {path for path in study.world.files if path != NOTE}
    with pytest.raises(StoreError):
        study.lease().acquire("run-1")
    assert {path for path in study.world.files if path != NOTE} == before
    assert json.loads(study.world.files[NOTE])["holder"] == first._note["holder"]


def test_after_it_has_died_another_one_takes_over(study: Study) -> None:
    study.served()
    before = study.world.now
    second = study.served()
    assert second.generation == 2 and study.world.now - before >= 20


def test_one_that_was_thought_dead_stops(study: Study) -> None:
    first = study.served()
    study.served()
    with pytest.raises(LeaseLostError, match="Another coordinator has taken over.*Start one coordinator only"):
        first.renew()
    assert json.loads(study.world.files[NOTE])["generation"] == 2


def test_after_it_has_stopped_nobody_waits(study: Study) -> None:
    study.served().release("it was stopped", is_finished=False)
    before = study.world.now
    second = study.served()
    assert second.generation == 2 and study.world.now - before < 20


def test_of_two_at_once_one_has_it(study: Study) -> None:
    """The second one looks before the first has written, and writes after it."""
    refused: list[str] = []
    first, second = study.lease(), study.lease()

    def meanwhile() -> None:
        study.meanwhile = lambda: None
        study.world.versions.pop(NOTE)  # what the second one has seen
        second.acquire("run-1")

    study.meanwhile = meanwhile
    try:
        first.acquire("run-1")
    except LeaseLostError as error:
        refused.append(str(error))
    second.renew()
    assert len(refused) == 1 and json.loads(study.world.files[NOTE])["holder"] == second._note["holder"]


@pytest.mark.parametrize("is_over", [True, False])
def test_another_run_is_refused(study: Study, is_over: bool) -> None:
    first = study.served("run-1")
    first.begin()
    if is_over:
        first.release("done", is_finished=True)
    before = study.world.files
    with pytest.raises(
        StoreError, match=r"there is another run \('run-1', not 'run-2'\). Choose another address, or re"
    ):
        study.lease().acquire("run-2")
    assert study.world.files == before


def test_a_run_of_which_nothing_has_come_makes_room_once_its_coordinator_is_gone(study: Study) -> None:
    first = study.served("run-1")
    study.meanwhile = first.renew
    with pytest.raises(StoreError, match="Another coordinator serves"):
        study.lease().acquire("run-2")
    study.meanwhile = lambda: None  # it has died before its first round
    assert study.served("run-2").generation == 2


def test_clocks_do_not_matter(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines whose clocks differ by hours: each look at the time of day gives another one."""
    hours = itertools.cycle([0, 5, -3, 24])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + 3600 * next(hours))
    first = study.served()
    study.meanwhile = first.renew
    with pytest.raises(StoreError, match="Another coordinator serves"):
        study.lease().acquire("run-1")
    study.meanwhile = lambda: None
    assert study.served().generation == 2
    assert not any("time" in key for key in json.loads(study.world.files[NOTE]))


def test_an_older_note_that_is_seen_late_costs_nobody_the_lease(study: Study) -> None:
    study.served()
    old = study.world.files[NOTE]
    second = study.served()
    study.world.put(NOTE, old)
    second.renew()
    second.check()


def test_a_note_that_is_half_written_is_waited_for(study: Study) -> None:
    study.served()
    whole = study.world.files[NOTE]
    study.world.put(NOTE, whole[:10])
    study.meanwhile = lambda: study.world.put(NOTE, whole)
    assert study.served().generation == 2


@pytest.mark.parametrize("content", [b"", b"{}", b'{"run": "run-1"}', b'{"run": "run-1", "generation": "1"'])
def test_what_is_no_note_is_not_written_over(study: Study, content: bytes) -> None:
    study.world.put(NOTE, content)
    with pytest.raises(StoreError, match=r"as `coordinator.json` is no note of a coordinator. Choose another address"):
        study.lease().acquire("run-1")
    assert study.world.files == {NOTE: content}


def test_a_store_that_is_gone_ends_the_lease(study: Study) -> None:
    lease = study.served()
    study.world.error = ConnectionError("no route")
    with pytest.raises(StoreError, match="for 60 seconds"):
        lease.renew()


def test_why_it_was_given_back(study: Study) -> None:
    study.served().release("3 of 3 rounds are done", is_finished=True)
    note = read_lease(study.objects)
    assert note is not None
    assert (note["is_over"], note["is_finished"], note["reason"]) == (True, True, "3 of 3 rounds are done")


def test_one_that_was_lost_is_not_given_back(study: Study) -> None:
    first = study.served()
    study.served()
    with pytest.raises(LeaseLostError) as lost:
        first.renew()
    first._lost = lost.value
    first.release("it was stopped", is_finished=False)
    with pytest.raises(LeaseLostError):
        first.check()
    assert json.loads(study.world.files[NOTE])["is_over"] is False


def test_it_is_renewed_by_itself(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    lease = Lease(objects, seconds=0.05)
    lease.acquire("run-1")
    while (note := objects.read_note(COORDINATOR)) is None or note["beat"] < 3:
        time.sleep(0.005)
    objects.write_note(COORDINATOR, {**note, "holder": "another"})
    while lease._lost is None:
        time.sleep(0.005)
    with pytest.raises(LeaseLostError, match="Another coordinator has taken over"):
        lease.check()
    lease.release("it was stopped", is_finished=False)


@pytest.mark.parametrize("name", ["g1", "members"])
def test_where_something_else_lies_no_run_begins_and_it_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "of somebody else").write_text("x")
    objects = Objects(str(tmp_path))
    with pytest.raises(StoreError, match=f"there is '{name}', but no run that it is of"):
        Lease(objects, 0.05).acquire("run")
    assert (tmp_path / name / "of somebody else").read_text() == "x"
