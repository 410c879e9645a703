# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where training starts: the factors against the dense SVD, the residual and its rounding, and the unchanged model."""

import os
import subprocess
import sys

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
    dense_start,
    factors,
    federa_layers,
    net_output,
    net_weights,
    scaling_of,
)
from helpers.models import logits
from peft_scl import FederaConfig


all_models = pytest.mark.parametrize("name", MODELS)
modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a number between 1 and 2


@modes
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r, alpha", [(1, 8), (3, 3), (5, 1)])
def test_the_factors_are_those_of_the_dense_svd(keep_base, rslora, r, alpha):
    net = Net()
    weights = net_weights(net)
    model = get_peft_model(
        net, FederaConfig(r=r, lora_alpha=alpha, use_rslora=rslora, keep_base=keep_base, target_modules=TARGETS)
    )
    scaling = scaling_of(r, alpha, rslora)
    for name, layer in federa_layers(model).items():
        start_B, start_A = dense_start(weights[name], r, scaling)
        found = factors(layer)
        for key, expected in (("A", start_A), ("A0", start_A), ("B", start_B), ("B0", start_B)):
            torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-9)
        expected = weights[name] if keep_base else weights[name] - scaling * start_B @ start_A
        torch.testing.assert_close(base_weight(layer), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(IDS), net_output(weights, net), rtol=1e-9, atol=1e-9)


@modes
@all_models
def test_the_model_is_unchanged_at_the_start(name, keep_base):
    expected = logits(build(name))
    model = adapted(name, keep_base=keep_base)
    assert len(federa_layers(model)) >= 3
    if keep_base:
        assert torch.equal(logits(model), expected)
    else:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)


@modes
def test_patterns_choose_rank_and_scaling_per_layer(keep_base):
    model = adapted(
        "llama",
        keep_base=keep_base,
        r=4,
        lora_alpha=8,
        rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        alpha_pattern={"layers.0.self_attn.q_proj": 1},
    )
    original = dict(build("llama").named_modules())
    expected = {  # (r, alpha)
        "model.layers.0.self_attn.q_proj": (4, 1),
        "model.layers.1.self_attn.q_proj": (6, 8),
        "model.layers.0.mlp.down_proj": (2, 8),
        "model.layers.1.mlp.down_proj": (2, 8),
    }
    layers = federa_layers(model)
    assert layers.keys() == expected.keys()
    for name, (r, alpha) in expected.items():
        start_B, start_A = dense_start(original[name].weight.detach(), r, alpha / r)
        found = factors(layers[name])
        torch.testing.assert_close(found["A"], start_A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["B"], start_B, rtol=1e-4, atol=1e-5)
        assert layers[name].scaling["default"] == alpha / r
    torch.testing.assert_close(logits(model), logits(build("llama")), rtol=1e-4, atol=1e-6)


def test_only_the_chosen_layers_are_changed():
    model = adapted("llama", layers_to_transform=[1])
    assert all(".layers.1." in name for name in federa_layers(model))
    original = build("llama").state_dict()
    for key, tensor in model.get_base_model().state_dict().items():
        if ".lora_" not in key:
            is_target = ".layers.1." in key and ("q_proj" in key or "down_proj" in key)
            assert torch.equal(tensor, original[key.replace(".base_layer", "")]) != is_target, key


@pytest.mark.parametrize("dtype", HALF_ULP)
def test_writing_the_residual_rounds_each_entry_once(dtype):
    """At most half a unit in the last place of the residual entry, in the dtype of the base."""
    original = build("llama", dtype)
    weights = {
        name: module.weight.detach().double() for name, module in original.named_modules() if hasattr(module, "weight")
    }
    for name, layer in federa_layers(get_peft_model(original, config_for("llama"))).items():
        found = factors(layer)
        exact = weights[name] - 2.0 * found["B0"] @ found["A0"]
        error = (base_weight(layer) - exact).abs()
        # subnormal numbers of float16 are evenly spaced
        exponent = torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(dtype).tiny)))
        assert (error <= HALF_ULP[dtype] * 2.0**exponent).all()
        assert layer.get_base_layer().weight.dtype == dtype
        assert error.any()


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_casting_the_adapter_does_not_move_it_from_its_start(dtype, autocast, keep_base):
    """PEFT keeps the factors in float32 or in the dtype of the base: both represent the same start."""
    model = get_peft_model(
        build("llama", dtype), config_for("llama", keep_base=keep_base), autocast_adapter_dtype=autocast
    ).eval()
    for layer in federa_layers(model).values():
        assert layer.lora_A["default"].weight.dtype == (torch.float32 if autocast else dtype)
        found = factors(layer)
        assert torch.equal(found["A"], found["A0"])
        assert torch.equal(found["B"], found["B0"])
        assert torch.equal(found["A"], found["A"].to(dtype).double())
    expected = logits(build("llama", dtype))
    if keep_base:
        assert torch.equal(logits(model), expected)
    else:
        scale = expected.abs().max().item()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=scale * 8 * HALF_ULP[dtype])


def test_a_weight_of_low_rank_starts_with_zeros_beyond_it():
    net = Net()
    net.lin.weight.data = torch.outer(torch.arange(1.0, 10.0), torch.arange(1.0, 7.0)).double()
    weights = net_weights(net)
    model = get_peft_model(net, FederaConfig(r=4, lora_alpha=4, target_modules=["lin"]))
    layer = federa_layers(model)["lin"]
    found = factors(layer)
    torch.testing.assert_close(found["B"] @ found["A"], weights["lin"], rtol=1e-6, atol=1e-6)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    torch.testing.assert_close(model(IDS), net_output(weights, net), rtol=1e-6, atol=1e-6)


def test_a_second_adapter_of_the_same_rank_takes_over_the_start():
    """Bit for bit, on any machine: TRL copies the trained parameters of one to the other, not the start."""
    model = adapted("llama", keep_base=True)
    for layer in federa_layers(model).values():
        layer.lora_start_A["default"].mul_(-1)  # as good a start, which another machine might have computed
        layer.lora_start_B["default"].mul_(-1)
    model.add_adapter("twin", config_for("llama", keep_base=True))
    model.add_adapter("other", config_for("llama", keep_base=True, r=2))
    for layer in federa_layers(model).values():
        twin, other = factors(layer, "twin"), factors(layer, "other")
        assert torch.equal(twin["A"], factors(layer)["A0"])
        assert torch.equal(twin["B0"], factors(layer)["B0"])
        torch.testing.assert_close(other["A0"], -factors(layer)["A0"][:2] * 2**-0.5, rtol=1e-4, atol=1e-5)


_OTHER_PROCESS = """
import sys
import torch
torch.set_num_threads(2)
from helpers.federa_reference import adapted
torch.save(dict(adapted("llama").state_dict()), sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_with_another_number_of_threads_agrees(tmp_path):
    """To 1e-6 of the largest entry of each tensor: factors, start and residual base. This process has one thread."""
    path = tmp_path / "state"
    command = [sys.executable, "-c", _OTHER_PROCESS, str(path)]
    subprocess.run(
        command, check=True, env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    other, state = torch.load(path), adapted("llama").state_dict()
    assert other.keys() == state.keys()
    for key, tensor in state.items():
        difference = (tensor.double() - other[key].double()).abs().max()
        assert difference <= 1e-6 * tensor.abs().max(), key
