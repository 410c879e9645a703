# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The two files of a record: a line per round, read as one, whatever has happened to the run that wrote them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from fed_trainer import FederatedConfig, FederatedTrainer, read_record
from fed_trainer.output import record as record_module
from fed_trainer.output.checkpoint import refuse_another_run
from fed_trainer.output.digests import find_damage, read_digests, write_digests
from fed_trainer.output.published import published_record
from fed_trainer.output.record import RecordFiles, read_header, write_json
from fed_trainer.output.report import main as report


LORA = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")


def record_of(num_rounds: int, **more: Any) -> dict[str, Any]:
    about = {"format": 1, "clients": {f"client {n}": {"num_examples": 9} for n in range(50)}, **more}
    return {**about, "rounds": [{"round": number, "loss": 0.5} for number in range(1, num_rounds + 1)]}


def rounds_of(folder: Path) -> list[int]:
    return [entry["round"] for entry in read_record(folder)["rounds"]]


# Writing


def test_a_thousand_rounds_cost_a_thousand_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = record_module._write
    monkeypatch.setattr(record_module, "_write", lambda path, text: (written.append(len(text)), write(path, text)))
    monkeypatch.setattr(record_module, "sync", lambda path: None)
    files, record = RecordFiles(tmp_path), record_of(0)
    files.begin(record)
    at_start = sum(written)
    line = len('{"round": 1000, "loss": 0.5}\n')
    for number in range(1, 1001):
        before = (tmp_path / "federation.jsonl").stat().st_size
        record["rounds"].append({"round": number, "loss": 0.5})
        record["clients"][f"client {number % 50}"]["digest"] = "0" * 64  # known from then on
        files.append(record, is_saved=number % 100 == 0)
        assert (tmp_path / "federation.jsonl").stat().st_size - before <= line
    assert len(written) == 2 + 10, "federation.json is written for rounds that are saved"
    assert sum(written) < at_start + 10 * 10_000 and len((tmp_path / "federation.jsonl").read_bytes()) < 1000 * line
    assert read_record(tmp_path) == record


def test_what_has_changed_beside_the_digests_is_written_with_the_line(tmp_path: Path) -> None:
    files, record = RecordFiles(tmp_path), record_of(1)
    files.begin(record)
    files.append(record | {"optimizer": "AdamW", "rounds": record_of(2)["rounds"]}, is_saved=False)
    assert read_record(tmp_path)["optimizer"] == "AdamW" and rounds_of(tmp_path) == [1, 2]


def test_a_round_is_on_the_disk_when_it_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RecordFiles(tmp_path)
    files.begin(record_of(0))
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    files.append(record_of(1), is_saved=False)
    assert sizes == [(tmp_path / "federation.jsonl").stat().st_size] and sizes[0] > 0


def test_the_files_are_strict_json(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path)
    files.begin(record_of(0, start={"eval": {"eval_loss": math.nan}}))
    rounds = [{"round": 1, "loss": math.inf, "name": "a\nb\u2028c"}]
    files.append(record_of(0) | {"rounds": rounds}, is_saved=True)
    assert (tmp_path / "federation.jsonl").read_bytes().count(b"\n") == 1
    assert read_record(tmp_path)["rounds"] == [{"round": 1, "loss": "inf", "name": "a\nb\u2028c"}]


def test_a_copy_has_the_round_that_is_being_saved(tmp_path: Path) -> None:
    files, record = RecordFiles(tmp_path / "out"), record_of(2)
    files.begin(record)
    record["rounds"].append({"round": 3, "loss": 0.5})
    files.write(tmp_path / "out" / "checkpoint-3", record)
    files.write(tmp_path / "out", record)  # a callback that saves the model in the middle of the round
    assert rounds_of(tmp_path / "out" / "checkpoint-3") == [1, 2, 3] and rounds_of(tmp_path / "out") == [1, 2]
    record["rounds"][-1]["seconds"] = 1.0
    files.append(record, is_saved=True)
    assert read_record(tmp_path / "out") == record
    assert "seconds" not in read_record(tmp_path / "out" / "checkpoint-3")["rounds"][-1]


def test_rounds_that_were_deleted_during_a_run_are_there_again_at_its_end(tmp_path: Path) -> None:
    files, record = RecordFiles(tmp_path), record_of(2)
    files.begin(record)
    (tmp_path / "federation.jsonl").unlink()
    files.write(tmp_path, record)
    assert read_record(tmp_path) == record


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RecordFiles(tmp_path)
    files.begin(record_of(0))

    def refuses(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module, "sync", refuses)
    with pytest.raises(OSError, match=r"federation.jsonl could not be written \(.*No space left on device.*make room"):
        files.append(record_of(1), is_saved=False)


