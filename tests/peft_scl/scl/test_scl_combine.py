# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter`: exactly the weighted sum of adapters, or a refusal."""

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.activations import ACT2FN

from helpers.models import TOKENS
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import (
    ACTIVATIONS,
    D,
    M,
    config_id,
    dense_base,
    dense_maps,
    scl_layers,
    wrapped_block,
)
from peft_scl import SclConfig


DELTAS = ("none", "low_rank", "full")


def _weighted(layer, configs, weights, h):
    """
    `(W + sum w delta) (h + sum w s (B act(A h + a) + b)) + bias` in float64; for compressions
    `W h + bias + sum w s (B act(A h + a) + b - B0 act(A0 h))`, or the mean if they replace the projection.
    """
    weight, bias = dense_base(layer)
    branches, delta = 0, torch.zeros_like(weight)
    for (name, config), factor in zip(configs.items(), weights, strict=True):
        maps, act = dense_maps(layer, name), ACTIVATIONS[config.get("activation", "linear")]
        branch = act(h @ maps["A"].T + maps["a"]) @ maps["B"].T + maps["b"]
        if "A0" in maps:
            branch = branch - act(h @ maps["A0"].T) @ maps["B0"].T
        branches = branches + factor * config.get("scaling", 1.0) * branch
        delta = delta + factor * maps.get("delta", 0)
    if config.get("variant") != "bottleneck":
        return branches + bias + (h @ weight.T if config.get("keep_residual", True) else 0)
    return (h + branches) @ (weight + delta).T + bias


BOTTLENECK = {"r": 4, "variant": "bottleneck"}
REPLACING = {"r": 4, "variant": "compress", "keep_residual": False}
PAIRS = [
    *(
        (
            {**BOTTLENECK, "train_down_proj": one},
            {**BOTTLENECK, "r": 2, "scaling": 0.3, "down_proj_r": 3, "train_down_proj": other},
        )
        for one, other in itertools.combinations_with_replacement(DELTAS, 2)
    ),
    (
        {**BOTTLENECK, "activation": "gelu", "scl_bias": True},
        {**BOTTLENECK, "r": 2, "activation": "gelu", "scaling": 2.0},
    ),
    (
        {**BOTTLENECK, "activation": "relu"},
        {**BOTTLENECK, "r": 2, "activation": "relu", "scl_bias": True, "scaling": 0.5},
    ),
    ({"r": 4}, {"r": 2, "scaling": 2.0}),
    ({"r": 4, "activation": "gelu", "scl_bias": True}, {"r": 2, "activation": "gelu", "scaling": 0.5}),
]


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 0.5), (2.0, -0.7)], ids=str)
@pytest.mark.parametrize("configs", PAIRS, ids=config_id)
def test_changes_add_up_exactly(configs, weights):
    model = wrapped_block(*configs)
    (layer,) = scl_layers(model)
    together = model(torch.ones(1, D, dtype=torch.float64))
    model.add_weighted_adapter(["x", "y"], list(weights), "sum")
    assert layer.active_adapters == ["x", "y"]
    assert layer.r["sum"] == 6
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if ".sum." in key)
    model.set_adapter("sum")
    h = torch.randn(5, M, dtype=torch.float64)
    expected = _weighted(layer, dict(zip("xy", configs, strict=True)), weights, h)
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)
    if weights == (1, 1):
        torch.testing.assert_close(model(torch.ones(1, D, dtype=torch.float64)), together)


@pytest.mark.parametrize("weights", [(0.25, 0.75), (1.5, -0.5)], ids=str)
@pytest.mark.parametrize(
    "details", [{}, {"activation": "gelu", "scl_bias": True}, {"scaling": 2.5}], ids=["linear", "gelu", "scaled"]
)
def test_compressions_give_the_mean_of_the_models(details, weights):
    configs = ({**REPLACING, **details}, {**REPLACING, "r": 3, **details})
    model = wrapped_block(*configs)
    (layer,) = scl_layers(model)
    x = torch.randn(5, D, dtype=torch.float64)
    mean = 0
    for name, weight in zip("xy", weights, strict=True):
        model.set_adapter(name)
        mean = mean + weight * model(x)
    model.add_weighted_adapter(["x", "y"], list(weights), "mean")
    model.set_adapter("mean")
    torch.testing.assert_close(model(x), mean, rtol=1e-11, atol=1e-11)
    h = torch.randn(5, M, dtype=torch.float64)
    expected = _weighted(layer, dict(zip("xy", configs, strict=True)), weights, h)
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)


def test_every_activation_acts_on_each_entry_for_itself():
    # what makes concatenation exact; a new activation in transformers could break it
    x = torch.linspace(-3, 3, 12)
    for name in sorted(ACT2FN):
        act = ACT2FN[name]
        if not list(act.parameters()):
            torch.testing.assert_close(act(x), torch.cat([act(x[:5]), act(x[5:])]), msg=name)


