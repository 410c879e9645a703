# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One engine serves a whole federation: plain, DDP, DeepSpeed ZeRO-1, 2 and 3 and FSDP2, with two processes on the CPU.

Each kind is launched once, with the configuration that users launch with; `distributed_worker.py` is what the
processes do. FSDP2 has to be forced on the CPU, see `helpers/fsdp_on_cpu.py`. Where slow tests are left out, DDP
and ZeRO-2 stand for all kinds, in a launch that is shorter: fewer clients, two methods, and failures under DDP only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file

from fed_trainer import FederatedConfig, FederatedTrainer, read_record
from fed_trainer.client.engines.deepspeed import DeepSpeed
from fed_trainer.trainers.refusals.launch import check_launch
from helpers.deepspeed import DEEPSPEED, needs_deepspeed
from helpers.paths import RECIPES, TESTS


pytestmark = pytest.mark.distributed

CONFIGS = RECIPES / "accelerate"

WRAPPED = {"ddp": ("MULTI_CPU", "DistributedDataParallel"), "fsdp2": ("FSDP", "FSDPPeftModel")}
WRAPPED |= dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), ("DEEPSPEED", "DeepSpeedEngine"))
SHORT = ("fedavg", "fedsa_lora")
METHODS = (*SHORT, "fedex_lora", "kept_optimizers", "federa", "dpo", "classifier")
NOT_RUN = {  # refused, or tried elsewhere
    "ddp": {"federa"},
    "zero1": {"kept_optimizers", "federa"},
    "zero2": {"kept_optimizers", "federa"},
    "zero3": {"kept_optimizers", "fedex_lora"},
    "zero3_offload": {"kept_optimizers", "fedex_lora", "federa"},
    "fsdp2": {"kept_optimizers", "fedex_lora", "federa", "dpo", "classifier"},
}

SEVERAL = [
    "ddp",
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("zero2", marks=needs_deepspeed),
    *(pytest.param(kind, marks=[needs_deepspeed, pytest.mark.slow]) for kind in ("zero1", "zero3")),
    # compiles an optimiser for the CPU, which takes minutes
    pytest.param("zero3_offload", marks=[needs_deepspeed, pytest.mark.slow]),
]
NOT_SPLIT = [
    "ddp",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero1", marks=[needs_deepspeed, pytest.mark.slow]),
]


class Run:
    """What a launch has left: one report per process, and the folders of its federations."""

    def __init__(self, kind: str, folder: Path, scope: str) -> None:
        self.folder = folder
        self.is_whole = scope == "whole"
        self.methods = set(METHODS if self.is_whole else SHORT) - NOT_RUN.get(kind, set())
        self.reports = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]
        assert self.reports, "the launch has failed: see the first test that asked for it"

    def adapter(self, method):
        return load_file(self.folder / method / "adapter_model.safetensors")

    def record(self, method):
        return read_record(self.folder / method)


