# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A client whose data is broken, whichever it is and however: it is named and left out, and the others never notice.
"""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fed_trainer import FederatedConfig, FederatedTaskConfig, FederatedTaskTrainer, FederatedTrainer
from fed_trainer.client.loss_probe import states_its_loss
from fed_trainer.federation.validation import TooFewClientsError
from fed_trainer.trainers.first_look import telling_row
from helpers.models import tiny_bert
from helpers.trainers import QUICK


ROWS = 4
GOOD = ("client_c", "client_x")
PLACES = {"first": "client_a", "middle": "client_m", "last": "client_z"}
LOCAL = {
    **QUICK,
    "num_rounds": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_on_start": False,
    "logging_nan_inf_filter": False,
}
LONG = "word " * 200


def texts(number):
    return [f"What is {row} plus {number}?" for row in range(ROWS)]


def prompts(number, kind=None):
    last = {None: texts(number)[-1], "none": None}.get(kind, LONG)
    prompts = [LONG] * ROWS if kind == "too long" else [*texts(number)[:-1], last]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {row + number}" for row in range(ROWS)]})


def tokens(number, kind=None):
    rows = [[5 + row, 6 + number, 7] for row in range(ROWS)]
    labels = [[-100] * 3] * ROWS if kind == "no label" else rows
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def preferences(number, kind=None):
    chosen = [f"{text} {number + row}" for row, text in enumerate(texts(number))]
    chosen = [LONG] * ROWS if kind == "too long" else [*chosen[:-1], None] if kind == "none" else chosen
    return Dataset.from_dict({"chosen": chosen, "rejected": [f"{text} no" for text in texts(number)]})


def classes(number, kind=None):
    labels = [(row + number) % 3 for row in range(ROWS)]
    labels = {
        "none": [*labels[:-1], None],
        "no label": [-100] * ROWS,
        "labels of another kind": [float(label) for label in labels],
    }.get(kind, labels)
    return Dataset.from_dict({"input_ids": [[row % 3, 5 + number, 6, 7] for row in range(ROWS)], "label": labels})


DATA = {
    "sft": (prompts, ("none", "too long")),
    "sft on tokens": (tokens, ("no label",)),
    "dpo": (preferences, ("none",)),
    "reward": (preferences, ("none", "too long")),
    "task": (classes, ("none", "no label", "labels of another kind")),
}
KINDS = [(trainer, kind) for trainer, (_, kinds) in DATA.items() for kind in kinds]


@pytest.fixture
def make_trainer(make_trainer):
    def make(name, clients, output="out", **settings):
        kind = name.split()[0]  # of "sft on tokens"
        adapter = {"r": 2, "lora_dropout": 0.1, "target_modules": ["query" if kind == "task" else "v_proj"]}
        return make_trainer(output, kind=kind, clients=clients, adapter=adapter, **LOCAL | settings)

    return make


def good(trainer):
    return {client: DATA[trainer][0](number) for number, client in enumerate(GOOD)}


@pytest.fixture(scope="module")
def without():
    """What the healthy clients arrive at alone, by trainer."""
    return {}


def result(trainer):
    figures = trainer.record["rounds"][0]["clients"]
    losses = {client: (entry["train_loss"], entry["num_steps"]) for client, entry in figures.items()}
    return trainer.federation.state, losses


@pytest.mark.fast(place=["first"], name=["sft"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_broken_client_is_named_and_left_out_and_the_others_do_not_notice(make_trainer, without, name, kind, place):
    if name not in without:
        alone = make_trainer(name, good(name), "alone")
        alone.train()
        without[name] = result(alone)
    bad = PLACES[place]
    trainer = make_trainer(name, {**good(name), bad: DATA[name][0](2, kind)})
    trainer.train()
    refused = trainer.record["rounds"][0]["refused"]
    assert list(refused) == [bad] and refused[bad]
    state, losses = result(trainer)
    expected_state, expected_losses = without[name]
    assert losses == expected_losses and list(losses) == list(GOOD)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected_state.items())
    assert all(torch.equal(trainer._live_adapter.read()[key], tensor) for key, tensor in expected_state.items())


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_run_of_broken_clients_ends_with_the_reasons(make_trainer, name, kind):
    clients = {client: DATA[name][0](number, kind) for number, client in enumerate(GOOD)}
    with pytest.raises(TooFewClientsError, match=r"'client_c': .*'client_x': "):
        make_trainer(name, clients).train()


def test_a_client_that_could_not_be_prepared_at_first_is_tried_again_in_its_turn(make_trainer, without, monkeypatch):
    prepare, failed = FederatedTrainer._prepare_client_dataset, []

    def fails_once(self, dataset, client):
        if client == "client_a" and not failed:
            failed.append(client)
            raise OSError("the disk was busy")
        return prepare(self, dataset, client)

    clients = {"client_a": prompts(2), **good("sft")}
    healthy = make_trainer("sft", clients, "healthy")
    healthy.train()
    monkeypatch.setattr(FederatedTrainer, "_prepare_client_dataset", fails_once)
    trainer = make_trainer("sft", clients)
    assert failed and list(trainer.client.data._prepared) == ["client_c"]
    trainer.train()
    assert trainer.record["rounds"][0]["refused"] == {}
    assert result(trainer)[1] == result(healthy)[1]
    assert all(torch.equal(result(trainer)[0][key], tensor) for key, tensor in result(healthy)[0].items())


# The row that a trainer is made with


def message(text):
    return [{"role": "user", "content": text}]


def damaged(rows):
    raise OSError("cannot identify image file")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"text": [None, None, "b"]}, {"text": "b"}),
        ({"messages": [None, [], message("b")]}, {"messages": message("b")}),
        ({"prompt": ["", "a"], "completion": [None, "b"]}, {"prompt": "a", "completion": "b"}),
        ({"prompt": [""], "completion": ["b"], "tools": [None]}, {"prompt": "", "completion": "b", "tools": None}),
        ({"chosen": ["a", "b"], "rejected": [None, "c"]}, {"chosen": "b", "rejected": "c"}),
        ({"text": [None] * 250 + ["b"]}, {"text": "b"}),
        ({"pixels": [None, 1.0]}, {"pixels": None}),
        ({"text": [None, None]}, {"text": None}),
    ],
)
@pytest.mark.parametrize("broken", [[], ["a"], ["a", "b"]])
def test_a_trainer_is_made_with_a_row_that_tells_its_format(rows, told, broken):
    clients = {name: Dataset.from_dict(rows).with_transform(damaged) for name in broken}
    clients["c"] = Dataset.from_dict(rows)
    assert telling_row(clients, "text")[:] == {name: [value] for name, value in told.items()}


def test_no_trainer_is_made_without_a_row_that_can_be_read():
    clients = {name: Dataset.from_dict({"text": ["a"]}).with_transform(damaged) for name in "ab"}
    with pytest.raises(TooFewClientsError, match="None of the 2 clients has a row that can be read"):
        telling_row(clients)


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def test_whether_data_is_a_conversation_is_not_for_a_broken_row_to_say(tiny_model_dir, tmp_path):
    def talks(kind=None):
        turns = [[*message("a"), {"role": "assistant", "content": "b"}] for _ in range(ROWS)]
        return Dataset.from_dict({"messages": [None if kind else turns[0], *turns[1:]]})

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATE
    args = FederatedConfig(output_dir=str(tmp_path), assistant_only_loss=True, **LOCAL)
    clients = {"client_a": talks("none"), "client_c": talks()}
    trainer = FederatedTrainer(str(tiny_model_dir), args, clients, processing_class=tokenizer)
    assert list(trainer.client.data._prepared) == ["client_c"]


def test_clients_with_other_columns_are_refused_with_a_formatting_function_too(tiny_model_dir, tmp_path):
    clients = {"a": prompts(0), "b": prompts(1).rename_column("completion", "answer")}
    args = FederatedConfig(output_dir=str(tmp_path), **LOCAL)
    with pytest.raises(ValueError, match="Client 'b' has the columns .*'answer'.* Give all clients the same columns"):
        FederatedTrainer(str(tiny_model_dir), args, clients, formatting_func=lambda row: row["prompt"])


# What a model learns of its inputs


def test_the_frequencies_of_a_dynamic_rope_do_not_follow_the_sequences_of_another_client(tmp_path):
    """Sequences beyond the length of the pretraining stretch them for all shorter ones that come later."""

    def trained(output, clients):
        torch.manual_seed(0)
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 8, "initializer_range": 1.0}  # attends to places
        config = LlamaConfig(**sizes, rope_parameters=rope)
        data = {
            name: Dataset.from_dict({"input_ids": [list(range(length))] * 4, "labels": [list(range(length))] * 4})
            for name, length in clients.items()
        }
        args = FederatedTaskConfig(
            output_dir=str(tmp_path / output), num_rounds=1, max_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = FederatedTaskTrainer(
            LlamaForCausalLM(config),
            args,
            data,
            eval_dataset=data,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        (round,) = trainer.record["rounds"]
        return {name: entry["train_loss"] for name, entry in round["clients"].items()}, trainer.record["start"]

    losses, start = trained("both", {"a": 24, "b": 12})
    alone, start_alone = trained("alone", {"b": 12})
    assert losses["b"] == alone["b"] and losses["a"] != losses["b"]
    long = trained("long", {"a": 24})[1]
    expected = (long["eval"]["eval_loss"] + start_alone["eval"]["eval_loss"]) / 2
    assert start["eval"]["eval_loss"] == pytest.approx(expected, rel=1e-6)


# What the loss is divided by


class Counting(BertForSequenceClassification):
    """Divides by the count that it is given, which its signature does not show."""

    def forward(self, input_ids=None, labels=None, **inputs):
        count = inputs.pop("num_items_in_batch", None)
        output = super().forward(input_ids, labels=labels, **inputs)
        if count is not None and output.loss is not None:
            output.loss = output.loss * len(labels) / count
        return output


class Stating(Counting):
    accepts_loss_kwargs = True


class Naming(Counting):
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        return super().forward(input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **inputs)


def random_state():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("kinds", [(), ("none",), ("no label",), ("labels of another kind", "no label", "none")])
def test_the_loss_is_looked_at_where_it_can_tell_and_without_a_trace(tmp_path, counts, kinds):
    clients = {f"client_{place}": classes(place, kind) for place, kind in enumerate([*kinds, None])}
    mixed = clients[f"client_{len(kinds)}"]
    labels = [-100, -100, *mixed["label"][2:]]  # the first batch of the last client cannot tell either
    clients[f"client_{len(kinds)}"] = Dataset.from_dict({"input_ids": mixed["input_ids"][:], "label": labels})
    model = tiny_bert()
    if counts:
        model.__class__ = Counting
    trainer = FederatedTaskTrainer(model, FederatedTaskConfig(str(tmp_path), **LOCAL), clients)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: torch.rand(1).item() + random.random() + np.random.rand() and collate(rows)
    model.train()
    model.bert.encoder.eval()  # as a user who freezes its dropout
    modes = [module.training for module in model.modules()]
    before = random_state()
    trainer._build_engine()
    assert trainer.model_accepts_loss_kwargs is counts
    assert [module.training for module in model.modules()] == modes
    assert random_state() == before
    assert model.config.problem_type is None


def test_what_no_client_can_tell_is_said(tmp_path, caplog):
    clients = {client: classes(0, "no label") for client in GOOD}
    trainer = FederatedTaskTrainer(tiny_bert(), FederatedTaskConfig(str(tmp_path), **LOCAL), clients)
    trainer._build_engine()
    assert trainer.model_accepts_loss_kwargs is True
    assert "what it is divided by is not known" in caplog.text


@pytest.mark.parametrize(("kind", "states"), [(Counting, False), (Stating, True), (Naming, True)])
def test_a_model_that_states_its_loss_is_believed(tmp_path, kind, states):
    model = tiny_bert()
    model.__class__ = kind
    trainer = FederatedTaskTrainer(model, FederatedTaskConfig(str(tmp_path), **LOCAL), good("task"))
    assert states_its_loss(model) is states
    assert trainer._asks_the_loss is not states
    trainer._loss_depends_on_count = lambda batch: False  # asked or not
    trainer._build_engine()
    assert trainer.model_accepts_loss_kwargs is states
