# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The adapter methods that transformers puts on its models: the same outputs as through `PeftModel`."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.models import TOKENS, logits
from helpers.scl_models import ARCHITECTURES
from helpers.scl_reference import CONFIGS, config_id
from peft_scl import SclConfig


def _with_two(config):
    """A model with the adapters "x" and "y", and its outputs with none and with either of them."""
    model = ARCHITECTURES["llama"].build()
    outputs = {"none": logits(model)}
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        model.add_adapter(SclConfig(init_weights=False, **config), adapter_name=name)
        outputs[name] = logits(model)
    assert not any(torch.allclose(outputs[one], outputs[other]) for one, other in ("xy", ("x", "none"), ("y", "none")))
    return model, outputs


def _trainable(model):
    return {key.split(".")[-2] for key, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_switching_disabling_and_deleting(config):
    model, outputs = _with_two(config)
    assert model.active_adapters() == ["y"]
    for name in ("x", "y", "x"):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs[name])
        assert _trainable(model) == {name}
    model.disable_adapters()
    assert torch.equal(logits(model), outputs["none"])
    model.enable_adapters()
    assert torch.equal(logits(model), outputs["x"])
    model.set_adapter(["x", "y"])
    assert not torch.allclose(logits(model), outputs["x"])

    model.set_adapter("y")
    model.delete_adapter("x")
    assert torch.equal(logits(model), outputs["y"])
    assert not any(".x." in key for key in model.state_dict())
    model.delete_adapter("y")
    assert torch.equal(logits(model), outputs["none"])
    assert not any(".scl_" in key for key in model.state_dict())


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_saving_and_loading_either_way(config, tmp_path):
    model, outputs = _with_two(config)
    for name in "xy":
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)  # saves the active adapter
        assert torch.equal(
            logits(PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / name)), outputs[name]
        )
    restored = ARCHITECTURES["llama"].build()
    for name in "xy":
        info = restored.load_adapter(str(tmp_path / name), adapter_name=name)
        assert not info.unexpected_keys
        assert not any(f".{name}." in key for key in info.missing_keys)
        assert not restored.training
        assert not _trainable(restored)
    for name in "xy":
        restored.set_adapter(name)
        assert torch.equal(logits(restored), outputs[name])

    trainable = ARCHITECTURES["llama"].build()
    trainable.load_adapter(str(tmp_path / "x"), adapter_name="x", is_trainable=True)
    assert _trainable(trainable) == {"x"}


def test_an_adapter_saved_by_peft_loads(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(ARCHITECTURES["llama"].build(), SclConfig(r=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    restored = ARCHITECTURES["llama"].build()
    restored.load_adapter(str(tmp_path))
    assert torch.equal(logits(restored), logits(model))


def test_only_the_active_adapter_is_trained():
    model, _ = _with_two({"r": 4})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) != (".y." in key and ".scl_start_" not in key), key
