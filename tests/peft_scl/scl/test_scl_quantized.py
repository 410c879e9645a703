# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised base models: forward, training, saving, and merging with its rounding."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models import TOKENS
from helpers.quantization import INPUT_ERROR, QUANTIZATIONS, quantized_logits
from helpers.scl_reference import config_id, dense_maps, reference_forward, scl_layers
from peft_scl import SclConfig


HIDDEN, FFN = 64, 128  # multiples of the block size of 4-bit quantisation
LINEAR = [
    *({"r": 4, "variant": "bottleneck", "train_down_proj": delta} for delta in ("none", "low_rank", "full")),
    {"r": 4, "variant": "compress", "keep_residual": False, "scl_bias": True},
    {"r": 4, "variant": "compress"},
]
CONFIGS = [*LINEAR, {"r": 4, "variant": "bottleneck", "activation": "gelu", "scaling": 0.5}]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A tiny Llama whose down projections have biases, unquantised."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTIZATIONS)
def backend(request):
    return request.param


@pytest.fixture
def load(base_dir, backend):
    return lambda: LlamaForCausalLM.from_pretrained(base_dir, quantization_config=QUANTIZATIONS[backend]())


def _random(model, **config):
    torch.manual_seed(1)
    model = get_peft_model(model, SclConfig(init_weights=False, **config))
    for key, parameter in model.named_parameters():
        if ".scl_" in key:
            parameter.data.normal_(std=0.1)
    return model


def _dense(layer):
    return layer.get_base_weight().double()


def _reference(layer, config, h):
    """The formula with the quantised weight's values, by way of an unquantised layer that holds them."""
    plain = copy.copy(layer)
    plain._modules = {**layer._modules, "base_layer": torch.nn.Linear(FFN, HIDDEN)}
    plain.base_layer.weight.data = _dense(layer)
    plain.base_layer.bias.data = layer.bias.data.double()
    return reference_forward(plain, {"default": config}, h)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_forward_is_the_formula_on_the_dequantised_weight(config, load, backend):
    for layer in scl_layers(_random(load(), **config).train()):
        assert layer.quantization_backend.backend_name == backend
        h = torch.randn(2, 5, FFN)
        expected = _reference(layer, config, h)
        error = (layer(h).double() - expected).abs().max() / expected.abs().max()
        assert error < INPUT_ERROR[backend]


