# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Merging: equal to the unmerged forward and to the dense formula, exactly undone, and refused without side effects.
"""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import (
    BASES,
    Block,
    D,
    M,
    config_id,
    dense_base,
    dense_maps,
    reference_forward,
    scl_layers,
    wrapped_block,
)
from peft_scl import SclConfig


LINEAR = [
    *({"r": 4, "variant": "bottleneck", "train_down_proj": delta} for delta in ("none", "low_rank", "full")),
    {"r": 4, "variant": "compress"},
    {"r": 4, "variant": "compress", "scaling": 0.3},
    {"r": 4, "variant": "bottleneck", "scaling": 0.3},
    {"r": 4, "variant": "compress", "keep_residual": False},
    {"r": 4, "variant": "compress", "keep_residual": False, "scaling": 2.5},
]
NONLINEAR = [
    {"r": 4, "variant": "bottleneck", "activation": "gelu"},
    {"r": 4, "variant": "compress", "activation": "gelu"},
    {"r": 4, "variant": "compress", "keep_residual": False, "activation": "relu"},
]


def _state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _assert_unchanged(model, state):
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert not any(layer.merged_adapters for layer in scl_layers(model))


@pytest.mark.parametrize(
    ("base", "scl_bias"), [*((base, False) for base in BASES), ("linear", True), ("conv1d", True)]
)
@pytest.mark.parametrize("config", LINEAR, ids=config_id)
def test_merging_is_exact_and_undone_bit_for_bit(config, base, scl_bias):
    model = wrapped_block({**config, "scl_bias": scl_bias}, base=base)
    (layer,) = scl_layers(model)
    state = _state(model)
    h = torch.randn(5, M, dtype=torch.float64)
    expected = reference_forward(layer, {"x": config}, h)

    model.merge_adapter()
    assert layer.merged
    assert model.state_dict().keys() == state.keys()  # what unmerging needs is not part of the state
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.get_base_layer()(h), expected, rtol=1e-11, atol=1e-12)
    model.unmerge_adapter()
    _assert_unchanged(model, state)

    x = torch.randn(5, D, dtype=torch.float64)
    expected = model(x)
    merged = model.merge_and_unload()
    assert isinstance(merged, Block)
    assert not scl_layers(merged)
    torch.testing.assert_close(merged(x), expected, rtol=1e-11, atol=1e-12)


def test_merged_weight_is_the_formula():
    configs = [
        {"r": 4, "variant": "bottleneck", "scaling": 0.3},
        {"r": 2, "variant": "bottleneck", "train_down_proj": "full"},
        {"r": 3, "variant": "compress", "scaling": 0.7},
    ]
    (layer,) = scl_layers(wrapped_block(*configs))
    weight, _ = dense_base(layer)
    x, y, z = (dense_maps(layer, name) for name in "xyz")
    layer.merge()
    factor = torch.eye(M, dtype=torch.float64) + 0.3 * x["B"] @ x["A"] + y["B"] @ y["A"]
    changed = weight + x["delta"] + y["delta"] + 0.7 * (z["B"] @ z["A"] - z["B0"] @ z["A0"])
    torch.testing.assert_close(dense_base(layer)[0], changed @ factor)


SEVERAL = list(itertools.combinations_with_replacement(LINEAR[2:4] + LINEAR[6:7], 2))
WITH_BIASES = (
    {"r": 3, "variant": "bottleneck", "scl_bias": True},
    {"r": 5, "variant": "compress", "keep_residual": False, "scl_bias": True},
    {"variant": "compress", "keep_residual": False, "r": 2},
)


@pytest.mark.parametrize(
    ("base", "configs"),
    [*itertools.product(BASES, SEVERAL), ("linear", WITH_BIASES), ("conv1d", WITH_BIASES)],
    ids=config_id,
)
def test_several_adapters_merge_in_any_order(base, configs):
    model = wrapped_block(*configs, base=base)
    (layer,) = scl_layers(model)
    names = layer.active_adapters
    state = _state(model)
    h = torch.randn(3, M, dtype=torch.float64)
    expected = reference_forward(layer, dict(zip(names, configs, strict=True)), h)
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)

    model.merge_adapter()
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)
    at_once = dense_base(layer)
    model.unmerge_adapter()
    _assert_unchanged(model, state)

    for order in (names, names[::-1]):
        layer.merge(adapter_names=order[:1])
        for name in order[1:]:
            with pytest.warns(UserWarning, match="Already following adapters were merged"):
                layer.merge(adapter_names=[name])
        assert layer.merged_adapters == order
        for one, other in zip(dense_base(layer), at_once, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        model.unmerge_adapter()
        _assert_unchanged(model, state)


def test_merging_one_of_two_active_adapters_names_it():
    model = wrapped_block(LINEAR[1], NONLINEAR[0])
    (layer,) = scl_layers(model)
    h = torch.randn(3, M, dtype=torch.float64)
    expected = reference_forward(layer, {"x": LINEAR[1]}, h)
    model.merge_adapter(adapter_names=["x"])
    assert layer.merged_adapters == ["x"]
    torch.testing.assert_close(layer(h), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["x"])
    torch.testing.assert_close(merged.down(h), expected)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "t5", "opt"])
@pytest.mark.parametrize("config", [{"r": 4}, {"r": 4, "variant": "compress", "keep_residual": False}], ids=config_id)
def test_merged_transformers_give_the_same_logits(name, config):
    model = get_peft_model(ARCHITECTURES[name].build(), SclConfig(init_weights=False, **config)).eval()
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6)}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        expected, base = model(**inputs).logits, None
        with model.disable_adapter():
            base = model(**inputs).logits
        assert not torch.allclose(expected, base, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_weight_is_rounded_once():
    (layer,) = scl_layers(
        wrapped_block({"r": 4, "variant": "bottleneck"}, base="linear_no_bias", dtype=torch.bfloat16)
    )
    weight, _ = dense_base(layer)
    maps = dense_maps(layer, "x")
    layer.merge()
    expected = (weight + maps["delta"]) @ (torch.eye(M, dtype=torch.float64) + maps["B"] @ maps["A"])
    assert torch.equal(layer.weight, expected.bfloat16())


def test_unmerging_does_not_depend_on_the_merged_weight():
    model = wrapped_block({"r": 4})
    (layer,) = scl_layers(model)
    weight = layer.weight.clone()
    model.merge_adapter()
    layer.weight.data.fill_(0)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)


def test_unmerging_a_model_that_was_cast_in_between():
    model = wrapped_block({"r": 4})
    (layer,) = scl_layers(model)
    weight = layer.weight.clone()
    model.merge_adapter()
    model.to(torch.float32)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight.float())


@pytest.mark.parametrize("config", [{"r": 4}, {"r": 4, "keep_residual": False}], ids=config_id)
def test_an_adapter_added_to_a_merged_model_starts_from_the_original_weight(config):
    model = wrapped_block({"r": 4, "variant": "bottleneck"}, dtype=torch.float32)
    (layer,) = scl_layers(model)
    weight, _ = dense_base(layer)
    model.merge_adapter()
    model.add_adapter("late", SclConfig(target_modules=["down"], **config))
    model.unmerge_adapter()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    maps = dense_maps(layer, "late")
    torch.testing.assert_close(maps["B"] @ maps["A"], (left[:, :4] * values[:4]) @ right[:4], rtol=1e-4, atol=1e-5)


def test_disabling_unmerges():
    model = wrapped_block({"r": 4})
    x = torch.randn(3, D, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    assert not torch.allclose(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def test_unmerging_twice_warns():
    (layer,) = scl_layers(wrapped_block({"r": 4}))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def _refusal(activation):
    return f"The SCL adapter 'x' has the activation '{activation}': a non-linear map cannot be folded"


@pytest.mark.parametrize("config", NONLINEAR, ids=config_id)
def test_a_non_linear_adapter_is_refused_and_nothing_changes(config):
    model = wrapped_block(config)
    (layer,) = scl_layers(model)
    state = _state(model)
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        for safe_merge in (False, True):
            with pytest.raises(ValueError, match=_refusal(config["activation"])):
                merge(safe_merge=safe_merge)
            _assert_unchanged(model, state)


def test_a_refusal_in_a_later_layer_leaves_the_earlier_ones_alone():
    model = get_peft_model(
        ARCHITECTURES["llama"].build(), SclConfig(r=4, layers_to_transform=0, init_weights=False), adapter_name="w"
    )
    model.add_adapter("x", SclConfig(r=4, layers_to_transform=1, init_weights=False, activation="gelu"))
    model.base_model.set_adapter(["w", "x"])
    state = _state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=_refusal("gelu")):
            merge()
        _assert_unchanged(model, state)
    model.merge_adapter(adapter_names=["w"])
    assert [layer.merged_adapters for layer in scl_layers(model)] == [["w"], []]


def test_biases_need_a_bias_to_be_merged_into():
    for variant in ("bottleneck", "compress"):
        model = wrapped_block({"r": 4, "variant": variant, "scl_bias": True}, base="linear_no_bias")
        (layer,) = scl_layers(model)
        state = _state(model)
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            with pytest.raises(
                ValueError, match=r"has biases \(`scl_bias=True`\), but the down projection .* has none"
            ):
                merge()
            _assert_unchanged(model, state)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_safe_merge_refuses_non_finite_weights(part):
    model = wrapped_block({"r": 4}, {"r": 4, "scl_bias": True})
    (layer,) = scl_layers(model)
    getattr(layer.scl_A["y"], part).data[0] = float("nan")
    state = {key: tensor for key, tensor in _state(model).items() if "scl_" not in key}
    message = "NaNs detected in the merged weights. The adapter y seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged_adapters
    # on top of a good one: that one stays merged, and can be taken out again
    layer.merge(safe_merge=True, adapter_names=["x"])
    with pytest.warns(UserWarning, match="Already"), pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True, adapter_names=["y"])
    assert layer.merged_adapters == ["x"]
    layer.unmerge()
    for key, tensor in state.items():
        assert torch.equal(model.state_dict()[key], tensor)
    # a failure leaves nothing behind that a later merge of changed weights would start from
    with pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True)
    layer.weight.data += 1
    layer.merge(adapter_names=["x"])
    layer.unmerge()
    assert torch.equal(layer.weight, state["base_model.model.down.base_layer.weight"] + 1)


def test_a_wide_ffn_merges_without_a_square_of_its_width():
    torch.manual_seed(0)
    width = 60_000  # its square would take 14 GB
    block = Block(dtype=torch.float32)
    block.up, block.down = nn.Linear(D, width), nn.Linear(width, D)
    model = get_peft_model(block, SclConfig(r=2, target_modules=["down"], init_weights=False))
    x = torch.randn(3, D)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
