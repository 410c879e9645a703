# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Base models that are not in memory: on the meta device, or offloaded by accelerate."""

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.models import TOKENS, logits
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import CONFIGS, Block, config_id, scl_layers
from peft_scl import SclConfig


def _adapted(base, **config):
    torch.manual_seed(1)
    return get_peft_model(base, SclConfig(**config)).eval()


@torch.no_grad()
def _randomise(model):
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if ".scl_" in key:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _offloaded():
    return accelerate.cpu_offload(ARCHITECTURES["llama"].build(), execution_device="cpu")


def _adapter_parameters(model):
    return {key: parameter for key, parameter in model.named_parameters() if ".scl_" in key}


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_an_adapter_on_an_offloaded_base_is_in_memory_and_can_be_trained(config):
    expected = _adapted(ARCHITECTURES["llama"].build(), **config)
    model = _adapted(_offloaded(), **config)
    assert all(layer.get_base_layer().weight.is_meta for layer in scl_layers(model))
    for key, parameter in _adapter_parameters(model).items():
        assert torch.equal(parameter, expected.get_parameter(key)), (
            key
        )  # for `compress`, read from the offloaded weight
    assert torch.equal(logits(model), logits(expected))

    for each in (_randomise(model), _randomise(expected)):
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for key, parameter in _adapter_parameters(model).items():
        assert parameter.grad.any(), key
        torch.testing.assert_close(parameter.grad, expected.get_parameter(key).grad)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_an_adapter_loads_onto_an_offloaded_base(config, tmp_path):
    expected = _randomise(_adapted(ARCHITECTURES["llama"].build(), **config))
    expected.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(_offloaded(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert not any(parameter.is_meta for parameter in _adapter_parameters(model).values())
        # one operation at hand, several through the hooks of the offloaded layer: the rounding differs
        torch.testing.assert_close(logits(model), logits(expected))


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_an_adapted_model_can_be_offloaded(config):
    model = _randomise(_adapted(ARCHITECTURES["llama"].build(), **config))
    expected = logits(model)
    accelerate.cpu_offload(model.get_base_model(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)


def test_merging_into_an_offloaded_base_is_undone_bit_for_bit():
    model = _randomise(_adapted(_offloaded(), r=4))
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_a_device_map_over_several_devices_keeps_the_outputs(tmp_path):
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "base")
    base = ARCHITECTURES["llama"].build()
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    expected = _randomise(_adapted(ARCHITECTURES["llama"].build(), r=4))
    base = accelerate.dispatch_model(base, device_map, main_device="cpu", offload_dir=tmp_path / "disk")
    model = _randomise(_adapted(base, r=4))
    assert not any(parameter.is_meta for parameter in _adapter_parameters(model).values())
    torch.testing.assert_close(logits(model), logits(expected))


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "empty", [lambda: torch.device("meta"), accelerate.init_empty_weights], ids=["device", "accelerate"]
)
def test_an_empty_shell_is_filled_from_a_state_dict(empty, inside, config):
    config = {"target_modules": ["down"], **config}
    expected = _randomise(_adapted(Block(), **config))
    with empty():
        base = Block()
        model = _adapted(base, **config) if inside else base
    model = model if inside else _adapted(base, **config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(expected.state_dict(), assign=True)
    x = torch.randn(3, base.up.in_features, dtype=torch.float64)
    assert torch.equal(model(x), expected(x))
