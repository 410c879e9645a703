# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Base models that are not in memory: on the meta device, or offloaded by accelerate."""

import accelerate
import pytest
import torch
from peft import get_peft_model

from helpers.federa_reference import adapted, build, config_for, factors, federa_layers
from helpers.models import TOKENS, logits, move
from peft_scl import load_federa


def _offloaded():
    return accelerate.cpu_offload(build("llama"), execution_device="cpu")


def test_an_offloaded_base_is_read_and_kept():
    expected = move(adapted("llama", keep_base=True))
    model = move(get_peft_model(_offloaded(), config_for("llama", keep_base=True)).eval())
    for name, layer in federa_layers(model).items():
        assert layer.get_base_layer().weight.is_meta
        assert all(
            torch.equal(one, factors(federa_layers(expected)[name])[key]) for key, one in factors(layer).items()
        )
    assert torch.equal(logits(model), logits(expected))
    for each in (model, expected):
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected.get_parameter(key).grad)
    torch.testing.assert_close(
        logits(model.eval().merge_and_unload()), logits(expected.eval().merge_and_unload()), rtol=1e-4, atol=1e-6
    )


def test_a_residual_cannot_be_written_into_an_offloaded_base():
    with pytest.raises(ValueError, match="but those of .* are offloaded. Set `keep_base=True`"):
        get_peft_model(_offloaded(), config_for("llama"))


def test_a_model_on_the_meta_device_is_a_shell_for_a_whole_state(tmp_path):
    trained = move(adapted("llama"))
    with torch.device("meta"):
        shell = build("llama").to("meta")
    shell = get_peft_model(shell, config_for("llama")).eval()
    assert all(tensor.is_meta for tensor in federa_layers(shell)["model.layers.0.mlp.down_proj"].state_dict().values())
    shell.load_state_dict(trained.state_dict(), assign=True)
    for name, module in shell.named_modules():
        if "rotary_emb" in name:  # not part of a state dict
            module.inv_freq = trained.get_submodule(name).inv_freq
    assert torch.equal(logits(shell), logits(trained))


def test_a_saved_adapter_needs_a_base_to_take_its_start_out_of(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="The base weights are on the meta device, so the residual .* cannot be written"
    ):
        load_federa(build("llama").to("meta"), tmp_path, torch_device="cpu")
