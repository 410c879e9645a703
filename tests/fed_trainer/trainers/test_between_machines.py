# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federations whose clients are other processes end with the bits of the same federation in one process."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fed_trainer import read_record
from helpers.comparison import same
from helpers.deepspeed import DEEPSPEED, needs_deepspeed
from helpers.machines import ALL, CASES, CLIENTS, SERVER, make_all_keys, run_all, trainer_of


CONFIGS = Path(__file__).parents[3] / "recipes" / "accelerate"
pytestmark = pytest.mark.slow  # five processes each


@pytest.fixture(scope="session")
def in_one_process(tiny_model_dir, tmp_path_factory):
    """The folder of a case with all clients in one process."""

    @functools.cache
    def run(case: str) -> Path:
        folder = tmp_path_factory.mktemp("one") / case
        trainer_of(case, ALL, folder, tiny_model_dir).train()
        return folder

    return run


@pytest.fixture(scope="session")
def between_processes(tiny_model_dir, tmp_path_factory):
    """The folder of all cases, each with a coordinator and four clients in processes of their own."""
    folder = tmp_path_factory.mktemp("several")
    run_all(folder, tiny_model_dir, list(CASES))
    return folder


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rounds(folder: Path) -> list[dict[str, Any]]:
    """What a record says of rounds, without how long they took and who was sent what."""
    kept = ("round", "train_loss", "refused", "bytes_up")
    return [{name: entry[name] for name in kept} for entry in read_record(folder)["rounds"]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_that_of_one_process_bit_for_bit(case, in_one_process, between_processes):
    one, several = in_one_process(case), between_processes / case / SERVER
    assert same(adapter(several), adapter(one))
    assert rounds(several) == rounds(one)
    for here, there in zip(read_record(several)["rounds"], read_record(one)["rounds"], strict=True):
        assert here["eval"]["eval_loss"] == there["eval"]["eval_loss"]  # measured by the clients
        assert here["client_eval"].keys() == set(CLIENTS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_over_a_bucket_it_is_the_same(s3_endpoint, in_one_process, tiny_model_dir, tmp_path):
    run_all(tmp_path, tiny_model_dir, ["plain"], address="s3://federation/run")
    one, several = in_one_process("plain"), tmp_path / "plain" / SERVER
    assert same(adapter(several), adapter(one))
    assert rounds(several) == rounds(one)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(
            {"client_0": ["steps:2"], "client_1": ["marker:3"], "client_2": ["reply:3"], SERVER: ["checkpoint:1"]},
            id="all together",
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(kills, id=name, marks=pytest.mark.slow)
            for name, kills in {
                "a client while it keeps": {"client_3": ["keeping:1", "keeping:1"]},
                "the coordinator in the exchange": {SERVER: ["exchange:2", "exchange:4"]},
                "the coordinator in the aggregation": {SERVER: ["aggregation:1", "aggregation:2"]},
                "the coordinator after the checkpoint": {SERVER: ["after the checkpoint:1"]},
            }.items()
        ),
    ],
)
def test_whoever_is_killed_the_run_goes_on_to_the_same_bits(kills, in_one_process, tiny_model_dir, tmp_path):
    killed = run_all(tmp_path, tiny_model_dir, ["kept_optimizers"], kills=kills)
    assert {role: number for role, number in killed.items() if number} == {
        role: len(points) for role, points in kills.items()
    }
    one, several = in_one_process("kept_optimizers"), tmp_path / "kept_optimizers" / SERVER
    assert same(adapter(several), adapter(one))
    assert rounds(several) == rounds(one)


def random_kills(number: int, seed: int) -> dict[str, list[str]]:
    """Points where processes are killed, drawn at random: `number` in all, over coordinator and clients."""
    generator = random.Random(seed)
    of_clients, of_server = ("steps", "keeping", "reply", "marker"), ("exchange", "aggregation", "checkpoint")
    kills: dict[str, list[str]] = {}
    for _ in range(number):
        role = generator.choice([SERVER, *CLIENTS])
        point = generator.choice(of_server if role == SERVER else of_clients)
        kills.setdefault(role, []).append(f"{point}:{generator.randint(1, 2)}")
    return kills


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_25_random_kills_the_bits_are_the_same(tiny_model_dir, tmp_path):
    settings = {"num_rounds": 12}
    trainer_of("kept_optimizers", ALL, tmp_path / "one", tiny_model_dir, **settings).train()
    kills = random_kills(25, seed=0)
    killed = run_all(tmp_path, tiny_model_dir, ["kept_optimizers"], kills=kills, seconds=1000, NUM_ROUNDS="12")
    assert sum(killed.values()) == 25
    several = tmp_path / "kept_optimizers" / SERVER
    assert same(adapter(several), adapter(tmp_path / "one"))
    assert rounds(several) == rounds(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_signed_and_encrypted_messages_bring_the_same_bits(in_one_process, tiny_model_dir, tmp_path):
    make_all_keys(tmp_path / "keys")
    run_all(tmp_path, tiny_model_dir, ["plain"], KEYS=str(tmp_path / "keys"))
    assert same(adapter(tmp_path / "plain" / SERVER), adapter(in_one_process("plain")))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_site_of_several_processes_takes_part(kind, tiny_model_dir, tmp_path, monkeypatch):
    """Its first process talks, both train: the batches are twice as large, so the bits are not those of one process."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{kind}.yaml")]
    launcher += ["--main_process_port", "0"]
    if kind == "zero2":
        monkeypatch.syspath_prepend(DEEPSPEED)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv("PATH", f"{Path(DEEPSPEED, 'bin')}{os.pathsep}{os.environ['PATH']}")
    run_all(tmp_path, tiny_model_dir, ["plain"], launchers={"client_1": launcher})
    record = read_record(tmp_path / "plain" / SERVER)
    assert [entry["refused"] for entry in record["rounds"]] == [{}, {}, {}]
    assert any("client_1" in entry["clients"] for entry in record["rounds"])
