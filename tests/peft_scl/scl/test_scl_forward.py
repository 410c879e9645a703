# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The forward pass of every variant against its formula, its start, and what it must not compute."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import (
    ACTIVATIONS,
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


BOTTLENECKS = [{"r": 4, "variant": "bottleneck", "train_down_proj": delta} for delta in ("none", "low_rank", "full")]
REPLACING = {"r": 4, "variant": "compress", "keep_residual": False}
RESIDUAL = {"r": 4, "variant": "compress"}
VARIANTS = [*BOTTLENECKS, REPLACING, RESIDUAL]
SETTINGS = [
    {**variant, **details}
    for variant in VARIANTS
    for details in (
        {},
        {"activation": "gelu"},
        {"scl_bias": True},
        {"activation": "relu", "scl_bias": True, "scaling": 0.3},
        {"scaling": 2.5},
    )
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config", SETTINGS, ids=config_id)
def test_forward_is_the_formula(config, base):
    model = wrapped_block(config, base=base)
    (layer,) = scl_layers(model)
    # fewer and more rows than the codes of the bottleneck are wide: the forward differs, the result does not
    for shape in ((3, M), (2, 5, M)):
        h = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(h), reference_forward(layer, {"x": config}, h), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "configs",
    [
        *itertools.combinations_with_replacement(VARIANTS, 2),
        (
            {"r": 3, "variant": "bottleneck", "activation": "gelu", "scl_bias": True},
            {"r": 5, "variant": "compress", "keep_residual": False, "activation": "relu"},
        ),
        (BOTTLENECKS[2], REPLACING, {"r": 2, "variant": "compress", "keep_residual": False, "scl_bias": True}),
        (BOTTLENECKS[1], RESIDUAL, {"r": 2, "variant": "compress", "activation": "gelu", "scl_bias": True}),
    ],
    ids=config_id,
)
def test_several_active_adapters_add_up(configs, base):
    model = wrapped_block(*configs, base=base)
    (layer,) = scl_layers(model)
    for shape in ((3, M), (4, 9, M)):
        h = torch.randn(shape, dtype=torch.float64)
        expected = reference_forward(layer, dict(zip("xyz", configs, strict=False)), h)
        torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)
        # the order in which they were activated does not matter
        model.base_model.set_adapter(layer.active_adapters[::-1])
        torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-11)


