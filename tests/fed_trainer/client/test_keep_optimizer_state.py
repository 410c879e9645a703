# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients whose local optimiser goes on from round to round."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fed_trainer.output.record import read_record, write_json


STEPS = 2
LORA = {"r": 4, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


# every step sees all rows, so that their order does not matter
pytestmark = pytest.mark.trainer(
    adapter=LORA,
    num_clients=2,
    rows=8,
    num_rounds=3,
    max_steps=STEPS,
    per_device_train_batch_size=8,
    weight_decay=0.1,
    keep_optimizer_state=True,
)


def expected(trainer, keep):
    """FedAvg of two clients with an AdamW each, written out: the final adapter by parameter name."""
    base = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    model = get_peft_model(base, LoraConfig(**LORA)).train()
    model.load_state_dict(trainer.model.state_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = [trainer.data_collator(list(trainer.client.data.prepared(client))) for client in trainer._clients]
    settings = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
    optimizers = [torch.optim.AdamW(trained.values(), **settings) for _ in batches]
    shared = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(trainer.args.num_rounds):
        results = []
        for index, batch in enumerate(batches):
            optimizer = optimizers[index] if keep else torch.optim.AdamW(trained.values(), **settings)
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(shared[name])
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(**batch, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), trainer.args.max_grad_norm)
                optimizer.step()
            results.append({name: p.detach().clone() for name, p in trained.items()})
        shared = {name: (results[0][name] + results[1][name]) / 2 for name in shared}
    return shared


@pytest.mark.parametrize("keep", [True, False])
def test_a_clients_optimiser_is_its_own_through_all_rounds(keep, make_trainer):
    trainer = make_trainer(keep_optimizer_state=keep)
    references = [expected(trainer, each) for each in (keep, not keep)]
    trainer.train()
    final = {name: p.detach() for name, p in trainer.model.named_parameters() if name in references[0]}
    for name, value in references[0].items():
        torch.testing.assert_close(final[name], value, atol=2e-5, rtol=1e-4)
    assert max(float((final[name] - value).abs().max()) for name, value in references[1].items()) > 1e-3


def test_it_is_kept_on_disk_and_a_resumed_run_ends_with_the_same_bits(make_trainer, tmp_path):
    make_trainer("whole").train()
    make_trainer("parts", num_rounds=1).train()
    make_trainer("parts").train(resume_from_checkpoint=True)
    for file in (
        "adapter_model.safetensors",
        ".fed_clients/client_0@3.safetensors",
        ".fed_clients/client_1@3.safetensors",
    ):
        whole, parts = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    kept = load_file(tmp_path / "whole/.fed_clients/client_0@3.safetensors")
    assert {key.partition(":")[0] for key in kept} == {"optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
    assert {float(value) for key, value in kept.items() if "step" in key} == {3.0 * STEPS}


def test_the_learning_rate_is_that_of_the_round(make_trainer):
    trainer = make_trainer(round_lr_scheduler_type="linear", num_rounds=2, lr_scheduler_type="linear")
    trainer.train()
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-2 / 2)


def test_a_personal_model_has_an_optimiser_of_its_own(make_trainer, tmp_path):
    make_trainer(local_objective="ditto", local_objective_kwargs={"mu": 0.1}, num_rounds=2).train()
    kept = load_file(tmp_path / "out/.fed_clients/client_0@2.safetensors")
    of_a_tensor = [key.partition("/")[2] for key in kept if key.startswith("optimizer/exp_avg:")]
    assert of_a_tensor
    for key in of_a_tensor:
        assert not torch.equal(kept[f"optimizer/{key}"], kept[f"personal_optimizer/{key}"])


def test_tensors_that_are_not_trained_in_a_round_keep_their_moments(make_trainer, tmp_path):
    """RoLoRA trains B and A in turns: both have been trained for one round after two."""
    make_trainer(aggregation="rolora", num_rounds=2).train()
    kept = load_file(tmp_path / "out/.fed_clients/client_0@2.safetensors")
    assert {key.rpartition("lora_")[2][0] for key in kept} == {"A", "B"}
    assert {float(value) for key, value in kept.items() if "step" in key} == {float(STEPS)}


def test_a_number_goes_on_as_a_number(make_trainer, tmp_path):
    """Adafactor counts its steps in a Python integer."""
    trainer = make_trainer(optim="adafactor", num_rounds=2)
    trainer.train()
    assert {type(state["step"]) for state in trainer.optimizer.state.values()} == {int}
    kept = load_file(tmp_path / "out/.fed_clients/client_0@2.safetensors")
    steps = [value for key, value in kept.items() if "/step:" in key]
    assert {(value.dtype, int(value)) for value in steps} == {(torch.int64, 2 * STEPS)}


class CountsInItsGroup(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class RemembersText(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["note"] = "text"
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [(CountsInItsGroup, "counts in its parameter groups too"), (RemembersText, "remembers 'note' as a str")],
)
def test_an_optimiser_that_remembers_something_else_is_refused(optimizer, message, make_trainer):
    trainer = make_trainer()
    trainer.optimizer_cls_and_kwargs = (optimizer, {"lr": 0.1})
    with pytest.raises(NotImplementedError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "fednova", "optim": "sgd"},
        {"aggregation": "flora"},
        {"aggregation": "flexlora"},
        {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1}},
    ],
)
def test_methods_that_need_a_fresh_optimiser_refuse_it(settings, make_trainer):
    with pytest.raises(ValueError, match="`keep_optimizer_state=True` with"):
        make_trainer(**settings)


def test_a_run_is_not_resumed_with_another_setting(make_trainer):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match="keep_optimizer_state: True there, False here"):
        make_trainer(keep_optimizer_state=False).train(resume_from_checkpoint=True)


def test_a_run_of_before_the_setting_goes_on_without_it(make_trainer, tmp_path):
    make_trainer(num_rounds=1, keep_optimizer_state=False).train()
    checkpoint = tmp_path / "out/checkpoint-1"
    record = read_record(checkpoint)
    del record["federation"]["keep_optimizer_state"]
    write_json(checkpoint / "federation.json", record)
    digests = json.loads((checkpoint / "digests.json").read_text())
    digests["federation.json"] = hashlib.sha256((checkpoint / "federation.json").read_bytes()).hexdigest()
    write_json(checkpoint / "digests.json", digests)
    trainer = make_trainer(keep_optimizer_state=False)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.record["rounds"]) == 3
