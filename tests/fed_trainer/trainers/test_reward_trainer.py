# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federated reward models: the head travels with the adapter, and one client is the stock trainer."""

import logging
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from fed_trainer.federation.sampling import client_seed
from helpers.comparison import same, weights_in
from helpers.data import preferences_of
from helpers.local_rounds import local_round
from helpers.runs import Dies
from helpers.trainers import QUICK_TEXT
from peft_scl import SclConfig


LOCAL = {**QUICK_TEXT, "max_steps": 3, "max_length": 48}
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"),
    "scl": SclConfig(r=4, task_type="SEQ_CLS"),
}
each_adapter = pytest.mark.parametrize("peft_config", ADAPTERS.values(), ids=ADAPTERS)


@pytest.fixture(scope="module")
def clients(make_clients):
    """Three, of which one has more pairs."""
    rows = make_clients(num_clients=3)
    return preferences_of(rows) | preferences_of({"client_0": rows["client_0"]}, 12)


@pytest.fixture
def make_trainer(make_trainer, clients):
    return partial(make_trainer, kind="reward", adapter=None, clients=clients, **LOCAL)


@pytest.mark.fast("lora")
@each_adapter
def test_rounds_are_stock_trainers_averaged_in_float64(make_trainer, clients, tiny_model_dir, tmp_path, peft_config):
    trainer = make_trainer(peft_config=peft_config)
    state = trainer._live_adapter.read(include_frozen=True)
    assert "base_model.model.score.weight" in trainer.federation.state
    trainer.train()
    for entry in trainer.record["rounds"]:
        mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
        for name, rows in clients.items():
            args = RewardConfig(
                output_dir=str(tmp_path / "stock"),
                bf16=False,
                save_strategy="no",
                lr_scheduler_type="constant",
                **LOCAL,
            )
            base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
            stock = RewardTrainer(model=get_peft_model(base, peft_config), args=args, train_dataset=rows)
            set_peft_model_state_dict(stock.model, {key: tensor.clone() for key, tensor in state.items()})
            set_seed(client_seed(42, entry["round"], name))
            assert (
                stock.train().training_loss == entry["clients"][name]["train_loss"]
            )  # from the same start the same bits
            after = get_peft_model_state_dict(stock.model)
            for key in mean:
                mean[key] += len(rows) / 28 * after[key].double()
        saved = weights_in(tmp_path / "out" / f"checkpoint-{entry['round']}")
        for key in mean:
            torch.testing.assert_close(saved[key], mean[key].float(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(saved["base_model.model.score.weight"], state["base_model.model.score.weight"])
        state = saved


@each_adapter
def test_the_first_local_round_is_the_stock_trainer_bit_for_bit(
    make_trainer, clients, tiny_model_dir, tmp_path, peft_config
):
    one = {"client_0": clients["client_0"]}
    trainer = make_trainer(clients=one, peft_config=peft_config)
    seed = client_seed(42, 1, "client_0")
    prepared = trainer.client.data.prepared("client_0")
    local, _ = local_round(trainer, trainer.federation.state, prepared, seed=seed)

    args = RewardConfig(
        output_dir=str(tmp_path / "stock"), bf16=False, save_strategy="no", lr_scheduler_type="constant", **LOCAL
    )
    stock = RewardTrainer(str(tiny_model_dir), args=args, train_dataset=one["client_0"], peft_config=peft_config)
    set_seed(seed)
    stock.train()
    after = get_peft_model_state_dict(stock.model)
    assert all(torch.equal(local[key], after[key]) for key in local)


@pytest.mark.fast("scl")
@pytest.mark.parametrize("peft_config", [*ADAPTERS.values(), None], ids=[*ADAPTERS, "full"])
def test_a_run_that_died_resumes_to_the_same_model(make_trainer, clients, tmp_path, peft_config):
    settings = {"peft_config": peft_config, "num_rounds": 3, "learning_rate": 1e-3, "clients_per_round": 2}
    settings["eval_dataset"] = clients["client_2"]
    whole = make_trainer("whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", callbacks=[Dies()], **settings).train()
    again = make_trainer("died", **settings)
    again.train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    figures = [[entry["eval"]["eval_accuracy"] for entry in t.record["rounds"]] for t in (whole, again)]
    assert figures[0] == figures[1]


@each_adapter
def test_the_published_folder_gives_the_rewards_of_the_live_model(make_trainer, tiny_model_dir, tmp_path, peft_config):
    trainer = make_trainer(peft_config=peft_config, num_rounds=1)
    trainer.train()
    set_seed(1)  # another random head
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokens = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_messages_whole_texts_and_margins(make_trainer, clients):
    def messages(row):
        chosen, rejected = ([{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected"))
        return {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": chosen, "rejected": rejected}

    def whole(row):
        return {**{key: row["prompt"] + row[key] for key in ("chosen", "rejected")}, "margin": 0.5}

    for name, convert, removed in (("messages", messages, []), ("whole", whole, ["prompt"])):
        data = {client: rows.map(convert, remove_columns=removed) for client, rows in clients.items()}
        trainer = make_trainer(name, clients=data, peft_config=ADAPTERS["lora"], num_rounds=1)
        trainer.train()
        assert trainer.record["rounds"][0]["clients"].keys() == clients.keys()


def test_a_head_of_its_own_for_every_client(make_trainer, clients):
    trainer = make_trainer(
        peft_config=ADAPTERS["lora"],
        tensor_roles={"local": ["score"]},
        local_objective="fedprox",
        local_objective_kwargs={"mu": 0.1},
        eval_dataset=clients,
    )
    trainer.train()
    figures = [entry["eval_loss"] for entry in trainer.record["rounds"][-1]["client_eval"].values()]
    assert len(set(figures)) == 3
    head = "base_model.model.score.weight"
    assert len({tuple(trainer.client_state(client)[head].flatten().tolist()) for client in clients}) == 3


LORA = {"r": 4, "target_modules": ["q_proj"]}
SAVES_NO_HEAD = {
    "no task": LoraConfig(**LORA),
    "LoRA on the head": LoraConfig(r=4, target_modules=["q_proj", "score"]),
}


@pytest.mark.parametrize("config", SAVES_NO_HEAD.values(), ids=SAVES_NO_HEAD)
def test_a_new_head_that_the_adapter_would_not_save_is_refused(make_trainer, tiny_model_dir, caplog, config):
    with pytest.raises(
        ValueError, match=r"`score` was not loaded .* Write `task_type='SEQ_CLS'`, or `modules_to_save"
    ):
        make_trainer(peft_config=config)

    # who passes the model has its head
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        make_trainer("passed", model=base, peft_config=config)
    assert "Keep the `LlamaForSequenceClassification` that was passed" in caplog.text


@pytest.mark.parametrize("config", [LoraConfig(**LORA, modules_to_save=["score"]), *ADAPTERS.values()])
def test_a_head_that_the_adapter_saves_is_taken(make_trainer, config):
    assert "base_model.model.score.weight" in make_trainer(peft_config=config).federation.state


def test_the_head_of_a_trained_reward_model_need_not_be_saved(make_trainer, tiny_model_dir, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    base.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "reward")
    trainer = make_trainer(model=str(tmp_path / "reward"), peft_config=LoraConfig(**LORA), num_rounds=1)
    trainer.train()
    assert torch.equal(trainer.model.get_base_model().score.weight, base.score.weight)


def test_adapters_of_other_tasks_are_refused_before_a_model_is_loaded(make_trainer):
    with pytest.raises(ValueError, match="`task_type='CAUSAL_LM'`, but a reward model is a sequence classifier"):
        make_trainer(model="there/is-none", peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))


def test_clients_without_pairs_are_refused(make_trainer, clients):
    other = Dataset.from_dict({"text": ["a"] * 8, "label": [0, 1] * 4})
    with pytest.raises(
        ValueError, match="Client 'client_1' has the columns .* `RewardTrainer` needs pairs of answers"
    ):
        make_trainer(clients={**clients, "client_1": other}, peft_config=ADAPTERS["lora"])
    with pytest.raises(ValueError, match="Held-out set 'eval_dataset' has the columns"):
        make_trainer(eval_dataset=other, peft_config=ADAPTERS["lora"])
