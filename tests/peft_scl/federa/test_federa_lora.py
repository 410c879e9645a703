# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Recompression of a trained adapter to a rank the user names, against the dense SVD of its change."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model_state_dict
from safetensors.torch import load_file

from helpers.federa_reference import MODELS, adapted, both_modes, build, factors, federa_layers
from helpers.models import logits, move
from peft_scl import FederaConfig, to_lora
from peft_scl.convert import main


modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)
all_models = pytest.mark.parametrize("name", MODELS)


def _changes(model):
    """The change of every adapted weight as `(out, in)`, in float64."""
    changes = {}
    for name, layer in federa_layers(model).items():
        found = factors(layer)
        scaling = layer.lora_alpha["default"] / layer.r["default"]
        changes[name] = scaling * (found["B"] @ found["A"] - found["B0"] @ found["A0"])
    return changes


def _products(state_dict, names):
    products = {}
    for name in names:
        pair = [
            next(tensor for key, tensor in state_dict.items() if key.startswith(f"base_model.model.{name}.lora_") and f"_{letter}" in key)
            for letter in "BA"
        ]  # fmt: skip
        products[name] = pair[0].double() @ pair[1].double()
    return products


@modes
@all_models
@pytest.mark.parametrize("r", [None, 5, 2])
def test_the_export_is_the_best_of_its_rank_and_says_how_good(name, keep_base, r, tmp_path):
    model = move(adapted(name, keep_base=keep_base, rank_pattern={MODELS[name][3][0]: 3}))
    changes = _changes(model)
    export = to_lora(model, r=r)
    export.save_pretrained(tmp_path)
    assert export.config.r == (8 if r is None else r)
    products = _products(load_file(tmp_path / "adapter_model.safetensors"), changes)
    squares = torch.zeros(2, dtype=torch.float64)
    for key, change in changes.items():
        values = torch.linalg.svdvals(change)
        best = 0.0 if r is None else values[r:].norm().item()
        distance = (products[key] - change).norm().item()
        assert distance == pytest.approx(best, rel=1e-4, abs=1e-6 * values[0].item())
        assert export.errors[key] == pytest.approx(distance / change.norm().item(), rel=1e-4, abs=1e-12)
        squares += torch.tensor([distance**2, change.norm().item() ** 2], dtype=torch.float64)
    assert export.error == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4, abs=1e-12)
    restored = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert type(restored.peft_config["default"]) is LoraConfig
    if r is None:
        torch.testing.assert_close(logits(restored), logits(model), rtol=1e-4, atol=1e-6)


def test_an_untrained_adapter_changes_nothing():
    export = to_lora(adapted("llama"), r=2)
    assert export.error == 0
    assert not any(_products(export.state_dict, export.errors)[name].any() for name in export.errors)


def test_a_rank_above_that_of_the_change_is_refused():
    with pytest.raises(
        ValueError, match="`r` is 9, but the weight changes of the adapter 'default' have no rank above 8"
    ):
        to_lora(adapted("llama"), r=9)


def test_what_is_trained_besides_comes_along(tmp_path):
    model = move(adapted("gpt2", bias="lora_only", trainable_token_indices=[3, 5]))
    to_lora(model).save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(build("gpt2"), tmp_path).eval()
    torch.testing.assert_close(logits(restored), logits(model), rtol=1e-4, atol=1e-6)


def test_the_command_recompresses_a_saved_adapter(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "base")
    model = move(adapted("llama"))
    model.save_pretrained(tmp_path / "adapter")
    main([str(tmp_path / "adapter"), str(tmp_path / "lora"), "--base_model", str(tmp_path / "base"), "--r", "3"])
    error = to_lora(model, r=3).error
    assert f"relative error {error:.2e}" in capsys.readouterr().out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 3


@modes
def test_peft_can_convert_it(keep_base):
    """Its own `convert_to_lora`, from the change of each weight."""
    model = move(adapted("llama", keep_base=keep_base))
    config, state_dict = convert_to_lora(model, rank=8)
    products, changes = _products(state_dict, _changes(model)), _changes(model)
    for key, change in changes.items():
        scale = change.abs().max().item()
        torch.testing.assert_close(products[key] * config.lora_alpha / config.r, change, rtol=1e-3, atol=1e-4 * scale)
    assert not isinstance(config, FederaConfig)
    assert get_peft_model_state_dict(model).keys() >= state_dict.keys()
