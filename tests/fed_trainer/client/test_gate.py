# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The gate of a client: what passes it, and that all of it is written down before it leaves."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fed_trainer.client.gate import PolicyGate
from fed_trainer.client.policy import Policy
from fed_trainer.client.process import ClientProcess, DeclinedError
from fed_trainer.client.sent_log import SentLog
from fed_trainer.federation.packet import Packet
from fed_trainer.federation.transport.ends import EndedError
from fed_trainer.state.client_errors import ClientError, TurnFailedError


UPDATE = Packet(
    "update",
    {"delta/a": torch.full((1024, 256), 0.125), "extras/norm": torch.tensor(0.375)},  # 1 MiB and 4 bytes
    {
        "round": 2,
        "client": "ward",
        "num_examples": 48,
        "num_steps": 5,
        "num_tokens": None,
        "base_digest": "ab" * 32,
        "numbers": [],
        "figures": {"train_loss": 0.625, "num_steps": 5, "seconds": 1.5},
        "moved": True,
        "has_rate": True,
        "seconds": {"prepare": 0.5, "local": 1.5},
    },
)
JOINED = Packet(
    "joined",
    {},
    {
        "client": "ward",
        "num_examples": 48,
        "label_counts": {"sepsis": 30, "none": 18},
        "has_held_out": True,
        "versions": {"torch": "2.9.1"},
    },
)
METRICS = Packet(
    "metrics", {}, {"round": 2, "client": "ward", "num_examples": 7, "metrics": {"eval_loss": 0.875, "eval_epoch": 1}}
)
FAILED = Packet("failed", {}, {"client": "ward", "round": 2, "reason": "its local round failed: OSError"})
RUN = {
    "run": "study-1",
    "trainer": "sft",
    "num_rounds": 3,
    "num_sampled": 4,
    "upload_bytes": 100,
    "weights": "uniform",
    "signed": True,
    "encrypted": True,
    "settings": {"max_steps": 5, "min_clients": 2, "aggregation": "fedavg"},
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "sent.jsonl"


def gate_at(path: Path, **policy: Any) -> PolicyGate:
    return PolicyGate(SentLog(path), Policy(**policy))


# What may come


def test_a_run_within_the_policy_may_come(path: Path) -> None:
    gate_at(path, most_rounds=3).check(RUN, "ward", 48, 1)
    PolicyGate(SentLog(path)).check({"run": "study-1", "num_rounds": 10**6}, "ward", 48, 1)
    assert not path.exists()


def test_a_run_that_asks_for_more_is_declined_in_the_words_of_the_policy(path: Path) -> None:
    with pytest.raises(DeclinedError) as declined:
        gate_at(path, most_rounds=2, most_local_steps=4).check(RUN, "ward", 48, 1)
    assert str(declined.value).startswith(
        "The policy of client 'ward' does not allow the run (`most_rounds`, `most_local_steps`). `most_rounds`: the run"
    )
    assert "`most_local_steps`: the run asks for 5 local steps" in str(declined.value)


@pytest.mark.parametrize("kind", ["signed", "encrypted"])
def test_of_signatures_and_encryption_counts_what_this_side_has_set_up(path: Path, kind: str) -> None:
    policy = Policy(**{f"needs_{kind}": True})
    with pytest.raises(DeclinedError, match=f"`needs_{kind}`: the packets of the run are not {kind}"):
        PolicyGate(SentLog(path), policy).check(RUN, "ward", 48, 1)
    run = {**RUN, kind: False}  # whatever the coordinator says
    PolicyGate(SentLog(path), policy, **{f"is_{kind}": True}).check(run, "ward", 48, 1)


def test_the_number_of_examples_and_of_processes_counts(path: Path) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    run = {**RUN, "settings": {**settings, "gradient_accumulation_steps": 2}}
    gate = gate_at(path, most_local_steps=3)
    gate.check(run, "ward", 24, 1)
    gate.check(run, "ward", 48, 2)
    with pytest.raises(DeclinedError, match="asks for 6 local steps"):
        gate.check(run, "ward", 48, 1)


# What may leave


@pytest.mark.parametrize("packet", [JOINED, UPDATE, METRICS, FAILED], ids=lambda packet: packet.kind)
def test_without_a_policy_everything_on_the_list_leaves(path: Path, packet: Packet) -> None:
    assert PolicyGate(SentLog(path)).out("ward", packet) is packet


@pytest.mark.parametrize("packet", [JOINED, UPDATE, METRICS], ids=lambda packet: packet.kind)
def test_what_may_not_leave_stays(path: Path, packet: Packet) -> None:
    gate = gate_at(path, may_leave={"example_counts": False, "metrics": False})
    leaving = gate.out("ward", packet)
    assert leaving.tensors is packet.tensors
    assert leaving.meta.keys() == packet.meta.keys()
    assert leaving.meta["num_examples"] is None
    withheld = {"figures_withheld": True}
    assert leaving.meta.get("figures", withheld) == leaving.meta.get("metrics", withheld) == withheld
    assert leaving.meta.get("label_counts") is leaving.meta.get("has_held_out") is None


def test_an_update_of_the_largest_size_leaves_and_a_larger_one_does_not(path: Path) -> None:
    gate_at(path, largest_upload_mib=1 + 4 / 2**20).out("ward", UPDATE)
    with pytest.raises(ClientError, match=r"has 1,048,580 bytes, but `largest_upload_mib` .* allows 1,048,579"):
        gate_at(path, largest_upload_mib=1 + 3 / 2**20).out("ward", UPDATE)


def test_of_a_round_too_many_no_update_leaves_whatever_the_run_has_said(path: Path) -> None:
    gate_at(path, most_rounds=2).out("ward", UPDATE)
    with pytest.raises(ClientError, match="it is round 2, but `most_rounds` of its policy allows 1"):
        gate_at(path, most_rounds=1).out("ward", UPDATE)


@pytest.mark.parametrize("policy", [None, Policy()], ids=["no policy", "policy"])
def test_what_is_not_on_the_list_does_not_leave(path: Path, policy: Policy | None) -> None:
    with pytest.raises(ClientError, match="the field 'rows'"):
        PolicyGate(SentLog(path), policy).out("ward", Packet("update", {}, {**UPDATE.meta, "rows": []}))


# What is written down


def let_out(gate: PolicyGate, packet: Packet) -> int:
    size = len(gate.out("ward", packet).to_bytes())
    gate.sent("ward", size)
    return size


def test_a_line_says_what_has_left_in_words(path: Path) -> None:
    gate = gate_at(path)
    gate.check(RUN, "ward", 48, 1)
    sizes = [let_out(gate, packet) for packet in (JOINED, UPDATE, METRICS, FAILED)]
    joined, update, metrics, failed = lines(path)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", update.pop("time"))
    assert update == {
        "run": "study-1",
        "client": "ward",
        "round": 2,
        "kind": "update",
        "meaning": "what has come of the training of a round",
        "contains": [
            "change of the trained weights: 1 tensor of float32, 1,048,576 bytes",
            "numbers that the local objective sends along: 1 tensor of float32, 4 bytes",
            "number of the round",
            "name of the client",
            "number of examples",
            "number of local steps",
            "digest of the base model",
            "figures of the training: train_loss, num_steps, seconds",
            "whether the training has changed anything",
            "whether the learning rate was above zero",
            "seconds of its work by phase: prepare, local",
        ],
        "held_back": [],
        "bytes": sizes[1],
    }
    assert joined["round"] is None and joined["held_back"] == ["number of examples by label"]
    assert metrics["contains"][-1] == "figures of the evaluation: eval_loss, eval_epoch"
    assert failed["contains"][-1] == "reason: its local round failed: OSError"
    for line, packet, size in zip(
        (joined, update, metrics, failed), (JOINED, UPDATE, METRICS, FAILED), sizes, strict=True
    ):
        assert (line["kind"], line["bytes"], line["client"], line["run"]) == (packet.kind, size, "ward", "study-1")


def test_a_line_says_what_was_held_back(path: Path) -> None:
    let_out(gate_at(path, may_leave={"example_counts": False}), UPDATE)
    meta = {**UPDATE.meta, "figures": {"train_loss": 0.5, "epoch": 2.0}}
    let_out(gate_at(path, may_leave={"example_counts": False}), Packet("update", {}, meta))
    let_out(gate_at(path, may_leave={"metrics": False}), METRICS)
    first, second, third = lines(path)
    assert first["held_back"] == ["number of examples", "seconds of its work by phase: prepare, local"]
    assert "figures of the training: epoch" in second["held_back"]
    assert "figures of the training: train_loss" in second["contains"]
    assert third["held_back"] == ["figures of the evaluation: eval_loss, eval_epoch"]


@pytest.mark.parametrize("may_leave", [{}, {"example_counts": False}, {"metrics": False, "label_counts": True}])
def test_a_line_holds_no_value(path: Path, may_leave: dict[str, bool]) -> None:
    gate = gate_at(path, may_leave=may_leave)
    for packet in (JOINED, UPDATE, METRICS):
        let_out(gate, packet)
    text = re.sub(r'"time": "[^"]*"|"bytes": \d+', "", path.read_text())
    assert not re.search(r"\b(48|30|18|7|5)\b|\.\d|sepsis", text)


def test_a_run_that_is_not_known_yet_is_none(path: Path) -> None:
    let_out(PolicyGate(SentLog(path)), Packet("failed", {}, {"client": "ward", "reason": "a", "is_damaged": True}))
    assert lines(path)[0]["run"] is None


def test_lines_are_appended_and_one_that_was_cut_off_stays(path: Path) -> None:
    let_out(gate_at(path), FAILED)
    with open(path, "a") as file:
        file.write('{"time": "20')
    let_out(gate_at(path), FAILED)
    let_out(gate_at(path), FAILED)
    content = path.read_text().splitlines()
    assert len(content) == 4 and content[1] == '{"time": "20'
    assert all(json.loads(content[index])["kind"] == "failed" for index in (0, 2, 3))


def test_a_name_in_any_letters_can_be_read(path: Path) -> None:
    SentLog(path).write({"client": "Charité \ud800"})
    assert lines(path)[0]["client"] == "Charité \ud800"
    assert "Charité" in path.read_text(encoding="utf-8")


def test_a_line_is_on_the_disk_when_it_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")) or fsync(descriptor)
    )
    SentLog(path).write({})
    assert synced == [str(path.resolve()), str(path.parent.resolve())]
    SentLog(path).write({})
    assert synced[2:] == [str(path.resolve())]


