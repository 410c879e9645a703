# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A client that joins has the server's start bit for bit, or is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fed_trainer.client.joining import invite, join
from helpers.models import logits
from peft_scl import FederaConfig, SclConfig, linalg
from peft_scl.linalg import truncated_svd


TOKENS = torch.arange(1, 9)[None]
CONFIGS = {
    "federa": lambda: FederaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "federa_keep_base": lambda: FederaConfig(r=4, target_modules=["q_proj", "down_proj"], keep_base=True),
    "scl": lambda: SclConfig(r=4),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj"]),
}


def build(folder: Path, config: PeftConfig) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()


def turned(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular vectors of a machine that has found the other signs."""
    left, values, right = truncated_svd(weight, r)
    return -left, values, -right


@torch.no_grad()
def train(model: PeftModel) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_client_takes_over_what_the_server_has(tiny_model_dir: Path, name: str, monkeypatch) -> None:
    server = build(tiny_model_dir, CONFIGS[name]())
    train(server)
    monkeypatch.setattr(linalg, "truncated_svd", turned)
    torch.manual_seed(7)
    client = build(tiny_model_dir, CONFIGS[name]())
    assert not torch.equal(logits(client, TOKENS), logits(server, TOKENS))
    join(client, invite(server), "clinic")
    ours, theirs = invite(client).adapter, invite(server).adapter
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # a residual base has moved from one start to the other: two roundings
    torch.testing.assert_close(logits(client, TOKENS), logits(server, TOKENS), rtol=1e-5, atol=1e-6)
    with client.disable_adapter(), server.disable_adapter():
        torch.testing.assert_close(logits(client, TOKENS), logits(server, TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_client_with_another_base_model_is_refused_and_unchanged(tiny_model_dir: Path, name: str) -> None:
    server = build(tiny_model_dir, CONFIGS[name]())
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    client = get_peft_model(base, CONFIGS[name]()).eval()
    before = {key: tensor.clone() for key, tensor in client.state_dict().items()}
    with pytest.raises(ValueError, match="Client 'clinic' holds another base model than the server"):
        join(client, invite(server), "clinic")
    assert all(torch.equal(before[key], tensor) for key, tensor in client.state_dict().items())


@pytest.mark.parametrize(
    ("server", "client", "difference"),
    [
        (FederaConfig(r=4, lora_alpha=8), FederaConfig(r=4, lora_alpha=64), "`lora_alpha` is 64 instead of 8"),
        (LoraConfig(r=4), LoraConfig(r=4, use_rslora=True), "`use_rslora` is True instead of False"),
        (SclConfig(r=4), SclConfig(r=4, activation="relu"), "`activation` is 'relu' instead of 'linear'"),
        (SclConfig(r=4), SclConfig(r=4, scaling=2.0), "`scaling` is 2.0 instead of 1.0"),
        (FederaConfig(r=4), FederaConfig(r=3), "`r` is 3 instead of 4"),
        (FederaConfig(r=4), LoraConfig(r=8), "`peft_type` is 'LORA' instead of 'FEDERA'"),
    ],
    ids=["lora_alpha", "use_rslora", "activation", "scaling", "r", "peft_type"],
)
def test_a_client_with_another_peft_config_is_refused(
    tiny_model_dir: Path, server: PeftConfig, client: PeftConfig, difference: str
) -> None:
    invitation = invite(build(tiny_model_dir, deepcopy(server)))
    with pytest.raises(ValueError, match=f"The adapter of client 'clinic' has another PEFT config .*{difference}"):
        join(build(tiny_model_dir, deepcopy(client)), invitation, "clinic")


@pytest.mark.parametrize(
    ("server", "client"),
    [
        (FederaConfig(r=4), FederaConfig(r=4, keep_base=True)),
        (LoraConfig(r=4), LoraConfig(r=4, init_lora_weights="gaussian", inference_mode=True)),
    ],
    ids=["keep_base", "init_lora_weights"],
)
def test_a_client_may_start_and_keep_its_adapter_otherwise(
    tiny_model_dir: Path, server: PeftConfig, client: PeftConfig
) -> None:
    theirs = build(tiny_model_dir, deepcopy(server))
    train(theirs)
    ours = build(tiny_model_dir, deepcopy(client))
    join(ours, invite(theirs), "clinic")
    torch.testing.assert_close(logits(ours, TOKENS), logits(theirs, TOKENS), rtol=1e-5, atol=1e-6)
