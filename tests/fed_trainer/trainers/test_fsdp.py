# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused of FSDP. That FSDP2 works is tested in test_distributed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from peft import LoraConfig, PromptTuningConfig

from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.client.engines.fsdp import FSDP2
from fed_trainer.trainers.refusals.launch import check_launch


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def arguments(distributed_type="MULTI_GPU", num_processes=2, fsdp_version=None):
    return SimpleNamespace(
        use_cpu=distributed_type == "MULTI_CPU",
        fsdp=fsdp_version is not None,
        fsdp_plugin_args=None if fsdp_version is None else {"fsdp_version": fsdp_version},
        distributed_state=SimpleNamespace(
            distributed_type=DistributedType(distributed_type), num_processes=num_processes
        ),
    )


@pytest.mark.parametrize(
    ("environment", "args", "error", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, arguments(), NotImplementedError, "FSDP1 is not supported"),
        (LAUNCHED | {"FSDP_VERSION": "1"}, arguments(), NotImplementedError, "fsdp2.yaml"),
        ({}, arguments(fsdp_version=1), NotImplementedError, "FSDP1 is not supported"),
        (LAUNCHED, arguments("NO", 1), ValueError, "here runs NO: nothing would be split"),
        (LAUNCHED, arguments("NO", 2), ValueError, "zero3.yaml <script> --ddp_backend gloo"),
        (LAUNCHED, arguments("MULTI_CPU"), ValueError, "here runs MULTI_CPU"),
        (LAUNCHED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, arguments(), NotImplementedError, "Set it to `false`"),
    ],
)
def test_a_launch_that_would_split_nothing_or_cannot_be_federated_is_refused(
    environment, args, error, message, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=message):
        check_launch(args)


@pytest.mark.parametrize(
    ("environment", "args"),
    [(LAUNCHED, arguments()), (LAUNCHED, arguments("FSDP")), ({}, arguments(fsdp_version=2))],
)
def test_a_launch_with_fsdp2_on_gpus_is_not_refused(environment, args, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(args)


@pytest.fixture
def federation(tiny_model_dir, make_clients, tmp_path):
    def federation(peft_config, **settings):
        args = FederatedConfig(
            output_dir=str(tmp_path),
            num_rounds=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            **settings,
        )
        return FederatedTrainer(str(tiny_model_dir), args, make_clients(num_clients=2), peft_config=peft_config)

    return federation


def check(trainer, live=None, activation_checkpointing=False):
    engine = FSDP2(SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=activation_checkpointing)))
    engine.check(
        trainer.args,
        trainer.model,
        live or trainer._live_adapter,
        adds_to_base=trainer.client.plan.method.adds_to_base,
        has_stages=trainer._stage.rounds > 0,
        has_optimizer=False,
    )


LORA = LoraConfig(task_type="CAUSAL_LM")
SLORA = {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1}}


@pytest.mark.parametrize(
    ("peft_config", "settings", "message"),
    [
        (None, {}, "splits the whole model"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), {}, "computes a prompt"),
        (LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]), {}, "The output layer is trained"),
        (LORA, {"aggregation": "fedex_lora"}, "'fedex_lora'` adds to base weights"),
        (LORA, SLORA, "first stage"),
        (LORA, {"local_objective": "fedprox", "local_objective_kwargs": {"mu": 0.1}}, "'fedprox'"),
        (LORA, {"keep_optimizer_state": True}, "leaves each process a part"),
    ],
)
def test_what_cannot_be_done_under_fsdp2_is_refused(peft_config, settings, message, federation):
    with pytest.raises(NotImplementedError, match=message):
        check(federation(peft_config, **settings))


def test_settings_that_would_go_wrong_under_fsdp2_are_refused(federation):
    trainer = federation(LORA)
    check(trainer)
    with pytest.raises(NotImplementedError, match="would save an empty one"):
        check(trainer, activation_checkpointing=True)
    with pytest.raises(NotImplementedError, match="score.running_mean is a running statistic"):
        check(trainer, live=SimpleNamespace(buffers={"score.running_mean", "score.running_var"}))
    trainer.args.torch_compile = True
    with pytest.raises(NotImplementedError, match="`torch_compile=True`"):
        check(trainer)