# In the process of a client


class Site:
    """Answers with what it is given."""

    def __init__(self, answer: Packet | Exception) -> None:
        self.answer = answer

    def _answer(self) -> Packet:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def accept(self, client: str, invitation: Packet) -> Packet:
        return self._answer()

    def turn(self, packet: Packet) -> Packet:
        return self._answer()

    evaluate = turn


class End:
    """Gives out one message, and keeps what comes back."""

    def __init__(self, message: Packet, path: Path) -> None:
        self.messages, self.path = [message], path
        self.sent: list[bytes] = []
        self.logged: list[int] = []  # lines in the log when a message left

    def look(self) -> tuple[int, bytes]:
        if not self.messages:
            raise EndedError("it is over", is_finished=True)
        return 1, self.messages.pop().to_bytes()

    def reply(self, number: int, content: bytes) -> None:
        self.logged.append(len(lines(self.path)))
        self.sent.append(content)


TRAIN = Packet("train", {}, {"client": "ward", "round": 2})


def answered(path: Path, gate: PolicyGate, answer: Packet | Exception, message: Packet = TRAIN) -> tuple[Packet, End]:
    end = End(message, path)
    ClientProcess(Site(answer), {"ward": end}, gate).run()
    (content,) = end.sent
    return Packet.from_bytes(content), end


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (Packet("invite", {}, {}), JOINED),
        (TRAIN, UPDATE),
        (Packet("evaluate", {}, TRAIN.meta), METRICS),
        (TRAIN, TurnFailedError("its local round failed: OSError", {"local": 1.0})),
        (TRAIN, ValueError("a row of the data")),
        (Packet("else", {}, TRAIN.meta), UPDATE),
        (Packet("train", {}, {"client": "another"}), UPDATE),
    ],
    ids=["joined", "update", "metrics", "turn failed", "failed", "unknown kind", "of another client"],
)
def test_whatever_a_client_answers_is_logged_before_it_leaves(path: Path, message: Packet, answer: Any) -> None:
    told, end = answered(path, gate_at(path), answer, message)
    (line,) = lines(path)
    assert end.logged == [1]
    assert (line["kind"], line["bytes"]) == (told.kind, len(end.sent[0]))
    assert "a row of the data" not in path.read_text()


def test_what_the_gate_holds_up_becomes_a_failure_that_says_why(path: Path) -> None:
    told, _ = answered(path, gate_at(path, largest_upload_mib=0.5), UPDATE)
    assert (told.kind, told.meta["round"], told.tensors) == ("failed", 2, {})
    assert "`largest_upload_mib` of its policy allows 524,288" in told.meta["reason"]
    assert [line["kind"] for line in lines(path)] == ["failed"]


def test_what_cannot_be_logged_does_not_leave(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: SentLog, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SentLog, "_append", fails)
    end = End(TRAIN, path)
    with pytest.raises(OSError, match=r"sent.jsonl'.*No space left on device.*, so nothing was sent") as raised:
        ClientProcess(Site(UPDATE), {"ward": end}, gate_at(path)).run()
    assert raised.value.errno == errno.ENOSPC and end.sent == []
