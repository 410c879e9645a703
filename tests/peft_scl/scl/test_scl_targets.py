# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which modules are wrapped: defaults per architecture, the fallback by sizes, selection, and what is refused."""

import re
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from helpers.scl_models import ARCHITECTURES, FFN, HIDDEN, LAYERS, as_unknown, moe_model
from helpers.scl_reference import Block, scl_layers
from peft_scl import SclConfig, SclLayer
from peft_scl.scl.targets import DOWN_PROJECTIONS, EXCLUDED_MODULES, find_down_projections


def _wrapped_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, SclLayer)}


def _inputs(model, name):
    torch.manual_seed(0)
    inputs = {}
    if name not in ("vit", "siglip_classification"):
        inputs["input_ids"] = torch.arange(3, 15).view(2, 6)
    if name in ("vit", "siglip", "siglip_classification", "clip"):
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _output(model, name):
    output = model(**_inputs(model, name))
    return output.logits if hasattr(output, "logits") else output.logits_per_image


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_per_architecture(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build().requires_grad_(False)  # frozen attention takes another kernel, last bits differ
    with torch.no_grad():
        expected = _output(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a default that needs a warning is a wrong default
        wrapped = get_peft_model(model, SclConfig(r=4, variant="bottleneck", activation="gelu", scl_bias=True))
    assert _wrapped_names(model) == architecture.target_names
    for layer in scl_layers(model):
        assert (layer.in_features, layer.out_features) == (FFN, HIDDEN)
        assert tuple(layer.scl_A["default"].weight.shape) == (4, FFN)
        assert tuple(layer.scl_delta_B["default"].weight.shape) == (HIDDEN, 4)
    with torch.no_grad():
        assert torch.equal(_output(wrapped.eval(), name), expected)

    # B = 0 and delta_B = 0 at the start: their own gradients are all that is not zero by construction
    _output(wrapped, name).square().sum().backward()
    for key, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == (".scl_" in key), key
        if parameter.requires_grad:
            at_zero = ".scl_A." in key or ".scl_delta_A." in key
            assert (parameter.grad == 0).all() if at_zero else parameter.grad.any(), key
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad / (parameter.grad.norm() + 1e-12)
    wrapped.zero_grad()
    _output(wrapped, name).square().sum().backward()
    for key, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("exclude", [["layer.0.output.dense"], r".*layer\.0\.output\.dense"], ids=["list", "regex"])
def test_excluding_more_keeps_the_default_exclusions(name, exclude):
    model = ARCHITECTURES[name].build()
    wrapped = get_peft_model(model, SclConfig(r=4, exclude_modules=exclude))
    assert _wrapped_names(model) == {target for target in ARCHITECTURES[name].target_names if ".1." in target}
    # and a second adapter from the saved form of that config finds the same modules
    config = wrapped.peft_config["default"]
    again = ARCHITECTURES[name].build()
    get_peft_model(again, SclConfig(r=4, target_modules=config.target_modules, exclude_modules=config.exclude_modules))
    assert _wrapped_names(again) == _wrapped_names(model)


def test_cross_attention_of_bert_is_not_a_down_projection():
    config = {**ARCHITECTURES["bert"].config, "is_decoder": True, "add_cross_attention": True}
    model = transformers.BertModel(transformers.BertConfig(**config))
    get_peft_model(model, SclConfig(r=4))
    assert _wrapped_names(model) == {f"encoder.layer.{layer}.output.dense" for layer in range(LAYERS)}


def test_default_targets_are_lists():
    # a regular expression would disable `layers_to_transform`
    assert all(isinstance(targets, list) for targets in [*DOWN_PROJECTIONS.values(), *EXCLUDED_MODULES.values()])
    assert EXCLUDED_MODULES.keys() <= DOWN_PROJECTIONS.keys()


@pytest.mark.parametrize(("layers", "expected"), [(0, {0}), (1, {1}), ([0], {0}), ([0, 1], {0, 1})])
@pytest.mark.parametrize("name", ["llama", "bert", "opt", "gpt2", "t5"])
def test_layers_to_transform(name, layers, expected):
    model = ARCHITECTURES[name].build()
    get_peft_model(model, SclConfig(r=4, layers_to_transform=layers))
    assert _wrapped_names(model) == {
        target.format(layer) for target in ARCHITECTURES[name].targets for layer in expected
    }


def test_layers_pattern():
    model = ARCHITECTURES["llama"].build()
    get_peft_model(model, SclConfig(r=4, layers_to_transform=[1], layers_pattern="layers"))
    assert _wrapped_names(model) == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize(("layers", "expected"), [(None, {0, 1}), (0, {0}), ([1], {1})])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "opt", "vit"])
