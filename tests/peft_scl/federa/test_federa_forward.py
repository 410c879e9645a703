# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers compute after training, in either mode, against dense weights in float64."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

from helpers.federa_reference import (
    IDS,
    MODELS,
    TARGETS,
    Net,
    adapted,
    both_modes,
    build,
    config_for,
    factors,
    federa_layers,
    net_output,
    net_weights,
)
from helpers.models import TOKENS, logits, move
from peft_scl import FederaConfig


modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)
all_models = pytest.mark.parametrize("name", MODELS)


def _net(keep_base, **values):
    """A trained model, the weights of the original, and by layer what training has changed."""
    net = Net()
    weights = net_weights(net)
    values = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "keep_base": keep_base, **values}
    return move(get_peft_model(net, FederaConfig(**values)), size=0.3), net, weights


def _changed(model, weights, names=("default",), factor=1.0):
    changed = {key: weight.clone() for key, weight in weights.items()}
    for key, layer in federa_layers(model).items():
        for name in names:
            found = factors(layer, name)
            scaling = layer.lora_alpha[name] / layer.r[name]
            changed[key] += factor * scaling * (found["B"] @ found["A"] - found["B0"] @ found["A0"])
    return changed


def _close(output, expected):
    torch.testing.assert_close(output.detach(), expected.detach(), rtol=1e-9, atol=1e-9)


@modes
def test_the_forward_is_that_of_the_changed_weights(keep_base):
    model, net, weights = _net(keep_base)
    expected = net_output(_changed(model, weights), net)
    assert not torch.allclose(expected, net_output(weights, net), rtol=0.1)
    _close(model(IDS), expected)
    with model.disable_adapter():
        _close(model(IDS), net_output(weights, net))
    _close(model(IDS), expected)


@modes
def test_a_scale_multiplies_the_change(keep_base):
    model, net, weights = _net(keep_base)
    with rescale_adapter_scale(model, 0.25):
        _close(model(IDS), net_output(_changed(model, weights, factor=0.25), net))
    for layer in federa_layers(model).values():
        layer.set_scale("default", 0)
    _close(model(IDS), net_output(weights, net))


@modes
def test_an_adapter_that_is_not_active_changes_nothing(keep_base):
    model, net, weights = _net(keep_base)
    model.base_model.set_adapter([])
    _close(model(IDS), net_output(weights, net))


def test_several_adapters_add_up():
    model, net, weights = _net(True)
    model.add_adapter("x", FederaConfig(r=2, lora_alpha=1, target_modules=["lin", "embed"], keep_base=True))
    model.base_model.set_adapter(["default", "x"])
    move(model, seed=5, size=0.3)
    changed = _changed(model, weights)
    for key, layer in federa_layers(model).items():
        if key != "conv":
            found = factors(layer, "x")
            changed[key] = changed[key] + 0.5 * (found["B"] @ found["A"] - found["B0"] @ found["A0"])
    _close(model(IDS), net_output(changed, net))
    model.set_adapter("default")
    _close(model(IDS), net_output(_changed(model, weights), net))


@modes
def test_a_batch_may_mix_adapter_and_base(keep_base):
    model, net, weights = _net(keep_base)
    output = model.eval()(IDS, adapter_names=["default", "__base__"])
    _close(output[0], net_output(_changed(model, weights), net)[0])
    _close(output[1], net_output(weights, net)[1])


@modes
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parameters_may_be_cast_without_the_buffers_as_deepspeed_does(keep_base, dropout):
    model, _, _ = _net(keep_base, lora_dropout=dropout)
    whole = copy.deepcopy(model).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for cast in (model, whole):
        cast.train()
    for is_active in (True, False):
        outputs = []
        for cast in (model, whole):
            torch.manual_seed(9)
            with contextlib.nullcontext() if is_active else cast.disable_adapter():
                outputs.append(cast(IDS))
        assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)


