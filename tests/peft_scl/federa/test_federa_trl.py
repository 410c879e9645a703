# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A few steps with TRL's trainers that people use with `peft_config=`."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from helpers.data import ALL_ROWS, sums_with_answers
from helpers.federa_reference import both_modes
from helpers.models import logits_of_text
from peft_scl import FederaConfig


modes = pytest.mark.parametrize("keep_base", both_modes.values(), ids=both_modes)


def _config(keep_base):
    return FederaConfig(r=4, target_modules=["q_proj", "down_proj"], keep_base=keep_base, task_type="CAUSAL_LM")


def _losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@modes
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft(keep_base, gradient_checkpointing, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = SFTTrainer(
        str(tiny_model_dir),
        args=SFTConfig(str(tmp_path / "run"), gradient_checkpointing=gradient_checkpointing, **ALL_ROWS),
        train_dataset=Dataset.from_dict({"text": [f"What is {n} plus 1? {n + 1}" for n in range(8)]}),
        processing_class=tokenizer,
        peft_config=_config(keep_base),
    )
    losses = _losses(trainer)
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")
    restored = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of_text(restored, tokenizer), logits_of_text(trainer.model, tokenizer), rtol=1e-4, atol=1e-5
    )


def test_sft_on_a_4_bit_base_starts_at_the_base_model(tiny_model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=quantization_config)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = SFTTrainer(
        load(),
        args=SFTConfig(str(tmp_path / "run"), **ALL_ROWS),
        train_dataset=Dataset.from_dict({"text": [f"What is {n} plus 1? {n + 1}" for n in range(8)]}),
        processing_class=tokenizer,
        peft_config=_config(True),
    )
    # TRL's choice for quantised bases; the start stays in float32
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    tokens = tokenizer(["What is 3 plus 1? 4"], return_tensors="pt")
    with torch.no_grad():  # in train mode: in eval mode, bitsandbytes repacks 4-bit layers on some CPUs
        assert torch.equal(trainer.model.train()(**tokens).logits, load().train()(**tokens).logits)
    losses = _losses(trainer)
    assert losses[-1] < losses[0]


@modes
def test_dpo_refers_to_the_original_model(keep_base, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    args = DPOConfig(str(tmp_path / "run"), precompute_ref_log_probs=False, **ALL_ROWS)
    trainer = DPOTrainer(
        str(tiny_model_dir),
        args=args,
        train_dataset=sums_with_answers(),
        processing_class=tokenizer,
        peft_config=_config(keep_base),
    )
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference
    assert losses[-1] < losses[0]
    original = logits_of_text(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tokenizer)
    assert not torch.allclose(logits_of_text(trainer.model, tokenizer), original, rtol=1e-2)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(logits_of_text(trainer.model, tokenizer), original, rtol=1e-4, atol=1e-5)


def test_dpo_on_a_trained_adapter_refers_to_it_as_it_was(tiny_model_dir, tmp_path):
    """TRL adds a second adapter for that, which a residual base cannot have."""

    def trainer(keep_base):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), _config(keep_base))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05
        return DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / "run"), precompute_ref_log_probs=False, **ALL_ROWS),
            train_dataset=sums_with_answers(),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )

    losses = _losses(trainer(True))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="Use `keep_base=True` for a model with several FeDeRA adapters"):
        trainer(False)
