# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two processes on the CPU that share a model give the losses of one process: the start of the adapters is there, whole.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.models import TOKENS
from helpers.paths import TESTS
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import CONFIGS
from peft_scl import SclConfig


KINDS = ["ddp", "fsdp1", "fsdp2"]


def _model(config):
    model = get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(**config))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def _sharded(model, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def _losses(model):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reported():
    """Losses by kind and config of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["world_size"] == 2
    return report


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_of_one(kind, reported):
    for config, losses in zip(CONFIGS, reported[kind], strict=True):
        expected = _losses(_model(config))
        assert expected[0] != expected[-1]
        assert losses == pytest.approx(expected, rel=1e-5), config


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    distributed.device_mesh.init_device_mesh("cpu", (2,))
    trained = {kind: [_losses(_sharded(_model(config), kind)) for config in CONFIGS] for kind in KINDS}
    if distributed.get_rank() == 0:
        print(json.dumps({"world_size": distributed.get_world_size(), **trained}))
    distributed.destroy_process_group()
    time.sleep(1)  # a thread that lets go of tensors while the interpreter ends would abort the process