def test_dropout_acts_on_the_input_of_the_trained_factors_alone():
    outputs = []
    for keep_base in both_modes.values():
        model, _, weights = _net(keep_base, lora_dropout=0.5, target_modules=["lin"])
        layer = federa_layers(model)["lin"].train()
        x = torch.ones(4, 6, dtype=torch.float64)
        torch.manual_seed(9)
        output = layer(x)
        torch.manual_seed(9)
        dropped = nn.functional.dropout(x, 0.5)
        assert (dropped == 0).any()
        found, bias = factors(layer), layer.get_base_layer().bias
        rest = weights["lin"] - 2 * found["B0"] @ found["A0"]
        _close(output, x @ rest.T + bias + 2 * dropped @ (found["B"] @ found["A"]).T)
        layer.eval()
        _close(layer(x), x @ _changed(model, weights)["lin"].T + bias)
        outputs.append(output)
    _close(outputs[0], outputs[1])


@modes
@all_models
def test_gradients_are_those_of_the_dense_weights(name, keep_base):
    """The chain rule by hand: with `G` the gradient of the changed weight, `dA = s B^T G` and `dB = s G A^T`."""
    model = move(adapted(name, keep_base=keep_base, modules_to_save=None if name != "bert" else ["classifier"]))
    logits_ = model(input_ids=TOKENS).logits
    logits_.square().sum().backward()

    merged = copy.deepcopy(model).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged(input_ids=TOKENS).logits.square().sum().backward()
    modules = dict(merged.named_modules())
    for key, layer in federa_layers(model).items():
        gradient = modules[key].weight.grad.double()
        gradient = gradient if isinstance(modules[key], nn.Linear) else gradient.T
        trained_A, trained_B = layer.trained_factors("default")
        found = factors(layer)
        for parameter, expected in (
            (trained_A, 2 * found["B"].T @ gradient),
            (trained_B, 2 * gradient @ found["A"].T),
        ):
            scale = expected.abs().max().item()
            torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-3, atol=1e-4 * scale)


@modes
def test_only_the_factors_are_trained(keep_base):
    model = adapted("llama", keep_base=keep_base).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) != (".lora_A." in key or ".lora_B." in key), key


@modes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(keep_base, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = move(adapted("llama", keep_base=keep_base)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@modes
def test_compiles_into_one_graph(keep_base):
    model, _, _ = _net(keep_base)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(IDS)
    _close(output, model(IDS))
    output.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    model(IDS).sum().backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


@modes
@all_models
def test_copies_compute_the_same(name, keep_base):
    model = move(adapted(name, keep_base=keep_base))
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        with twin.disable_adapter(), model.disable_adapter():
            assert torch.equal(logits(twin), logits(model))


@modes
def test_autocast_of_a_float32_model_does_not_lose_small_changes(keep_base):
    """In bfloat16, `s B A x - s B0 A0 x` would be the difference of two large rounded numbers."""
    model = move(adapted("llama", keep_base=keep_base), size=1e-4)
    layer = federa_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ layer.get_delta_weight("default").double().T
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        change = layer._contribution("default", x, True)
    if keep_base:
        assert (change.double() - exact).norm() < 0.02 * exact.norm()
    else:  # here it holds the principal part too, as a LoRA does that has been trained for long
        assert change.norm() > 100 * exact.norm()


def test_the_base_of_the_model_is_the_original_or_the_residual():
    original = build("llama").state_dict()
    for keep_base in both_modes.values():
        for key, layer in federa_layers(adapted("llama", keep_base=keep_base)).items():
            assert torch.equal(layer.get_base_layer().weight, original[f"{key}.weight"]) == keep_base


def test_the_config_of_the_user_is_not_changed_by_another_model():
    config = config_for("llama")
    first = get_peft_model(build("llama"), config)
    second = get_peft_model(build("llama"), config)
    assert torch.equal(logits(first.eval()), logits(second.eval()))