def launch(kind, model, folder, scope):
    paths = [str(TESTS), DEEPSPEED if kind.startswith("zero") else "", *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if kind.startswith("zero"):
        environment["DS_ACCELERATOR"] = "cpu"
        environment["PATH"] = os.pathsep.join([str(Path(DEEPSPEED, "bin")), os.environ["PATH"]])  # ninja
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{kind}.yaml")]
    command += ["--main_process_port", "0", str(Path(__file__).with_name("distributed_worker.py"))]
    command += [kind, str(model), str(folder), scope]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def run_of(request, tiny_model_dir, tmp_path_factory):
    """`run_of(kind)`: the run of that kind, which the first test that asks for it launches."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which the workers share
    scope = "short" if "not slow" in request.config.getoption("markexpr") else "whole"

    def run(kind):
        folder = base / f"distributed-{kind}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                launch(kind, tiny_model_dir, folder, scope)
        return Run(kind, folder, scope)

    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_the_model_is_wrapped_by_what_the_launch_asked_for(kind, run_of):
    run = run_of(kind)
    assert [report["engine"]["world_size"] for report in run.reports] == [2, 2]
    for report in run.reports:
        distributed_type, wrapped = WRAPPED[kind]
        assert report["engine"]["distributed_type"] == distributed_type
        for part in {"engine", *run.methods}:
            assert report[part]["wrapped"].startswith(wrapped)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=pytest.mark.slow), *SEVERAL])
def test_the_same_start_gives_the_loss_and_the_adapter_of_a_fresh_process(kind, run_of):
    for report in run_of(kind).reports:
        engine = report["engine"]
        assert engine["moved"] > 1e-2
        assert engine["loss_again"] == engine["loss"]
        assert engine["adapter_again"] == engine["adapter"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=pytest.mark.slow), *SEVERAL])
def test_nothing_grows_with_the_number_of_clients(kind, run_of):
    for report in run_of(kind).reports:
        early, late = report["engine"]["sizes"]
        assert late.pop("resident") < early.pop("resident") + 2**24
        assert late == early


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_all_processes_hold_the_same_model(kind, run_of):
    run = run_of(kind)
    first, second = run.reports
    assert first["engine"]["adapter"] == second["engine"]["adapter"]
    for part in (*run.methods, "resumed"):
        assert first[part] == second[part]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=pytest.mark.slow), *SEVERAL])
def test_a_run_that_is_resumed_ends_like_one_that_was_not(kind, run_of):
    run = run_of(kind)
    for report in run.reports:
        assert report["resumed"] == report["fedavg"]
        if run.is_whole and kind in ("cpu", "ddp"):
            assert report["kept_and_resumed"] == report["kept_optimizers"] != report["fedavg"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_a_federation_of_two_processes_gives_the_result_of_one(kind, run_of):
    one, two = run_of("cpu"), run_of(kind)
    for method in two.methods:
        expected, adapter = one.adapter(method), two.adapter(method)
        assert adapter.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(adapter[key], tensor, atol=1e-4, rtol=0)
        assert two.reports[0][method]["evaluations"] == pytest.approx(one.reports[0][method]["evaluations"], abs=1e-4)
        records = [run.record(method) for run in (one, two)]
        assert records[0]["base_digest"] == records[1]["base_digest"] is not None
        losses = [[entry["train_loss"] for entry in record["rounds"]] for record in records]
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.fast("ddp")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_a_client_that_fails_in_one_process_is_tried_again_by_all(kind, run_of):
    for report in run_of(kind).reports:
        assert report["failing"]["retried"] == report["failing"]["healthy"]


@pytest.mark.fast("ddp")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", NOT_SPLIT)
def test_a_client_that_fails_in_one_process_is_left_out_by_all_and_leaves_nothing_behind(kind, run_of):
    for report in run_of(kind).reports:
        assert report["failing"]["left_out"] == report["failing"]["without"]
        assert report["failing"]["reasons"] == {"client_1": "its local round failed: RuntimeError (process 1)"}


@pytest.mark.fast("ddp")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_the_slowest_process_decides_whether_a_client_is_too_slow(kind, run_of):
    for report in run_of(kind).reports:
        assert report["failing"]["hurried"].count("it was not done in time, but had taken 1 of 2 steps") == 3


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEVERAL)
def test_clients_keep_their_tensors_in_one_file_each(kind, run_of):
    folders = [run_of(kind).folder / "fedsa_lora" / part for part in (".fed_clients", "checkpoint-2/clients")]
    for folder in folders:
        assert [path.stem.partition("@")[0] for path in sorted(folder.glob("*.safetensors"))] == [
            "client_0",
            "client_1",
            "client_2",
        ]


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("kind", SEVERAL[1:])
def test_what_computes_in_bfloat16_is_trained_in_float32(kind, run_of):
    for report in run_of(kind).reports:
        assert report["bfloat16"]["computed"] == "torch.bfloat16"
        assert report["bfloat16"]["are_kept"] == [True, True]
        first, other, again = report["bfloat16"]["adapters"]
        assert again == first != other
        assert report["bfloat16"]["follows"]
        assert report["bfloat16"]["resumed"] == report["bfloat16"]["whole"]


# Launches that do something else than they say


def arguments(distributed_type="NO", num_processes=1, use_cpu=False, fsdp=None):
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=distributed_type), num_processes=num_processes)
    return SimpleNamespace(use_cpu=use_cpu, fsdp=fsdp, distributed_state=state)


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
DS = {**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "args", "error", "message"),
    [
        (DS, arguments("MULTI_CPU", 2, use_cpu=True), ValueError, "`use_cpu=True` makes Accelerate drop it"),
        (DS | {"ACCELERATE_USE_CPU": "true"}, arguments("MULTI_CPU", 2), ValueError, "`ACCELERATE_USE_CPU` makes"),
        (DS, arguments(), ValueError, "`--ddp_backend gloo`"),
        (DS, arguments("MULTI_GPU", 2), ValueError, "but Accelerate runs MULTI_GPU"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, arguments(), ValueError, "`--use_cpu true`"),
        (LAUNCHED | {"MASTER_ADDR": "127.0.0.1"}, arguments(use_cpu=True), ValueError, "has started one"),
    ],
)
def test_a_launch_of_which_a_part_was_dropped_is_refused(environment, args, error, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=message):
        check_launch(args)


@pytest.mark.parametrize(
    ("environment", "args"), [({}, arguments()), (LAUNCHED, arguments()), ({"WORLD_SIZE": "2"}, arguments("x", 2))]
)
def test_a_launch_that_does_what_it_says_is_not_refused(environment, args, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(args)


def check(trainer, stage, zero, config, live=None, has_optimizer=False):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero, **config})
    DeepSpeed(SimpleNamespace(deepspeed_plugin=plugin)).check(
        trainer.args,
        trainer.model,
        live or trainer._live_adapter,
        adds_to_base=trainer.client.plan.method.adds_to_base,
        has_stages=trainer._stage.rounds > 0,
        has_optimizer=has_optimizer,
    )


@pytest.mark.parametrize(
    ("stage", "zero", "config", "settings", "peft_config", "message"),
    [
        (0, {}, {}, {}, {}, "ZeRO stage 0"),
        (2, {"offload_optimizer": {"device": "nvme"}}, {}, {}, {}, "NVMe"),
        (1, {}, {"data_types": {"grad_accum_dtype": "fp32"}}, {"bf16": True}, {}, "another optimiser of DeepSpeed"),
        (3, {"zero_quantized_nontrainable_weights": True}, {}, {}, {}, "stores what is frozen as integers"),
        (2, {}, {"scheduler": {"type": "WarmupLR"}}, {}, {}, "a `scheduler` of its own"),
        (2, {}, {"optimizer": {"type": "AdamW"}}, {}, {}, "an `optimizer` of its own"),
        (2, {}, {}, {"local_objective": "fedprox", "local_objective_kwargs": {"mu": 0.1}}, {}, "'fedprox'"),
        (2, {}, {}, {"keep_optimizer_state": True}, {}, "one flat piece per process"),
        (2, {}, {}, {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1}}, {}, "slora"),
        (3, {}, {}, {"aggregation": "fedex_lora"}, {}, "'fedex_lora'` adds to base weights"),
        (3, {}, {}, {}, None, "splits the whole model"),
        (3, {}, {}, {}, "prompt", "computes a prompt"),
    ],
)
def test_what_cannot_be_done_under_deepspeed_is_refused(
    stage, zero, config, settings, peft_config, message, tiny_model_dir, make_clients, tmp_path
):
    kinds = {
        None: None,
        "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    args = FederatedConfig(
        output_dir=str(tmp_path),
        num_rounds=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        **settings,
    )
    trainer = FederatedTrainer(
        model=str(tiny_model_dir),
        args=args,
        train_dataset=make_clients(num_clients=2),
        peft_config=LoraConfig(task_type="CAUSAL_LM") if peft_config == {} else kinds[peft_config],
    )
    with pytest.raises(NotImplementedError, match=message):
        check(trainer, stage, zero, config)


def test_what_can_be_done_under_deepspeed_is_not_refused(tiny_model_dir, make_clients, tmp_path):
    args = FederatedConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    trainer = FederatedTrainer(
        model=str(tiny_model_dir),
        args=args,
        train_dataset=make_clients(num_clients=2),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    for stage in (1, 2, 3):
        check(trainer, stage, {"stage": stage}, {})
        statistics = SimpleNamespace(buffers={"score.running_mean", "score.running_var"})
        with pytest.raises(NotImplementedError, match="score.running_mean is a running statistic"):
            check(trainer, stage, {"stage": stage}, {}, live=statistics)
        with pytest.raises(NotImplementedError, match="`optimizers`"):
            check(trainer, stage, {"stage": stage}, {}, has_optimizer=True)