# Reading


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    RecordFiles(tmp_path).begin(record_of(3))
    path = tmp_path / "federation.jsonl"
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        assert rounds_of(tmp_path) == [1, 2]
    path.write_bytes(whole)
    assert rounds_of(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"round": 1}', '{"rou', '{"round": 3}'], "line 2 is not JSON"),
        (['{"round": 1}', ""], "line 2 is not JSON"),
        (["[]"], r"line 1 holds \[\], not a dictionary"),
        (['{"round": 1, "round": 1}'], "occurs more than once"),
        (['{"round": 1}', '{"round": 3}'], "line 2 is not round 2"),
        (['{"round": 2}'], "line 1 is not round 1"),
        (['{"round": 1}', '{"round": 1}'], "line 2 is not round 2"),
        (['{"loss": 1}'], "line 1 is not round 1"),
    ],
)
def test_another_line_that_is_not_as_it_was_written_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "federation.json", {"format": 2})
    (tmp_path / "federation.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=rf"federation\.jsonl' cannot be used: .*{message}"):
        read_record(tmp_path)


def test_rounds_that_are_missing_are_not_taken_for_none(tmp_path: Path) -> None:
    write_json(tmp_path / "federation.json", {"format": 2})
    with pytest.raises(ValueError, match=r"federation\.jsonl' cannot be used: it cannot be read"):
        read_record(tmp_path)


def test_a_folder_without_a_record_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {}


def test_rounds_inside_are_those_of_the_record_whatever_is_beside(tmp_path: Path) -> None:
    write_json(tmp_path / "federation.json", record_of(2))
    (tmp_path / "federation.jsonl").write_text("notes of the user\n")
    assert read_record(tmp_path) == record_of(2)


# Whose file it is


def test_a_file_of_lines_that_is_no_runs_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "federation.jsonl").touch()
    refuse_another_run(tmp_path)  # a run has died here before it wrote more
    (tmp_path / "federation.jsonl").write_text("notes of the user\n")
    for content in (None, record_of(0)):
        if content is not None:
            write_json(tmp_path / "federation.json", content)
        with pytest.raises(FileExistsError, match=r"holds federation\.jsonl, which this run has not written"):
            refuse_another_run(tmp_path, starts_again=True)
    RecordFiles(tmp_path).begin(record_of(2))
    refuse_another_run(tmp_path, starts_again=True)


# Whole runs


@pytest.fixture(scope="module")
def make_trainer(
    tiny_model_dir: Path, make_clients: Callable[..., dict[str, Dataset]]
) -> Callable[..., FederatedTrainer]:
    def make(folder: Path, **settings: Any) -> FederatedTrainer:
        values: dict[str, Any] = {"num_rounds": 3, "max_steps": 1, "learning_rate": 1e-2, "max_length": 32}
        plain: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
        return FederatedTrainer(
            model=str(tiny_model_dir),
            args=FederatedConfig(output_dir=str(folder), gradient_checkpointing=False, **plain, **values | settings),
            train_dataset=make_clients(num_clients=2, rows=8),
            peft_config=None if "initial_adapter" in settings else LORA,
        )

    return make


