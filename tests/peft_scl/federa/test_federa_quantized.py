# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised base models, which keep their weights."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.federa_reference import dense_start, factors, federa_layers
from helpers.models import TOKENS, move
from helpers.quantization import INPUT_ERROR, QUANTIZATIONS, quantized_logits
from peft_scl import FederaConfig, load_federa


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTIZATIONS)
def backend(request):
    return request.param


@pytest.fixture
def load(base_dir, backend):
    return lambda: LlamaForCausalLM.from_pretrained(base_dir, quantization_config=QUANTIZATIONS[backend]())


def _config(**values):
    return FederaConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "keep_base": True, **values}
    )


def test_a_residual_is_refused(load, backend):
    with pytest.raises(ValueError, match=f"quantised by {backend}: quantising again .* Set `keep_base=True`"):
        get_peft_model(load(), _config(keep_base=False))


def test_the_start_is_that_of_the_dequantised_weight(load):
    model = get_peft_model(load(), _config())
    for layer in federa_layers(model).values():
        start_B, start_A = dense_start(layer.get_base_weight().double(), 4, 2.0)
        found = factors(layer)
        torch.testing.assert_close(found["B0"], start_B, rtol=2**-7, atol=1e-4)  # representable in bfloat16
        torch.testing.assert_close(found["A0"], start_A, rtol=2**-7, atol=1e-4)
        assert torch.equal(found["A"], found["A"].bfloat16().double())
    assert torch.equal(quantized_logits(model), quantized_logits(load()))
    for parameter in model.parameters():  # TRL's choice for quantised bases
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(quantized_logits(model), quantized_logits(load()))


def test_the_forward_is_that_of_the_changed_weight(load, backend):
    model = move(get_peft_model(load(), _config())).train()
    for layer in federa_layers(model).values():
        found = factors(layer)
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        change = 2 * (found["B"] @ found["A"] - found["B0"] @ found["A0"])
        expected = x.double() @ (layer.get_base_weight().double() + change).T
        error = (layer(x).double() - expected).abs().max() / expected.abs().max()
        assert error < INPUT_ERROR[backend]


def test_training_changes_the_factors_only_and_the_adapter_loads(load, tmp_path):
    prepare = partial(prepare_model_for_kbit_training, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(prepare(load()), _config()).train()
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            assert torch.equal(value, before[key]) == (".lora_start_" in key), key
    expected = quantized_logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(quantized_logits(load_federa(prepare(load()), tmp_path)), expected)
    stock = PeftModel.from_pretrained(prepare(load()), tmp_path)
    torch.testing.assert_close(quantized_logits(stock), expected, rtol=1e-2, atol=1e-2)


def test_merging_rounds_to_the_grid_and_is_undone_bit_for_bit(load, backend):
    model = move(get_peft_model(load(), _config()))
    separate = quantized_logits(model)
    before = {name: layer.get_base_weight().clone() for name, layer in federa_layers(model).items()}
    names = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match=f"FeDeRA into weights quantised by {backend} rounds the result"):
        model.merge_adapter()
    assert [name for name, _ in model.named_parameters()] == names  # what is kept to be put back is none
    for name, layer in federa_layers(model).items():
        exact = before[name].double() + layer.get_delta_weight("default").double()
        error = (layer.get_base_weight().double() - exact).abs().max()
        assert 0 < error < {"bnb 4bit": 0.2, "bnb 8bit": 0.01, "torchao": 0.01}[backend] * exact.abs().max()
    assert not torch.equal(quantized_logits(model), separate)
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_weight(), before[name]) for name, layer in federa_layers(model).items())
    assert torch.equal(quantized_logits(model), separate)