def test_fallback_by_sizes_finds_the_same_modules(name, layers, expected):
    model = as_unknown(ARCHITECTURES[name].build())
    with pytest.warns(UserWarning, match="The architecture 'unheard-of' is not known to SCL. By their sizes, these 2"):
        wrapped = get_peft_model(model, SclConfig(r=4, layers_to_transform=layers))
    assert _wrapped_names(model) == {
        target.format(layer) for target in ARCHITECTURES[name].targets for layer in expected
    }
    with pytest.warns(UserWarning, match="is not known to SCL"):  # on an adapted model too
        wrapped.add_adapter("other", SclConfig(r=4, layers_to_transform=layers))
    assert all(layer.scl_A.keys() == {"default", "other"} for layer in scl_layers(model))


def test_fallback_knows_the_default_width_of_gpt2():
    config = {**ARCHITECTURES["gpt2"].config, "n_inner": None}
    model = as_unknown(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))
    with pytest.warns(UserWarning, match="transformer.h.0.mlp.c_proj, transformer.h.1.mlp.c_proj"):
        get_peft_model(model, SclConfig(r=4))
    assert {(layer.in_features, layer.out_features) for layer in scl_layers(model)} == {(4 * HIDDEN, HIDDEN)}


def test_fallback_does_not_take_an_attention_projection_of_the_same_size():
    # 5 heads of size 8 give an output projection of the size of the down projection
    config = {**ARCHITECTURES["qwen3"].config, "num_attention_heads": 5}
    model = as_unknown(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)))
    attention = model.model.layers[0].self_attn.o_proj
    assert (attention.in_features, attention.out_features) == (FFN, HIDDEN)
    with pytest.warns(UserWarning, match="is not known to SCL"):
        get_peft_model(model, SclConfig(r=4))
    assert _wrapped_names(model) == ARCHITECTURES["qwen3"].target_names


def test_fallback_excludes_modules_of_the_same_name_by_suffix_or_by_full_name():
    model = as_unknown(ARCHITECTURES["bert"].build())
    model.bert.encoder.layer[1].output.dense = nn.Linear(FFN + 1, HIDDEN)
    with pytest.warns(UserWarning, match="these 1 modules"):
        suffixes, excluded = find_down_projections(model)
    assert suffixes == ["output.dense"]
    assert set(excluded) == {"attention.output.dense", "bert.encoder.layer.1.output.dense"}


def test_no_recognisable_ffn():
    message = (
        "Please specify `target_modules` in `peft_config`: the feed-forward blocks of 'Block' are not known to SCL"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(Block(), SclConfig())

    model = as_unknown(ARCHITECTURES["llama"].build())
    model.config.intermediate_size = FFN + 1
    message = f"'unheard-of' are not known to SCL, and no linear layer maps [({FFN + 1}, {HIDDEN})] (FFN width, hidden"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, SclConfig())


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_fused_experts_have_no_default(name):
    model = moe_model(name)
    message = r"2 modules of this model \(the first: model\.layers\.0\.mlp\.experts\) hold several experts"
    with pytest.raises(NotImplementedError, match=message):
        get_peft_model(model, SclConfig(r=4))
    assert not _wrapped_names(model)


def test_a_shared_expert_is_wrapped_on_request_and_never_silently():
    model = moe_model("qwen2_moe")
    with pytest.warns(UserWarning, match="hold several experts in one parameter, which SCL cannot wrap yet"):
        get_peft_model(model, SclConfig(r=4, target_modules=["down_proj"]))
    assert _wrapped_names(model) == {f"model.layers.{layer}.mlp.shared_expert.down_proj" for layer in range(LAYERS)}


def test_tensor_parallel_models_are_refused():
    model = ARCHITECTURES["llama"].build()
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="SCL does not support tensor parallelism"):
        get_peft_model(model, SclConfig(r=4))
    assert not _wrapped_names(model)


def test_only_linear_layers_are_wrapped():
    model = ARCHITECTURES["llama"].build()
    with pytest.raises(
        TypeError, match=r"Target module model\.embed_tokens is a Embedding, but SCL wraps linear layers"
    ):
        get_peft_model(model, SclConfig(r=4, target_modules=["embed_tokens"]))


def test_another_tuner_beneath_is_refused():
    model = inject_adapter_in_model(LoraConfig(target_modules=["down"]), Block(), adapter_name="lora")
    message = r"Target module down is already wrapped by another PEFT method \(peft\.tuners\.lora\.layer\.Linear\)"
    with pytest.raises(TypeError, match=message):
        inject_adapter_in_model(SclConfig(target_modules=["down"]), model, adapter_name="scl")
