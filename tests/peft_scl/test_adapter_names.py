# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
SCL and FeDeRA adapters are saved whole, whatever they are called: like a module of the model, a layer, a part of an
adapter.
"""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpers.comparison import assert_same
from peft_scl import FederaConfig, SclConfig, load_federa


CONFIGS = {
    "SCL": lambda: SclConfig(r=2, scl_bias=True, task_type="SEQ_CLS"),
    "principal": lambda: SclConfig(r=2, variant="bottleneck", train_down_proj="low_rank", task_type="SEQ_CLS"),
    "FeDeRA": lambda: FederaConfig(r=2, target_modules=["down_proj"], keep_base=True, task_type="SEQ_CLS"),
    "embedding": lambda: FederaConfig(
        r=2, target_modules=["embed_tokens", "o_proj"], keep_base=True, task_type="SEQ_CLS"
    ),
}


def base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForSequenceClassification(config)


def adapted(kind, *names):
    """Adapters that all differ, of a classifier, which brings a module that is saved along."""
    model = get_peft_model(base_model(), CONFIGS[kind](), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[kind]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:  # in the same order whatever they are called
            model.set_adapter(name)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def parts_of_keys(kind):
    keys = [*adapted(kind, "default").state_dict(), "base_model.model.score.original_module.weight"]
    return sorted({part for key in keys for part in key.split(".")} - {"default"})


def is_refused(kind, name):
    """
    Whether torch or PEFT itself refuses the name: what is no entry of a `ModuleDict`, or a module that is saved along.
    """
    try:
        adapted(kind, "default", name)
    except (KeyError, ValueError) as error:
        return "exists" in str(error) or "does not conflict with any of the targeted modules" in str(error)
    return False


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():  # PEFT's, on names within its prefixes and on targeted embeddings
        warnings.simplefilter("ignore")
        yield


@pytest.mark.fast("SCL", "FeDeRA")
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_part_of_a_key_may_be_the_name_of_an_adapter(kind):
    expected = {name: get_peft_model_state_dict(adapted(kind, "a", "b"), adapter_name=name) for name in "ab"}
    names = [name for name in parts_of_keys(kind) if not is_refused(kind, name)]
    assert {"mlp", "0", "model", "base_model", "weight", "self_attn", "base_layer"} <= set(names)
    for name in names:
        second = adapted(kind, "default", name)
        assert_same(get_peft_model_state_dict(second, adapter_name="default"), expected["a"])
        assert_same(get_peft_model_state_dict(second, adapter_name=name), expected["b"])
        first = adapted(kind, name, "default")
        assert_same(get_peft_model_state_dict(first, adapter_name=name), expected["a"])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["mlp", "0", "model"])
def test_what_is_saved_beside_a_clash_is_loaded_beside_one(kind, name, tmp_path):
    adapted(kind, "default", name).save_pretrained(tmp_path)
    plain = adapted(kind, "default", "other")
    load = load_federa if isinstance(CONFIGS[kind](), FederaConfig) else PeftModel.from_pretrained
    loaded = load(base_model(), tmp_path / name, name)
    loaded.add_adapter("default", CONFIGS[kind]())
    loaded.load_adapter(tmp_path, "default")
    for adapter, theirs in ((name, "other"), ("default", "default")):
        expected = get_peft_model_state_dict(plain, adapter_name=theirs)
        assert_same(get_peft_model_state_dict(loaded, adapter_name=adapter), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_gathered_without_an_adapter_is_not_saved(kind, tmp_path):
    """PEFT drops tensors of a state dict that was gathered elsewhere, such as under FSDP2; they cannot be put back."""
    model = adapted(kind, "default", "mlp")
    gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"an adapter is called like a module of the model \(\['mlp'\]\)"):
        model.save_pretrained(tmp_path, state_dict=gathered, selected_adapters=["default"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model = adapted(kind, "default", "other")
    gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered, selected_adapters=["default"])
    assert_same(
        load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(model, adapter_name="default")
    )