def test_low_rank_delta_has_its_own_rank():
    (layer,) = scl_layers(wrapped_block({"r": 4, "variant": "bottleneck", "down_proj_r": 2}))
    assert layer.scl_delta_A["x"].weight.shape == (2, M)
    assert layer.scl_delta_B["x"].weight.shape == (D, 2)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "config",
    [*VARIANTS, *({**variant, "activation": "gelu", "scl_bias": True} for variant in VARIANTS)],
    ids=config_id,
)
def test_gradients_do_not_depend_on_how_wide_the_input_is(config, base):
    model = wrapped_block(config, base=base)
    (layer,) = scl_layers(model)
    h = torch.randn(40, M, dtype=torch.float64, requires_grad=True)
    inputs = [h, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    together = torch.autograd.grad(layer(h).square().sum(), inputs)
    one_by_one = torch.autograd.grad(sum(layer(row[None]).square().sum() for row in h), inputs)
    for left, right in zip(together, one_by_one, strict=True):
        assert left.any()
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


class WidestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that operations make."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SETTINGS, ids=config_id)
def test_the_forward_makes_no_tensor_as_wide_as_the_ffn(config, dtype):
    # neither the sum `h + B A h` nor a copy of `h` in the dtype of the adapter
    (layer,) = scl_layers(wrapped_block(config, dtype=dtype).train())
    layer.scl_A.float(), layer.scl_B.float()
    h = torch.randn(64, M, dtype=dtype)
    with WidestResult() as widest:
        output = layer(h)
    assert output.dtype == dtype
    assert widest.numel < h.numel()


@pytest.mark.parametrize("config", [BOTTLENECKS[0], BOTTLENECKS[1], REPLACING, RESIDUAL], ids=config_id)
def test_dropout_acts_on_the_input_of_the_first_map_and_in_training_only(config):
    config = {**config, "scl_dropout": 0.5}
    (layer,) = scl_layers(wrapped_block(config))
    h = torch.randn(64, M, dtype=torch.float64)
    torch.testing.assert_close(layer(h), reference_forward(layer, {"x": config}, h))

    layer.train()
    torch.manual_seed(1)
    output = layer(h)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(h, 0.5)
    weight, bias = dense_base(layer)
    maps = dense_maps(layer, "x")
    branch = dropped @ maps["A"].T @ maps["B"].T
    if config["variant"] == "bottleneck":  # the delta sees `h` itself
        expected = (h + branch) @ (weight + maps.get("delta", 0)).T
    elif config.get("keep_residual", True):
        expected = h @ weight.T + branch - dropped @ maps["A0"].T @ maps["B0"].T
    else:
        expected = branch
    torch.testing.assert_close(output, expected + bias)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config", [*BOTTLENECKS, RESIDUAL], ids=config_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_model_to_the_last_bit(config, base, dtype):
    torch.manual_seed(0)
    model = Block(base, dtype)
    x = torch.randn(5, D, dtype=dtype)
    expected = model(x)
    for activation in ("linear", "gelu"):
        wrapped = get_peft_model(
            model, SclConfig(target_modules=["down"], activation=activation, scl_bias=True, **config)
        )
        assert torch.equal(wrapped(x), expected)
        model = wrapped.unload()


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_a_small_change_is_not_lost_in_the_rounding_of_a_bfloat16_model(activation):
    # in bfloat16, 1 + 2^-12 is 1: a change that was added to the start before rounding would vanish
    torch.manual_seed(0)
    config = SclConfig(r=4, activation=activation, target_modules=["down"])
    model = get_peft_model(Block(dtype=torch.bfloat16), config)
    (layer,) = scl_layers(model)
    with torch.no_grad():
        for entries, starts in ((layer.scl_A, layer.scl_start_A), (layer.scl_B, layer.scl_start_B)):
            entries["default"].weight.copy_(2**-12 * starts["default"])
    h = torch.randn(20, M, dtype=torch.bfloat16)
    maps = dense_maps(layer, "default")
    act = ACTIVATIONS[activation]
    expected = act(h.double() @ maps["A"].T) @ maps["B"].T - act(h.double() @ maps["A0"].T) @ maps["B0"].T
    change = layer._change("default", h).double()
    assert (change - expected).norm() < 0.02 * expected.norm()


def test_casting_a_trained_adapter_rounds_its_change_only():
    model = wrapped_block(RESIDUAL, base="linear_no_bias", dtype=torch.float32)
    (layer,) = scl_layers(model)
    with torch.no_grad():
        layer.scl_A["x"].weight.mul_(1e-4)
        layer.scl_B["x"].weight.mul_(1e-4)
    change = layer.get_delta_weight("x")
    model.to(torch.bfloat16)
    assert (layer.get_delta_weight("x") - change).norm() < 0.01 * change.norm()


def test_weight_decay_leads_back_to_the_base_model():
    model = wrapped_block(RESIDUAL, dtype=torch.float32)
    (layer,) = scl_layers(model)
    change = layer.get_delta_weight("x").norm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.5)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert layer.get_delta_weight("x").norm() < 0.01 * change


@pytest.mark.parametrize("config", [RESIDUAL, {**REPLACING, "r": 6}], ids=config_id)
@pytest.mark.parametrize("rank", [0, 2])
def test_directions_that_a_weight_does_not_have_can_be_trained(config, rank):
    torch.manual_seed(0)
    block = Block(dtype=torch.float32)
    with torch.no_grad():
        block.down.weight.copy_(torch.randn(D, rank) @ torch.randn(rank, M))
    model = get_peft_model(block, SclConfig(target_modules=["down"], **config))
    (layer,) = scl_layers(model)
    h = torch.randn(20, M)
    torch.testing.assert_close(layer(h), layer.base_layer(h), rtol=1e-4, atol=1e-5)
    (layer(h) - torch.randn(20, D)).square().sum().backward()
    gradients = layer.scl_B["default"].weight.grad.norm(dim=0)
    assert gradients.min() > 0.01 * gradients.max()


def test_weights_whose_storage_is_freed_are_read_in_their_own_forward_only():
    # what FSDP leaves of a flat parameter between forwards: a shape without memory
    (layer,) = scl_layers(wrapped_block(BOTTLENECKS[1]))
    h = torch.randn(20, M, dtype=torch.float64)
    assert layer._is_narrow(["x"], h)
    weight = layer.scl_delta_A["x"].weight
    weight.untyped_storage().resize_(0)
    assert not layer._is_narrow(["x"], h)