@pytest.mark.parametrize("r", [4, HIDDEN])
def test_compress_starts_at_the_best_approximation_of_the_dequantised_weight(r, load):
    for layer in scl_layers(get_peft_model(load(), SclConfig(r=r, variant="compress"))):
        left, values, right = torch.linalg.svd(_dense(layer), full_matrices=False)
        maps = dense_maps(layer, "default")
        torch.testing.assert_close(maps["B"] @ maps["A"], (left[:, :r] * values[:r]) @ right[:r], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_training_for_low_bits_changes_the_adapter_only(config, load):
    model = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(model, SclConfig(**config)).train()
    assert model.get_base_model().is_gradient_checkpointing
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        assert _same(value, before[key]) != (".scl_" in key and ".scl_start_" not in key), key


def _same(one, other):
    """Equality of plain and of torchao tensors."""
    if hasattr(one, "qdata"):
        return torch.equal(one.qdata, other.qdata) and torch.equal(one.scale, other.scale)
    return torch.equal(one, other)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_an_adapter_loads_onto_a_freshly_quantised_base(config, load, tmp_path):
    model = _random(load(), **config)
    expected = quantized_logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(quantized_logits(PeftModel.from_pretrained(load(), tmp_path)), expected)


def _stored(layer):
    """All bits of a quantised weight: values, scales, code book."""
    state = {key: copy.deepcopy(value) for key, value in layer.get_base_layer().state_dict().items()}
    return {**state, "dense": layer.get_base_weight().clone()}


@pytest.mark.parametrize("config", LINEAR, ids=config_id)
def test_merging_rounds_once_more_and_is_undone_bit_for_bit(config, load, backend):
    model = _random(load(), **config)
    separate = quantized_logits(model)
    stored = [_stored(layer) for layer in scl_layers(model)]
    exact = [_exact_merge(layer, config) for layer in scl_layers(model)]
    with pytest.warns(UserWarning, match=f"weights quantised by {backend} rounds the result to the quantisation grid"):
        model.merge_adapter()
    for layer, (weight, bias) in zip(scl_layers(model), exact, strict=True):
        # No further away than the exact merge is after quantisation by the same library, the least error there can be.
        # An entry half way between two points of the grid may go either way, hence the comparison of the largest
        # errors.
        rounding = (_requantised(layer, weight.float()) - weight).abs().max()
        error = (_dense(layer) - weight).abs().max()
        assert 0 < error < 1.001 * rounding + 1e-6
        assert rounding < {"bnb 4bit": 0.2, "bnb 8bit": 0.006, "torchao": 0.006}[backend] * weight.abs().max()
        torch.testing.assert_close(layer.bias.double(), bias, rtol=1e-5, atol=1e-6)
    merged = quantized_logits(model)
    assert not torch.equal(merged, separate)
    model.unmerge_adapter()
    for layer, before in zip(scl_layers(model), stored, strict=True):
        after = _stored(layer)
        assert after.keys() == before.keys()
        assert all(_same(after[key], before[key]) for key in before)
    torch.testing.assert_close(quantized_logits(model), separate, rtol=0, atol=0)

    with pytest.warns(UserWarning, match="rounds the result"):
        plain = model.merge_and_unload()
    assert not scl_layers(plain)
    assert torch.equal(quantized_logits(plain), merged)


def _exact_merge(layer, config):
    """Weight and bias that the formula gives, read off from its values at the unit vectors and at zero, in float64."""
    bias = _reference(layer, config, torch.zeros(1, FFN))
    return (_reference(layer, config, torch.eye(FFN)) - bias).T, bias[0]


def _requantised(layer, weight):
    fresh = copy.deepcopy(layer)
    fresh.set_base_weight(weight)
    return _dense(fresh)


def test_merging_a_second_adapter_starts_from_the_original_weight(load, backend):
    model = _random(load(), r=4)
    model.add_adapter("other", SclConfig(r=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = scl_layers(model)[0]
    stored = _stored(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
        at_once = _dense(layer)
        layer.unmerge()
        layer.merge(adapter_names=["default"])
        layer.merge(adapter_names=["other"])
    torch.testing.assert_close(_dense(layer), at_once, rtol=0, atol=1e-5)
    # a broken one changes nothing
    layer.unmerge()
    layer.scl_A["other"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="The adapter other seems to be broken"):
        layer.merge(safe_merge=True)
    assert all(_same(value, stored[key]) for key, value in _stored(layer).items())


def test_merging_into_other_quantised_layers_is_refused(base_dir):
    model = _random(LlamaForCausalLM.from_pretrained(base_dir), r=4)
    layer = scl_layers(model)[0]
    layer.quantization_backend = type("Backend", (), {"backend_name": "gptq"})()
    message = r"a layer quantised by gptq is not supported \(only by bnb 4bit, bnb 8bit, torchao\)"
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(NotImplementedError, match=message):
            merge()
    assert not layer.merged


@pytest.mark.parametrize("backend", ["bnb 4bit"])
def test_a_layer_repacked_for_inference_cannot_be_read(load):
    model = _random(load(), r=4)
    for layer in scl_layers(model):
        layer.weight.quant_state.packing_format_for_cpu = True  # what an inference on a CPU with AVX512-BF16 does
    message = "bitsandbytes has repacked a 4-bit layer for inference on this CPU, and its weight can no longer be read"
    for merge in (model.merge_adapter, model.merge_and_unload, scl_layers(model)[0].merge):
        with pytest.raises(RuntimeError, match=message):
            merge()
    with pytest.raises(RuntimeError, match=message):
        model.add_adapter("other", SclConfig(r=4, variant="compress"))