@pytest.mark.parametrize("variant", ["bottleneck", "compress"])
def test_adapters_in_different_layers_combine_and_survive_saving(variant, tmp_path):
    torch.manual_seed(0)
    configs = {
        "x": SclConfig(r=4, layers_to_transform=0, init_weights=False, variant=variant),
        "y": SclConfig(r=2, layers_to_transform=[0, 1], init_weights=False, variant=variant, train_down_proj="none"),
    }
    model = get_peft_model(ARCHITECTURES["llama"].build(), configs["x"], adapter_name="x")
    model.add_adapter("y", configs["y"])
    model.base_model.set_adapter(["x", "y"])
    with torch.no_grad():
        together = model.eval()(input_ids=TOKENS).logits
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum")
        model.set_adapter("sum")
        combined = model(input_ids=TOKENS).logits
        torch.testing.assert_close(combined, together)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        restored = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "sum").eval()
        assert torch.equal(restored(input_ids=TOKENS).logits, combined)


def test_a_float32_adapter_of_a_bfloat16_model_keeps_its_precision():
    model = get_peft_model(
        ARCHITECTURES["llama"].build().bfloat16(),
        SclConfig(r=4, variant="bottleneck", init_weights=False),
        adapter_name="x",
    )
    for key, parameter in model.named_parameters():
        if ".scl_" in key:
            parameter.data.normal_()
    model.add_weighted_adapter(["x"], [1.0], "copy")
    for layer in scl_layers(model):
        for entries in (layer.scl_A, layer.scl_B, layer.scl_delta_A, layer.scl_delta_B):
            torch.testing.assert_close(entries["copy"].weight, entries["x"].weight, rtol=0, atol=0)


REFUSED = [
    ((BOTTLENECK, BOTTLENECK), [1, 1], {"combination_type": "linear"}, r"adds the cross terms `B_i A_j`"),
    ((BOTTLENECK, BOTTLENECK), [1, 1], {"combination_type": "svd"}, "can be combined by 'cat' only"),
    ((BOTTLENECK, REPLACING), [1, 1], {}, "The adapters differ in `variant`"),
    ((BOTTLENECK, {**BOTTLENECK, "activation": "gelu"}), [1, 1], {}, "The adapters differ in `activation`"),
    ((REPLACING, {"r": 3}), [1, 1], {}, "The adapters differ in `keep_residual`"),
    (
        (REPLACING, {**REPLACING, "r": 3}),
        [1, 1],
        {},
        "The weights add up to 2, but compressions with `keep_residual=False` replace the",
    ),
    (
        (REPLACING, REPLACING),
        [0.5, 0.5],
        {},
        "The ranks of the adapters add up to 8, but .* allows 7 at most for down",
    ),
    ((BOTTLENECK, BOTTLENECK), [1], {}, r"Expected 2 finite weights, one per adapter, but got \[1\]"),
    ((BOTTLENECK, BOTTLENECK), [1, float("nan")], {}, "Expected 2 finite weights"),
    ((BOTTLENECK, BOTTLENECK), [1, 1], {"adapters": ["x", "z"]}, r"different names out of \['x', 'y'\]"),
    ((BOTTLENECK, BOTTLENECK), [1, 1], {"adapters": ["x", "x"]}, r"different names out of \['x', 'y'\]"),
    ((BOTTLENECK, BOTTLENECK), [1, 1], {"adapter_name": "y"}, "already has an adapter 'y'"),
]


@pytest.mark.parametrize(("configs", "weights", "arguments", "message"), REFUSED)
def test_what_no_single_adapter_computes_is_refused(configs, weights, arguments, message):
    model = wrapped_block(*configs)
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["x", "y"], "weights": weights, "adapter_name": "sum", **arguments})
    assert model.state_dict().keys() == keys
    assert model.peft_config.keys() == {"x", "y"}


def test_whole_modules_and_missing_compressions_cannot_be_combined():
    model = get_peft_model(
        ARCHITECTURES["bert"].build(), SclConfig(r=4, modules_to_save=["classifier"]), adapter_name="x"
    )
    model.add_adapter("y", SclConfig(r=4))
    with pytest.raises(ValueError, match=r"The adapters \['x'\] train whole modules"):
        model.add_weighted_adapter(["x", "y"], [1, 1], "sum")

    config = {**REPLACING, "init_weights": False}
    model = get_peft_model(ARCHITECTURES["bert"].build(), SclConfig(**config), adapter_name="x")
    model.add_adapter("y", SclConfig(layers_to_transform=0, **config))
    with pytest.raises(ValueError, match=r"The adapters \['y'\] do not compress bert.encoder.layer.1"):
        model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mean")