def test_a_bfloat16_model_keeps_its_dtype_and_gets_float32_adapters():
    torch.manual_seed(0)
    model = get_peft_model(Block(dtype=torch.bfloat16), SclConfig(r=4, target_modules=["down"], init_weights=False))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model(torch.randn(5, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_init_weights_false_is_random_everywhere():
    for config in SETTINGS:
        torch.manual_seed(0)
        model = get_peft_model(Block(), SclConfig(target_modules=["down"], init_weights=False, **config))
        weights = [p for n, p in model.named_parameters() if ".scl_" in n and n.endswith("weight")]
        assert all(weight.abs().min() > 0 for weight in weights)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("base", BASES)
def test_compress_starts_at_the_best_rank_r_approximation(base, scaling):
    for r, keep_residual in itertools.product((1, 4, min(M, D)), (True, False)):
        torch.manual_seed(0)
        config = SclConfig(
            r=r, variant="compress", keep_residual=keep_residual, scaling=scaling, target_modules=["down"]
        )
        model = get_peft_model(Block(base), config)
        (layer,) = scl_layers(model)
        weight, bias = dense_base(layer)
        maps = dense_maps(layer, "default")
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :r] * values[:r]) @ right[:r]
        # the maps are created in float32
        torch.testing.assert_close(scaling * maps["B"] @ maps["A"], best, rtol=1e-5, atol=1e-6)
        # singular values shared evenly, largest entry of each left vector positive
        root = (values[:r] / scaling).sqrt()
        torch.testing.assert_close(maps["A"].norm(dim=1), root, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(maps["B"].norm(dim=0), root, rtol=1e-5, atol=1e-6)
        assert (maps["B"].gather(0, maps["B"].abs().argmax(dim=0, keepdim=True)) > 0).all()
        if r == min(M, D) or keep_residual:
            h = torch.randn(5, M, dtype=torch.float64)
            torch.testing.assert_close(layer(h), h @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_directions_beyond_the_rank_of_the_weight_can_be_trained():
    torch.manual_seed(0)
    block = Block()
    model = get_peft_model(block, SclConfig(r=D + 3, target_modules=["down"]))
    (layer,) = scl_layers(model)
    h = torch.randn(20, M, dtype=torch.float64)
    assert torch.equal(layer(h), layer.base_layer(h))
    layer(h).square().sum().backward()
    assert layer.scl_B["default"].weight.grad.any(dim=0).all()
    weight, _ = dense_base(layer)
    maps = dense_maps(layer, "default")
    torch.testing.assert_close(maps["B"] @ maps["A"], weight, rtol=1e-5, atol=1e-6)


def test_compress_does_not_compute_the_projection_it_replaces():
    model = wrapped_block(REPLACING, base="linear_no_bias")
    (layer,) = scl_layers(model)
    layer.get_base_layer().weight.data.fill_(float("nan"))
    assert layer(torch.randn(3, M, dtype=torch.float64)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*have no effect with `variant='compress'`:UserWarning")
def test_parameter_counts():
    r, delta_r = 4, 3
    bottleneck = 2 * r * M
    expected = {
        ("bottleneck", "none"): bottleneck,
        ("bottleneck", "low_rank"): bottleneck + delta_r * (M + D),
        ("bottleneck", "full"): bottleneck + M * D,
        ("compress", "none"): r * (M + D),
        ("compress", "low_rank"): r * (M + D),
        ("compress", "full"): r * (M + D),
    }
    for (variant, delta), count in expected.items():
        for scl_bias in (False, True):
            config = SclConfig(
                r=r, variant=variant, train_down_proj=delta, down_proj_r=delta_r, scl_bias=scl_bias,
                target_modules=["down"],
            )  # fmt: skip
            model = get_peft_model(Block(), config)
            biases = (r + (M if variant == "bottleneck" else D)) * scl_bias
            assert model.get_nb_trainable_parameters()[0] == count + biases


@pytest.mark.parametrize(
    "config",
    [*VARIANTS, *({**variant, "activation": "gelu", "scl_bias": True} for variant in VARIANTS)],
    ids=config_id,
)
def test_compiles_without_graph_breaks(config):
    torch.manual_seed(0)
    model = get_peft_model(
        Block(dtype=torch.float32), SclConfig(target_modules=["down"], init_weights=False, **config)
    )
    x = torch.randn(5, D)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.fast("bottleneck-gelu-True")
@pytest.mark.parametrize(
    "config",
    [{}, {"variant": "bottleneck"}, {"variant": "bottleneck", "activation": "gelu", "scl_bias": True}],
    ids=config_id,
)
def test_a_whole_model_compiles_without_graph_breaks(config):
    torch.manual_seed(0)
    model = get_peft_model(
        ARCHITECTURES["llama"].build(), SclConfig(r=4, init_weights=False, task_type="CAUSAL_LM", **config)
    )
    tokens = torch.arange(1, 13).view(2, 6)

    def gradients(call):
        model.zero_grad()
        call(input_ids=tokens, labels=tokens).loss.backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}

    torch._dynamo.reset()  # compiled before the first plain forward, which checks that the wrapped modules are called
    compiled = gradients(torch.compile(model.forward, backend="aot_eager", fullgraph=True))
    for key, gradient in gradients(model).items():
        assert gradient.any(), key
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", VARIANTS, ids=config_id)
def test_gradient_checkpointing_gives_the_same_gradients(config, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(init_weights=False, **config))
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        tokens = torch.arange(1, 13).view(2, 6)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name
