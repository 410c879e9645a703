# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federations over NVFlare on this machine, with its own provisioning and mTLS: one server, three sites, a process or a
launch of two processes at each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from fed_trainer import read_record
from fed_trainer.cli.building import build_trainer
from fed_trainer.cli.data import load_rows
from fed_trainer.cli.run_file import RunFile, config_of, peft_config_of
from helpers.data import clients_of
from helpers.deepspeed import DEEPSPEED, needs_deepspeed
from helpers.nvflare_sites import Sites, needs_nvflare
from helpers.paths import RECIPES


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_nvflare]

SITES = ["site-1", "site-2", "site-3"]
LONG = 300.0  # seconds, for what should take a fraction of it


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Iterator[Sites]:
    sites = Sites(tmp_path_factory.mktemp("nvflare"), SITES)
    try:
        sites.provision()
        sites.start()
        for name, rows in zip(SITES, clients_of(len(SITES), 16).values(), strict=True):
            rows.select_columns(["prompt", "completion"]).to_json(sites.folder / f"{name}.jsonl")
        yield sites
    finally:
        sites.stop()


def write_run(sites: Sites, name: str, model: Path, **fields: object) -> Path:
    """The run's file; its `output_dir` is called like it."""
    run = {
        "model_name_or_path": str(model),
        "clients": SITES,
        "peft_config": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "output_dir": str(sites.folder / name),
        "num_rounds": 3,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "wait": LONG,
        "round_timeout": LONG,
        **fields,
    }
    path = sites.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def submit(sites: Sites, run: Path, *keys: str) -> str:
    """Submit the job of a run; returns its id."""
    job = sites.folder / f"job-{run.stem}"
    sites.run("-m", "fed_trainer", "nvflare-job", str(run), "--to", str(job), *keys)
    return sites.submit(job)


def keys_of(sites: Sites, name: str) -> tuple[str, ...]:
    """Make keys, and return the options that use them, trust who comes first, and encrypt."""
    key = sites.folder / f"{name}.key"
    sites.run("-m", "fed_trainer", "keys", str(key), "--name", name)
    return ("--key", str(key), "--known", f"{key}.known", "--accept-first", "--encrypt")


def join(
    sites: Sites,
    site: str,
    model: Path,
    run: str,
    *launch: str,
    setting: str = "use_cpu=true",
    keys: Sequence[str] = (),
    **env: str,
) -> str:
    """Start the process, or the launch, of a site; returns its name."""
    data, kept = sites.folder / f"{site}.jsonl", sites.folder / f"{run}-{site}"
    arguments = [*launch, "-m", "fed_trainer", "join", "--at", f"nvflare:{sites.kits / site / 'fed_trainer.json'}"]
    arguments += ["--name", site, "--data", str(data), "--model", str(model), "--output_dir", str(kept)]
    sites.spawn(f"{run}-join-{site}", *arguments, "--set", setting, *keys, **env)
    return f"{run}-join-{site}"


def wait_for(sites: Sites, names: list[str]) -> None:
    """All of them end, and well."""
    for name in names:
        assert sites.processes[name].wait(LONG * 2) == 0, (sites.folder / f"{name}.log").read_text()


def rounds(folder: Path) -> list[dict]:
    path = folder / "federation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_adapter_is_that_of_one_process_bit_for_bit(sites, tiny_model_dir, tmp_path):
    """Signed and encrypted, too."""
    path = write_run(sites, "plain", tiny_model_dir)
    submit(sites, path, *keys_of(sites, "coordinator"))
    wait_for(sites, [join(sites, site, tiny_model_dir, "plain", keys=keys_of(sites, site)) for site in SITES])

    run = RunFile.load(path)
    args = config_of(run.part, {**run.config, "output_dir": str(tmp_path)})
    adapter = peft_config_of(run.peft_config, run.part.task_type)
    clients = {site: load_rows([str(sites.folder / f"{site}.jsonl")]) for site in SITES}
    alone = build_trainer(
        run.part, run.model_name_or_path, args, adapter, run.data_fields, None, clients, None, trust_remote_code=False
    )
    alone.train()
    alone.save_model()
    ours, theirs = (Path(folder, "adapter_model.safetensors") for folder in (tmp_path, sites.folder / "plain"))
    assert theirs.read_bytes() == ours.read_bytes()


@needs_deepspeed
def test_sites_of_several_processes_under_ddp_and_zero2(sites, tiny_model_dir):
    submit(sites, write_run(sites, "several", tiny_model_dir))
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    ddp = join(sites, "site-1", tiny_model_dir, "several", *launch, str(RECIPES / "accelerate" / "ddp.yaml"))
    zero2 = join(
        sites, "site-2", tiny_model_dir, "several", *launch, str(RECIPES / "accelerate" / "zero2.yaml"),
        setting="ddp_backend=gloo",
        PYTHONPATH=os.pathsep.join([sites.env["PYTHONPATH"], DEEPSPEED]),
        PATH=os.pathsep.join([str(Path(DEEPSPEED, "bin")), os.environ["PATH"]]),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    wait_for(sites, [ddp, zero2, join(sites, "site-3", tiny_model_dir, "several")])
    record = read_record(sites.folder / "several")
    assert [sorted(entry["clients"]) for entry in record["rounds"]] == [SITES] * 3
    trained = load_file(sites.folder / "several" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)


def test_a_killed_process_that_is_started_again_is_back_in_the_same_job(sites, tiny_model_dir):
    """NVFlare misses it after 30 seconds without a heartbeat; till then its rounds go on without it, by name."""
    folder = sites.folder / "killed"
    submit(sites, write_run(sites, "killed", tiny_model_dir, num_rounds=400, round_timeout=8.0))
    names = [join(sites, site, tiny_model_dir, "killed") for site in SITES]
    wait_until(lambda: len(rounds(folder)) >= 3)
    sites.kill(names[2])
    join(sites, "site-3", tiny_model_dir, "killed")
    wait_until(lambda: "site-3" not in rounds(folder)[-1]["clients"])
    assert "not answered" in rounds(folder)[-1]["refused"]["site-3"]
    wait_until(lambda: "site-3" in rounds(folder)[-1]["clients"])
