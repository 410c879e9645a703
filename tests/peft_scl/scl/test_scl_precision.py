# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: autocast, half-precision base models, and the dtype of the adapter."""

import pytest
import torch
from peft import get_peft_model

from helpers.models import TOKENS
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import CONFIGS, Block, D, M, config_id, scl_layers
from peft_scl import SclConfig


HALF = [torch.bfloat16, torch.float16]


def _adapted(base, **config):
    torch.manual_seed(1)
    return get_peft_model(base, SclConfig(init_weights=False, **config))


def _gradients(model):
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.any() for gradient in gradients.values())
    return gradients


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_autocast_keeps_float32_weights_and_comes_close_to_float32(config, dtype):
    model = _adapted(ARCHITECTURES["llama"].build(), **config).train()
    expected = model(input_ids=TOKENS, labels=TOKENS)
    expected.loss.backward()
    exact = _gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = model(input_ids=TOKENS, labels=TOKENS)
        assert output.logits.dtype == dtype
        layer = scl_layers(model)[0]
        assert layer(torch.randn(3, layer.in_features, dtype=dtype)).dtype == dtype
    output.loss.backward()
    rounding = torch.finfo(dtype).eps
    error = (output.logits - expected.logits).abs().max() / expected.logits.abs().max()
    assert 0 < error < 4 * rounding
    for key, gradient in _gradients(model).items():
        assert gradient.dtype == model.get_parameter(key).dtype == torch.float32
        assert (gradient - exact[key]).norm() < 16 * rounding * exact[key].norm(), key


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_half_precision_base_under_float32_adapters(config, dtype, autocast):
    model = _adapted(ARCHITECTURES["llama"].build().to(dtype), **config).train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output = model(input_ids=TOKENS, labels=TOKENS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert {gradient.dtype for gradient in _gradients(model).values()} == {torch.float32}
    exact = _adapted(ARCHITECTURES["llama"].build(), **config)
    exact.load_state_dict(model.state_dict())
    expected = exact(input_ids=TOKENS).logits
    error = (output.logits - expected).abs().max() / expected.abs().max()
    assert 0 < error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_adapters_follow_the_dtype_of_the_base_if_they_are_not_cast(config, dtype):
    model = ARCHITECTURES["llama"].build().to(dtype)
    model = get_peft_model(model, SclConfig(init_weights=False, **config), autocast_adapter_dtype=False).train()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(input_ids=TOKENS, labels=TOKENS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert {gradient.dtype for gradient in _gradients(model).values()} == {dtype}


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[4]], ids=config_id)
def test_merging_float32_adapters_into_a_half_precision_base_rounds_once(config):
    model = _adapted(Block(dtype=torch.bfloat16), target_modules=["down"], **config)
    (layer,) = scl_layers(model)
    exact = _adapted(Block(dtype=torch.float64), target_modules=["down"], **config)
    exact.load_state_dict(model.state_dict())
    model.merge_adapter()
    exact.merge_adapter()
    torch.testing.assert_close(
        layer.weight, scl_layers(exact)[0].weight.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6
    )
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (D, M)