@pytest.fixture(scope="module")
def finished(make_trainer: Callable[..., FederatedTrainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_seconds(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    for entry in record["rounds"]:
        del entry["seconds"]
        for figures in entry["clients"].values():
            del figures["seconds"]
    return record


def end_of(folder: Path) -> tuple[bytes, dict[str, Any]]:
    return (folder / "adapter_model.safetensors").read_bytes(), without_seconds(folder)


def test_a_checkpoint_has_its_own_copy(finished: Path) -> None:
    for number in (1, 2, 3):
        folder = finished / f"checkpoint-{number}"
        assert rounds_of(folder) == list(range(1, number + 1)) and find_damage(folder) is None
        assert {"federation.json", "federation.jsonl"} <= read_digests(folder).keys()
        timed = ["checkpoint" in entry["seconds"] for entry in read_record(folder)["rounds"]]
        assert timed == [True] * (number - 1) + [False]
    assert all("checkpoint" in entry["seconds"] for entry in read_record(finished)["rounds"])


def test_rounds_without_a_checkpoint_are_lines_too(
    make_trainer: Callable[..., FederatedTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: list[int] = []
    write = RecordFiles._write_header

    def watched(self: RecordFiles, record: dict[str, Any]) -> None:
        headers.append(len(record["rounds"]))
        write(self, record)

    monkeypatch.setattr(RecordFiles, "_write_header", watched)
    make_trainer(tmp_path, num_rounds=4, save_rounds=4).train()
    # at the start (twice), with the optimiser of the first round, with the checkpoint, at the end
    assert headers == [0, 0, 1, 4, 4] and rounds_of(tmp_path) == [1, 2, 3, 4]


def test_rounds_after_the_checkpoint_are_dropped_when_it_is_resumed(
    make_trainer: Callable[..., FederatedTrainer], finished: Path, run: Path
) -> None:
    for number in (2, 3):
        shutil.rmtree(run / f"checkpoint-{number}")
    trainer = make_trainer(run)
    seen: list[list[int]] = []
    begin = trainer._run._begin
    trainer._run._begin = lambda state: (seen.append(rounds_of(run)), begin(state))  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=True)
    assert seen == [[1]] and end_of(run) == end_of(finished)


def test_a_run_that_died_between_a_checkpoint_and_its_line_goes_on(
    make_trainer: Callable[..., FederatedTrainer], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordFiles.append

    def dies(self: RecordFiles, record: dict[str, Any], is_saved: bool) -> None:
        if len(record["rounds"]) == 2:
            raise KeyboardInterrupt
        append(self, record, is_saved)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordFiles, "append", dies)
        make_trainer(tmp_path).train()
    assert rounds_of(tmp_path) == [1] and rounds_of(tmp_path / "checkpoint-2") == [1, 2]
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert end_of(tmp_path) == end_of(finished)
    assert ["checkpoint" in entry["seconds"] for entry in read_record(tmp_path)["rounds"]] == [True, False, True]


def test_a_damaged_line_does_not_hinder_a_run_from_going_on(
    make_trainer: Callable[..., FederatedTrainer], finished: Path, run: Path
) -> None:
    shutil.rmtree(run / "checkpoint-3")
    (run / "federation.jsonl").write_bytes(b"\0" * 100 + b"\n")
    with pytest.raises(SystemExit, match="cannot be reported: .*line 1 is not JSON.* Or resume the run"):
        report([str(run)])
    make_trainer(run).train(resume_from_checkpoint=True)
    assert end_of(run) == end_of(finished)


def as_of_before(folder: Path) -> None:
    """As earlier versions wrote it: one file, with the rounds in it."""
    write_json(folder / "federation.json", read_record(folder))
    (folder / "federation.jsonl").unlink()
    if folder.name.startswith("checkpoint-"):
        write_digests(folder, read_digests(folder).keys() - {"federation.jsonl"})


def test_a_run_of_an_earlier_version_is_reported_and_resumed(
    make_trainer: Callable[..., FederatedTrainer],
    finished: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report([str(run)])
    table = capsys.readouterr().out.splitlines()[:5]
    shutil.rmtree(run / "checkpoint-3")
    for folder in (run, run / "checkpoint-1", run / "checkpoint-2"):
        as_of_before(folder)
    assert json.loads((run / "federation.json").read_text())["format"] == 1
    report([str(run)])
    assert capsys.readouterr().out.splitlines()[:5] == table
    make_trainer(run).train(resume_from_checkpoint=True)
    assert end_of(run) == end_of(finished)
    assert json.loads((run / "federation.json").read_text())["format"] == 2
    assert find_damage(run / "checkpoint-3") is None and find_damage(run / "checkpoint-2") is None


@pytest.mark.parametrize("kind", ["published", "without its rounds"])
def test_an_adapter_to_start_from_is_compared_by_its_record(
    kind: str, make_trainer: Callable[..., FederatedTrainer], run: Path, tmp_path: Path
) -> None:
    record = read_header(run)
    if kind == "published":
        record = published_record(read_record(run))
        assert record["format"] == 1 and [entry["round"] for entry in record["rounds"]] == [1, 2, 3]
    (run / "federation.jsonl").unlink()
    write_json(run / "federation.json", record)
    make_trainer(tmp_path / "more", initial_adapter=str(run))
    write_json(run / "federation.json", record | {"base_digest": "another"})
    with pytest.raises(ValueError, match="was trained on another base model"):
        make_trainer(tmp_path / "more", initial_adapter=str(run))
