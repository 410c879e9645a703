# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federations on a 4-bit base (QLoRA): the base stays, only the adapter travels."""

import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fed_trainer import FederatedDPOConfig, FederatedDPOTrainer, FederatedRewardConfig, FederatedRewardTrainer
from fed_trainer.client.live.base_model import keep_differentiable
from helpers.comparison import same, weights_in
from helpers.runs import Dies
from helpers.trainers import QUICK_TEXT
from peft_scl import FederaConfig, SclConfig


has_avx512bf16 = pytest.importorskip("bitsandbytes.functional").has_avx512bf16

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "scl": SclConfig(r=4, task_type="CAUSAL_LM"),
    "federa": FederaConfig(**LORA, keep_base=True),
}
each_adapter = pytest.mark.parametrize("peft_config", ADAPTERS.values(), ids=ADAPTERS)


@pytest.fixture(scope="module")
def base_dir(tiny_model_dir, tmp_path_factory):
    """A Llama whose widths are multiples of the blocks of 64 of 4-bit quantisation, unquantised."""
    folder = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    config = AutoConfig.from_pretrained(tiny_model_dir, hidden_size=64, intermediate_size=128, head_dim=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_trainer(make_trainer, base_dir):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return partial(make_trainer, model=base_dir, num_clients=2, eval_rows=16, quantization_config=quantization)


@torch.no_grad()
def base_logits(trainer):
    with trainer.model.disable_adapter():
        return trainer.model.eval()(torch.arange(4, 20).unsqueeze(0)).logits


@each_adapter
def test_the_4_bit_base_stays_and_the_adapter_learns(make_trainer, base_dir, tmp_path, peft_config):
    trainer = make_trainer("out", peft_config)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    before = base_logits(trainer)
    trainer.train()
    assert torch.equal(base_logits(trainer), before)
    evaluations = [trainer.record["start"]["eval"], *(entry["eval"] for entry in trainer.record["rounds"])]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "out")
    tokens = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        expected, logits = (model.eval()(tokens).logits.float() for model in (trainer.model, plain))
    # up to the rounding of the base
    assert (logits - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.fast("lora")
@each_adapter
def test_a_run_on_a_4_bit_base_that_died_resumes_to_the_same_adapter(make_trainer, tmp_path, peft_config):
    whole = make_trainer("whole", peft_config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", peft_config, callbacks=[Dies()]).train()
    again = make_trainer("died", peft_config)
    again.train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    assert [entry["eval"]["eval_loss"] for entry in whole.record["rounds"]] == [
        entry["eval"]["eval_loss"] for entry in again.record["rounds"]
    ]


@pytest.mark.fast("scl")
@each_adapter
def test_evaluations_between_the_rounds_do_not_touch_what_is_trained(make_trainer, tmp_path, peft_config):
    """
    bitsandbytes repacks the base in the first evaluation on some CPUs, after which no gradient passed through it.
    """
    for output, evaluates in (("with", True), ("without", False)):
        make_trainer(output, peft_config, eval_rows=16 if evaluates else 0).train()
    assert same(weights_in(tmp_path / "with"), weights_in(tmp_path / "without"))


@pytest.mark.parametrize("reference", ["initial", "round"])
def test_the_reference_of_dpo_on_a_4_bit_base_is_the_policy_itself_at_the_start(
    make_clients, base_dir, tmp_path, reference
):
    pairs = make_clients(num_clients=1)["client_0"].rename_columns({"completion": "chosen", "topic": "rejected"})
    trainer = FederatedDPOTrainer(
        model=str(base_dir),
        args=FederatedDPOConfig(output_dir=str(tmp_path), reference=reference, num_rounds=1, **QUICK_TEXT),
        train_dataset={"client_0": pairs},
        eval_dataset=pairs,
        peft_config=LoraConfig(**LORA, init_lora_weights=False),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    trainer.train()
    assert trainer.record["start"]["eval"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.record["rounds"][0]["eval"]["eval_loss"] < 0.69


def test_a_reward_model_on_a_4_bit_base_and_its_head(make_clients, base_dir, tmp_path):
    pairs = make_clients(num_clients=1)["client_0"].rename_columns({"completion": "chosen", "topic": "rejected"})
    trainer = FederatedRewardTrainer(
        model=str(base_dir),
        args=FederatedRewardConfig(
            output_dir=str(tmp_path), num_rounds=2, model_init_kwargs={"dtype": "bfloat16"}, **QUICK_TEXT
        ),
        train_dataset={"client_0": pairs},
        eval_dataset=pairs,
        peft_config=LoraConfig(**{**LORA, "task_type": "SEQ_CLS"}),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    start = trainer.federation.state
    trainer.train()
    assert trainer.record["rounds"][-1]["eval"]["eval_loss"] < trainer.record["start"]["eval"]["eval_loss"]
    head = "base_model.model.score.weight"
    assert not torch.equal(weights_in(tmp_path)[head], start[head])


def test_federa_on_a_4_bit_base_needs_the_base_kept(make_trainer):
    with pytest.raises(ValueError, match="keep_base=True"):
        make_trainer("out", FederaConfig(**LORA))


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
def test_a_base_that_has_been_repacked_is_refused(base_dir):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config)
    with torch.no_grad():
        base.eval()(torch.arange(4, 20).unsqueeze(0))
    with pytest.raises(ValueError, match="have been repacked for inference by an evaluation on the CPU"):
        keep_differentiable(base)


@pytest.mark.parametrize(
    ("aggregation", "options"),
    [("fedex_lora", None), ("flora", None), ("slora", {"sparse_rounds": 1})],
)
def test_rules_that_change_the_base_are_refused_on_one_of_4_bit(make_trainer, aggregation, options):
    with pytest.raises(ValueError, match="quantised"):
        make_trainer("out", ADAPTERS["lora"], aggregation=aggregation, aggregation_kwargs=options)
