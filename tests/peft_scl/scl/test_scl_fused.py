# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The base layer and its change in one operation: its derivatives, when it applies, and what it does not compute."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.scl_reference import M, config_id, reference_forward, scl_layers, wrapped_block
from peft_scl.scl import linear
from peft_scl.scl.fused import changed_linear


FUSED = {"r": 4, "variant": "compress", "scaling": 0.5}
NOT_FUSED = [
    {**FUSED, "activation": "relu"},
    {**FUSED, "scl_bias": True},
    {**FUSED, "scl_dropout": 0.5},
    {**FUSED, "keep_residual": False},
    {"r": 4, "variant": "bottleneck"},
]


@pytest.fixture
def calls(monkeypatch):
    """The inputs of all calls of the fused operation."""
    inputs = []

    def record(x, *tensors):
        inputs.append(x)
        return changed_linear(x, *tensors)

    monkeypatch.setattr(linear, "changed_linear", record)
    return inputs


def _layer(config=FUSED, **options):
    (layer,) = scl_layers(wrapped_block(config, **options))
    return layer.train()


def _input(*shape, dtype=torch.float64):
    return torch.randn(*shape, M, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("base", ["linear", "linear_no_bias"])
def test_first_and_second_derivatives_are_those_of_the_formula(base, calls):
    layer = _layer(base=base)
    trained = layer.scl_A["x"].weight, layer.scl_B["x"].weight
    names = "scl_A.x.weight", "scl_B.x.weight"

    def function(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    inputs = (_input(2, 3), *trained)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert calls


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (2, 2, 3), (0,)])
def test_every_shape_of_the_input_gives_the_formula(shape, calls):
    layer = _layer()
    x = _input(*shape)
    torch.testing.assert_close(layer(x), reference_forward(layer, {"x": FUSED}, x), rtol=1e-11, atol=1e-12)
    assert len(calls) == 1


def test_a_vector_without_a_batch_goes_another_way(calls):
    layer, x = _layer(), _input()
    torch.testing.assert_close(layer(x), reference_forward(layer, {"x": FUSED}, x[None])[0], rtol=1e-11, atol=1e-12)
    assert not calls


@pytest.mark.parametrize("config", NOT_FUSED, ids=config_id)
def test_what_is_not_one_linear_change_is_not_fused(config, calls):
    _layer(config)(_input(3))
    assert not calls


def test_dropout_is_fused_in_evaluation(calls):
    _layer({**FUSED, "scl_dropout": 0.5}).eval()(_input(3))
    assert calls


def test_two_active_adapters_are_not_fused(calls):
    (layer,) = scl_layers(wrapped_block(FUSED, FUSED))
    layer(_input(3))
    assert not calls


def test_hooks_of_the_base_layer_are_called(calls):
    seen = []
    hooks = [
        lambda layer: layer.register_forward_hook(lambda *_: seen.append(1)),
        lambda layer: layer.register_forward_pre_hook(lambda *_: seen.append(1)),
        lambda layer: layer.register_full_backward_hook(lambda *_: seen.append(1)),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: seen.append(1)),
        lambda _: nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)),
    ]
    layer = _layer()
    for register in hooks:
        handle = register(layer.base_layer)
        layer(_input(3)).sum().backward()
        handle.remove()
        assert seen, register
        seen.clear()
    assert not calls


@pytest.mark.parametrize("config", [FUSED, *NOT_FUSED], ids=config_id)
@pytest.mark.parametrize("entries", ["scl_A", "scl_B"])
def test_hooks_of_the_maps_are_called(config, entries, calls):
    layer, seen = _layer(config), []
    getattr(layer, entries)["x"].register_forward_hook(lambda *_: seen.append(1))
    layer(_input(64)).sum().backward()
    assert seen
    assert not calls


def test_a_base_layer_with_a_forward_of_its_own_is_called(calls):
    layer = _layer()
    layer.base_layer.forward = lambda x: torch.full((*x.shape[:-1], layer.out_features), 7.0, dtype=x.dtype)
    with torch.no_grad():
        layer.scl_A["x"].weight.zero_(), layer.scl_B["x"].weight.zero_()
        assert (layer(_input(3)) == 7).all()
    assert not calls


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_base_layer_that_is_trained_gets_its_gradient(parameter, calls):
    layer = _layer()
    trained = getattr(layer.base_layer, parameter).requires_grad_()
    layer(_input(3)).sum().backward()
    assert trained.grad.any()
    assert not calls


def test_a_subclass_of_linear_is_called(calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = _layer(), _input(3)
    with torch.no_grad():
        layer.scl_A["x"].weight.zero_(), layer.scl_B["x"].weight.zero_()
        single = layer(x)
        calls.clear()
        layer.base_layer.__class__ = Doubled
        assert torch.equal(layer(x), 2 * single)
    assert not calls


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_under_autocast_the_dtype_of_autocast_comes_out(dtype, fused, calls):
    layer = _layer(dtype=dtype)
    layer.scl_A.float(), layer.scl_B.float()
    x = _input(3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.scl_A["x"].weight.grad.dtype == torch.float32
    assert bool(calls) is fused


def test_adapters_in_another_dtype_than_the_model_get_gradients_in_their_own(calls):
    layer = _layer(dtype=torch.bfloat16)
    layer.scl_A.float(), layer.scl_B.float()
    layer(_input(3, dtype=torch.bfloat16)).float().sum().backward()
    assert layer.scl_A["x"].weight.grad.dtype == layer.scl_B["x"].weight.grad.dtype == torch.float32
    assert calls


def test_transformations_of_functions_work():
    layer, x = _layer(), _input(4).detach()
    expected = layer(x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, layer(x + 1) - expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(forward_ad.unpack_dual(layer(dual)).tangent, tangent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_change_it_is_the_base_layer_bit_for_bit(dtype, calls):
    layer, x = _layer(dtype=dtype), _input(64, dtype=dtype)
    with torch.no_grad():
        layer.scl_A["x"].weight.zero_(), layer.scl_B["x"].weight.zero_()
        assert torch.equal(layer(x), layer.base_layer(x))
    assert calls


class WideResults(TorchDispatchMode):
    """How many tensors of at least `numel` elements operations make."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_place = func._schema.is_mutable
        if isinstance(result, torch.Tensor) and not func.is_view and not in_place and result.numel() >= self.numel:
            self.count += 1
        return result


def test_the_backward_makes_one_tensor_as_wide_as_the_ffn():
    # the gradient of the input, once: not one of the base layer, one of the adapter and their sum
    layer, x = _layer(), _input(64)
    loss = layer(x).sum()
    with WideResults(x.numel()) as wide:
        loss.backward()
    assert wide.count == 1


def test_a_copy_trains_on_its_own(calls):
    layer = _layer()
    other, x = copy.deepcopy(layer), _input(3)
    other(x).sum().backward()
    assert layer.scl_A["x"].weight.grad is None
    assert other.scl_A["x"].weight.grad.any()
    assert calls
