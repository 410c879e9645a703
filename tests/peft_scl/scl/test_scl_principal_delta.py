# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The low-rank delta behind a bottleneck that starts at the principal part of the down projection, as FeDeRA does."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.models import TOKENS
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import BASES, Block, D, M, scl_layers
from peft_scl import SclConfig, to_lora


CONFIG = {"r": 3, "variant": "bottleneck", "down_proj_r": 2, "down_proj_start": "principal", "scaling": 0.5}


def _block(base="linear"):
    torch.manual_seed(0)
    return get_peft_model(Block(base), SclConfig(target_modules=["down"], **CONFIG)).eval()


def _moved(model):
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".scl_" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def _weight(layer):
    weight = layer.get_base_layer().weight.detach().double()
    return weight.T if layer.fan_in_fan_out else weight


def _parts(layer, name="default"):
    delta_A, delta_B = layer.scl_delta_A[name], layer.scl_delta_B[name]
    tensors = [
        delta_B.start,
        delta_B.change,
        delta_A.start,
        delta_A.change,
        layer.scl_B[name].weight,
        layer.scl_A[name].weight,
    ]
    return [tensor.detach().double() for tensor in tensors]


def _changed_weight(layer, name="default"):
    """`(W + (B0 + dB) (A0 + dA) - B0 A0) (I + s U C)`."""
    start_B, change_B, start_A, change_A, up, down = _parts(layer, name)
    weight = _weight(layer) + (start_B + change_B) @ (start_A + change_A) - start_B @ start_A
    return weight @ (torch.eye(M, dtype=torch.float64) + 0.5 * up @ down)


@pytest.mark.parametrize("base", BASES)
def test_the_start_is_the_best_approximation_and_the_model_unchanged(base):
    model = _block(base)
    (layer,) = scl_layers(model)
    start_B, change_B, start_A, change_A, *_ = _parts(layer)
    left, values, right = torch.linalg.svd(_weight(layer), full_matrices=False)
    torch.testing.assert_close(start_B @ start_A, (left[:, :2] * values[:2]) @ right[:2])
    assert not change_A.any() and not change_B.any()
    h = torch.randn(4, M, dtype=torch.float64)
    assert torch.equal(layer(h), layer.get_base_layer()(h))


@pytest.mark.parametrize("rows", [1, 7])  # the narrow forward needs more rows than rank
@pytest.mark.parametrize("base", BASES)
def test_forward_merge_and_export_are_the_formula(base, rows):
    model = _moved(_block(base))
    (layer,) = scl_layers(model)
    expected_weight = _changed_weight(layer)
    bias = 0 if layer.bias is None else layer.bias
    h = torch.randn(rows, M, dtype=torch.float64)
    torch.testing.assert_close(layer(h), h @ expected_weight.T + bias)

    export = to_lora(model, dtype=torch.float64)
    assert export.config.r == 3 + 2 * 2
    lora_A, lora_B = (next(t for k, t in export.state_dict.items() if f"lora_{letter}.weight" in k) for letter in "AB")
    torch.testing.assert_close(lora_B @ lora_A, expected_weight - _weight(layer))
    layer.merge()
    torch.testing.assert_close(_weight(layer), expected_weight)
    layer.unmerge()
    torch.testing.assert_close(layer(h), h @ expected_weight.T + bias)


def test_both_factors_have_gradients_at_the_start():
    model = _block()
    model(torch.randn(9, D, dtype=torch.float64)).square().sum().backward()
    (layer,) = scl_layers(model)
    assert layer.scl_delta_A["default"].change.grad.any()
    assert layer.scl_delta_B["default"].change.grad.any()
    assert not layer.scl_delta_A["default"].start.requires_grad


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_loading_and_combining(low_cpu_mem_usage, tmp_path):
    config = {"r": 4, "variant": "bottleneck", "down_proj_start": "principal"}
    model = _moved(get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(**config)).eval())
    expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(
        ARCHITECTURES["llama"].build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(restored(input_ids=TOKENS).logits, expected)
    restored.add_weighted_adapter(["default"], [1.0], "combined")
    restored.set_adapter("combined")
    torch.testing.assert_close(restored(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", [{"variant": "compress"}, {"variant": "bottleneck", "train_down_proj": "full"}])
def test_a_principal_start_of_something_else_is_refused(values):
    with pytest.raises(
        ValueError, match="`down_proj_start='principal'` is the start of the low-rank delta behind a bottleneck"
    ):
        SclConfig(down_proj_start="principal", **values)
