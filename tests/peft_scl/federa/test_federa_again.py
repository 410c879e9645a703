# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A base model that is adapted twice, or whose adaptation fails, is the pretrained one underneath."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers.federa_reference import build, config_for, federa_layers
from helpers.models import TOKENS, logits, move
from peft_scl import FederaConfig, load_federa
from peft_scl.federa import layer as federa_layer


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("r", [3, 2], ids=["same_rank", "other_rank"])
@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_the_same_name_twice_on_one_base_starts_anew(r, keep_base, tmp_path):
    base = build("llama")
    expected = logits(base)
    move(get_peft_model(base, config_for("llama", r=3, keep_base=keep_base)))
    model = get_peft_model(base, config_for("llama", r=r, keep_base=keep_base)).eval()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    move(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), trained, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(logits(model.unload()), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_loading_twice_onto_one_base(tmp_path):
    model = get_peft_model(build("llama"), config_for("llama", r=3)).eval()
    move(model)
    model.save_pretrained(tmp_path)
    base = build("llama")
    load_federa(base, tmp_path)
    again = load_federa(base, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)
    torch.testing.assert_close(logits(again.unload()), logits(build("llama")), **CLOSE)


def test_a_start_that_fails_leaves_no_residual_behind(monkeypatch):
    base, calls = build("llama"), []
    expected = logits(base)

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = federa_layer.principal_factors
    monkeypatch.setattr(federa_layer, "principal_factors", failing)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(base, config_for("llama", r=3))
    assert len(calls) == 3
    torch.testing.assert_close(logits(base), expected, **CLOSE)
    monkeypatch.undo()
    model = get_peft_model(base, config_for("llama", r=3)).eval()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert len(federa_layers(model)) == 4


def test_a_refused_adapter_leaves_no_entry(tmp_path):
    base = build("llama")
    model = get_peft_model(base, config_for("llama", r=3))
    with pytest.raises(ValueError, match="which is right for this adapter only"):
        get_peft_model(base, config_for("llama", r=3), adapter_name="other")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="which is right for this adapter only"):
        model.add_adapter("other", config_for("llama", r=3))
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_has_no_place_for_a_residual(norm):
    base = build("llama")
    norm(base.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="computed anew in every forward"):
        get_peft_model(base, config_for("llama", r=3))
    expected = logits(base)
    model = get_peft_model(base, config_for("llama", r=3, keep_base=True)).eval()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_directions_that_the_weight_does_not_have_start_as_those_of_a_lora(rank, keep_base):
    base = build("llama")
    weight = base.model.layers[0].self_attn.q_proj.weight.data
    left, values, right = torch.linalg.svd(weight.double())
    weight.copy_((left[:, :rank] * values[:rank]) @ right[:rank])
    expected = logits(base)
    config = FederaConfig(r=4, lora_alpha=4, target_modules=["q_proj"], layers_to_transform=[0], keep_base=keep_base)
    model = get_peft_model(base, config).eval()
    (layer,) = federa_layers(model).values()
    trained_A, trained_B = layer.trained_factors("default")
    assert (trained_B[:, rank:] == 0).all() and trained_A[rank:].abs().amin(dim=1).gt(0).all()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert trained_B.grad.abs().amax(dim=0).gt(0).all()
