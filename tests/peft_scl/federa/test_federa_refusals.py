# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What FeDeRA does not do is refused with a sentence, before anything is changed."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftType, get_peft_model
from torch import nn

from helpers.federa_reference import Net, adapted, build, config_for, federa_layers
from helpers.models import logits
from peft_scl import FederaConfig, FederaModel


@pytest.mark.parametrize(
    "name, value",
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [(0, 1), (0, 1)]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["weight"]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
    ],
)
def test_options_of_lora_without_a_meaning_here(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*, but FeDeRA is a plain LoRA with a start of its own"):
        FederaConfig(r=4, **{name: value})


@pytest.mark.parametrize("value", ["pissa", "gaussian", "olora", "orthogonal"])
def test_other_initialisations(value):
    with pytest.raises(ValueError, match=f"`init_lora_weights` is '{value}', but FeDeRA is an initialisation itself"):
        FederaConfig(r=4, init_lora_weights=value)


def test_the_configs_of_other_initialisations():
    with (
        pytest.warns(UserWarning, match="`init_lora_weights` is not 'eva'"),
        pytest.raises(ValueError, match="`eva_config` is .* use `LoraConfig`"),
    ):
        FederaConfig(r=4, eva_config=EvaConfig())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"r": 2.0}, "`r` should be a positive integer value but the value passed is 2.0"),
        ({"rank_pattern": {"q_proj": -1}}, "`q_proj` should be a positive integer value but the value passed is -1"),
        ({"lora_alpha": 0}, "`lora_alpha` should be positive but the value passed is 0"),
        ({"alpha_pattern": {"q_proj": -2}}, "`q_proj` should be positive but the value passed is -2"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        FederaConfig(**values)


def test_the_type_is_its_own():
    config = FederaConfig(r=4)
    assert isinstance(config, LoraConfig)
    assert config.peft_type is PeftType["FEDERA"]
    assert FederaModel.prefix == "lora_"


@pytest.mark.parametrize("keep_base", [False, True])
def test_a_rank_above_that_of_the_weight(keep_base):
    with pytest.raises(
        ValueError, match=r"`r` is 7, but lin has a weight of shape \(9, 6\), which has no more than 6"
    ):
        get_peft_model(Net(), FederaConfig(r=7, target_modules=["lin"], keep_base=keep_base))


@pytest.mark.parametrize("first, second", [(False, False), (False, True), (True, False)])
def test_a_residual_base_beside_other_adapters(first, second):
    model = adapted("llama", keep_base=first)
    expected = logits(model)
    with pytest.raises(
        ValueError, match="has `keep_base=False`: the base model holds its residual.* Use `keep_base=True`"
    ):
        model.add_adapter("second", config_for("llama", keep_base=second))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


class _Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(3, 3, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.scaled = nn.Embedding(5, 4, max_norm=1.0)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "target, error, message",
    [
        ("conv", TypeError, "Target module conv is a Conv2d, but FeDeRA wraps linear layers"),
        ("attention", TypeError, "Target module attention is a MultiheadAttention"),
        ("attention.out_proj", TypeError, "Target module attention.out_proj is a NonDynamicallyQuantizableLinear"),
        ("scaled", ValueError, "Target module scaled is an embedding with `max_norm`"),
        ("first", ValueError, r"used in several places \(first, second\), .* Set `keep_base=True`"),
    ],
)
def test_modules_that_cannot_be_wrapped(target, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(_Odd(), FederaConfig(r=2, target_modules=[target]))


def test_a_refusal_leaves_the_model_as_it_was():
    """The last target is the one that is refused, and the same model can be used with another config."""
    model = build("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for values in ({"r": 9}, {"rank_pattern": {"layers.1.self_attn.v_proj": 9}}):
        with pytest.raises(ValueError, match=r"layers.[01].self_attn.[kv]_proj has a weight of shape"):
            get_peft_model(model, config_for("llama", **{**values, "target_modules": "all-linear"}))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    adapted_ = get_peft_model(model, config_for("llama", target_modules="all-linear")).eval()
    torch.testing.assert_close(logits(adapted_), logits(build("llama")), rtol=1e-4, atol=1e-6)


def test_a_shared_weight_may_be_wrapped_if_the_base_is_kept():
    model = _Odd()
    x = torch.randn(2, 4)
    expected = model(x)
    assert torch.equal(get_peft_model(model, FederaConfig(r=2, target_modules=["first"], keep_base=True))(x), expected)


def test_a_layer_that_another_method_has_wrapped():
    model = build("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="x")
    with pytest.raises(TypeError, match=r"already wrapped by another PEFT method \(peft.tuners.lora.layer.Linear\)"):
        model.add_adapter(config_for("llama", keep_base=True), adapter_name="y")


def test_another_method_on_top_of_a_federa_layer():
    model = build("llama")
    model.add_adapter(config_for("llama", keep_base=True), adapter_name="x")
    with pytest.raises(TypeError, match="The layer has FeDeRA adapters, to which 'y', a LoraConfig, cannot be added"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="y")


def test_combining_adapters():
    model = adapted("llama", keep_base=True)
    with pytest.raises(NotImplementedError, match="cannot be combined while they are trained"):
        model.add_weighted_adapter(["default"], [1.0], "combined")


def test_tensor_parallel_models():
    model = build("llama")
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="FeDeRA does not support tensor parallelism"):
        get_peft_model(model, config_for("llama"))


def test_another_start_under_merged_adapters(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"The adapters \['default'\] are merged, so no other start can be loaded"):
        model.load_adapter(str(tmp_path), "default")
    assert all(layer.merged for layer in federa_layers(model).values())
