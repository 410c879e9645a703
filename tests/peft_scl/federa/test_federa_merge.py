# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging, unmerging, deleting and unloading: which weights the base model holds afterwards, and how exactly."""

import copy

import pytest
import torch
from peft import get_peft_model

from helpers.federa_reference import (
    IDS,
    MODELS,
    TARGETS,
    Net,
    adapted,
    base_weight,
    both_modes,
    build,
    config_for,
    factors,
    federa_layers,
    net_output,
    net_weights,
)
from helpers.models import logits, move
from peft_scl import FederaConfig


modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)
all_models = pytest.mark.parametrize("name", MODELS)


def _weights(model):
    return {name: layer.get_base_layer().weight.clone() for name, layer in federa_layers(model).items()}


@modes
def test_the_merged_weight_is_that_of_the_formula(keep_base):
    net = Net()
    weights = net_weights(net)
    model = move(
        get_peft_model(net, FederaConfig(r=3, lora_alpha=6, target_modules=TARGETS, keep_base=keep_base)), size=0.3
    )
    changes = {}
    for name, layer in federa_layers(model).items():
        found = factors(layer)
        changes[name] = 2 * (found["B"] @ found["A"] - found["B0"] @ found["A0"])
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        torch.testing.assert_close(delta if name == "lin" else delta.T, changes[name], rtol=1e-9, atol=1e-9)
    separate = model(IDS)
    model.merge_adapter()
    for name, layer in federa_layers(model).items():
        torch.testing.assert_close(base_weight(layer), weights[name] + changes[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(IDS), separate, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    changed = {name: weights[name] + changes[name] for name in weights}
    torch.testing.assert_close(model.merge_and_unload()(IDS), net_output(changed, net), rtol=1e-9, atol=1e-9)


@modes
@all_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(name, keep_base, dtype):
    model = move(adapted(name, dtype, keep_base=keep_base))
    before, separate = _weights(model), logits(model)
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        merged = _weights(model)
        assert not any(torch.equal(merged[key], before[key]) for key in before)
        scale = separate.abs().max().item()
        torch.testing.assert_close(
            logits(model), separate, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 0.05)
        )
        model.unmerge_adapter()
        after = _weights(model)
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), separate)


@modes
def test_disabling_a_merged_adapter_gives_the_original_model(keep_base):
    model = move(adapted("llama", keep_base=keep_base))
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(build("llama")), rtol=1e-4, atol=1e-6)


@modes
@all_models
def test_unloading_gives_the_original_model(name, keep_base):
    original = build(name).state_dict()
    model = move(adapted(name, keep_base=keep_base))
    plain = model.unload()
    assert not federa_layers(plain)
    for key, tensor in plain.state_dict().items():
        key = key.replace(".modules_to_save.default", "")
        if "classifier" in key or "original_module" in key:  # of `modules_to_save`, which unloading keeps
            continue
        if keep_base:
            assert torch.equal(tensor, original[key]), key
        else:
            torch.testing.assert_close(tensor, original[key], rtol=0, atol=2e-7)


@modes
def test_deleting_an_adapter_gives_the_original_model(keep_base):
    model = move(adapted("llama", keep_base=keep_base))
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model.base_model.model), logits(build("llama")), rtol=1e-4, atol=1e-6)
    assert not any(".lora_" in key for key in model.state_dict())
    for name, layer in federa_layers(model).items():
        original = build("llama").get_submodule(name).weight
        if keep_base:
            assert torch.equal(layer.get_base_layer().weight, original)
        else:
            torch.testing.assert_close(layer.get_base_layer().weight, original, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_putting_the_start_back_is_off_by_the_two_roundings(dtype, bound):
    """Half a unit in the last place of the residual, and half a unit of the weight."""
    original = build("llama", dtype)
    weights = {
        name: module.weight.detach().double() for name, module in original.named_modules() if hasattr(module, "weight")
    }
    model = get_peft_model(build("llama", dtype), config_for("llama"))
    residuals = {name: base_weight(layer) for name, layer in federa_layers(model).items()}
    plain = dict(model.unload().named_modules())
    for name, residual in residuals.items():
        difference = (plain[name].weight.double() - weights[name]).abs()
        tiny = torch.finfo(dtype).tiny
        spacing = [bound * 2.0 ** torch.floor(torch.log2(w.abs().clamp_min(tiny))) for w in (residual, weights[name])]
        assert (difference <= spacing[0] + 2 * spacing[1]).all()  # the result may lie in the next binade
        assert (difference == 0).double().mean() > 0.5


@modes
def test_safe_merging_refuses_values_that_are_not_finite(keep_base):
    model = adapted("llama", keep_base=keep_base)
    before = _weights(model)
    layer = federa_layers(model)["model.layers.1.mlp.down_proj"]
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.get_base_layer().weight, before["model.layers.1.mlp.down_proj"])


def test_merging_one_after_the_other_is_merging_both():
    model = adapted("llama", keep_base=True)
    model.add_adapter("x", config_for("llama", keep_base=True, r=2))
    model.base_model.set_adapter(["default", "x"])
    move(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    twin.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        twin.merge_adapter(["x"])
    model.merge_adapter()
    for name, layer in federa_layers(model).items():
        other = federa_layers(twin)[name]
        assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)


def test_a_merged_adapter_cannot_be_deleted():
    model = adapted("llama")
    layer = federa_layers(model)["model.layers.0.mlp.down_proj"]
    layer.merge()
    with pytest.raises(
        ValueError, match="is merged and can be neither deleted nor made anew. Call `unmerge_adapter` first"
    ):
        layer.delete_adapter("default")
