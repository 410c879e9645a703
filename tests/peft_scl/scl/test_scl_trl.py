# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A few steps with each of TRL's trainers that people use with `peft_config=`."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from helpers.data import ALL_ROWS, sums_with_answers
from helpers.models import logits_of_text
from peft_scl import SclConfig


CONFIGS = {
    "bottleneck": {"r": 4, "variant": "bottleneck"},
    "gelu": {"r": 4, "variant": "bottleneck", "activation": "gelu", "scl_bias": True},
    "compress": {"r": 4, "variant": "compress"},
    "replace": {"r": 4, "variant": "compress", "keep_residual": False},
}


@pytest.fixture(params=CONFIGS)
def peft_config(request):
    return SclConfig(**CONFIGS[request.param])


def _train(trainer, trained=(".scl_",)):
    """Train; exactly the parameters with one of `trained` in their names change, and the loss falls."""
    before = {key: parameter.detach().clone() for key, parameter in trainer.model.named_parameters()}
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert result.global_step == 3
    assert losses[-1] < losses[0]
    for key, parameter in trainer.model.named_parameters():
        is_trained = any(part in key for part in trained) and ".scl_start_" not in key
        assert torch.equal(parameter, before[key]) != is_trained, key
    return before


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft(peft_config, gradient_checkpointing, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = SFTTrainer(
        str(tiny_model_dir),
        args=SFTConfig(str(tmp_path / "run"), gradient_checkpointing=gradient_checkpointing, **ALL_ROWS),
        train_dataset=Dataset.from_dict({"text": [f"What is {n} plus 1? {n + 1}" for n in range(8)]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    assert not trainer.model.base_model._calls_checked
    _train(trainer)
    assert trainer.model.base_model._calls_checked  # the first step checked that the adapted modules are called
    trainer.save_model(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    restored = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of_text(restored, tokenizer), logits_of_text(trainer.model, tokenizer))


def test_sft_on_a_4_bit_base(peft_config, tiny_model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=quantization_config),
        args=SFTConfig(str(tmp_path / "run"), **ALL_ROWS),
        train_dataset=Dataset.from_dict({"text": [f"What is {n} plus 1? {n + 1}" for n in range(8)]}),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=peft_config,
    )
    # TRL's choice for quantised bases
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    _train(trainer)


def test_dpo_refers_to_the_base_model(peft_config, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    args = DPOConfig(str(tmp_path / "run"), precompute_ref_log_probs=False, **ALL_ROWS)
    trainer = DPOTrainer(
        str(tiny_model_dir),
        args=args,
        train_dataset=sums_with_answers(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    seen = []
    trainer.model.get_base_model().register_forward_hook(
        lambda module, args, kwargs, output: seen.append((torch.is_grad_enabled(), kwargs, output)), with_kwargs=True
    )
    _train(trainer)
    seen.clear()
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    # two forwards: of the policy with its adapter, and without gradients of the reference
    (policy,) = (output for grad, _, output in seen if grad)
    ((kwargs, output),) = ((kwargs, output) for grad, kwargs, output in seen if not grad)
    with torch.no_grad():
        logits = reference(input_ids=kwargs["input_ids"], attention_mask=kwargs["attention_mask"]).logits
    labels = kwargs["labels"][:, 1:]
    expected = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    counted = labels != -100
    torch.testing.assert_close(output["log_probs"][:, : counted.shape[1]][counted], expected[counted])
    assert not torch.allclose(policy["log_probs"], output["log_probs"])

    trainer.save_model(tmp_path / "adapter")
    restored = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert torch.equal(logits_of_text(restored, tokenizer), logits_of_text(trainer.model, tokenizer))


def test_reward(peft_config, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    peft_config.modules_to_save = ["score"]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    base.save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(
        base,
        args=RewardConfig(str(tmp_path / "run"), **ALL_ROWS),
        train_dataset=sums_with_answers(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    _train(trainer, trained=(".scl_", "score.modules_to_save.default"))
    trainer.save_model(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    restored = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of_text(restored, tokenizer), logits_of_text(trainer.model, tokenizer))
