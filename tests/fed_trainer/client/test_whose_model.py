# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever uses the live model says whose it is; by client it does what the base trainer does for one data set."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedRewardConfig,
    FederatedRewardTrainer,
    FederatedTrainer,
)
from fed_trainer.config import FederationArguments
from fed_trainer.trainers.mixin import FederatedMixin
from helpers.models import tiny_bert
from helpers.trainers import QUICK, QUIET


LOCAL = {**QUICK, "num_rounds": 1, "max_steps": 4, "learning_rate": 3e-2, "eval_on_start": False}
LORA = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
MODELS = {
    "shared": {},
    "local tensors": {"tensor_roles": {"local": ["classifier"]}},
    "ditto": {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}},
}
PERSONAL = [kind for kind in MODELS if kind != "shared"]


def rows_of(shift, number=8):
    """Of one length, so that the mean over batches is the mean over rows."""
    tokens = [[row % 2, 5 + row % 7, 7 + shift] for row in range(number)]
    return Dataset.from_dict({"input_ids": tokens, "labels": [(row + shift) % 2 for row in range(number)]})


CLIENTS = {"a": rows_of(0), "b": rows_of(1), "c": rows_of(0, 12)}
HELD_OUT = {client: rows.select(range(4)) for client, rows in CLIENTS.items()}
OTHER = rows_of(0).select(range(3, 7))


class Counts(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", dict(metrics)))

    def on_log(self, args, state, control, **kwargs):
        self.events.append(("log", None))

    def on_prediction_step(self, args, state, control, **kwargs):
        self.events.append(("step", None))


@pytest.fixture
def make_trainer(make_trainer):
    def make(kind="shared", output="out", held_out=HELD_OUT, **given):
        settings = {**LOCAL, **MODELS[kind], **given}
        model = tiny_bert(num_labels=2)
        return make_trainer(
            output, adapter=LORA, kind="task", model=model, clients=CLIENTS, eval_dataset=held_out, **settings
        )

    return make


@pytest.fixture
def trained(make_trainer):
    def make(kind, **settings):
        trainer = make_trainer(kind, **settings)
        trainer.train()
        return trainer

    return make


def model_of(state):
    model = get_peft_model(tiny_bert(num_labels=2), LoraConfig(**LORA))
    set_peft_model_state_dict(model, {key: tensor.clone() for key, tensor in state.items()})
    return model.eval()


@torch.no_grad()
def loss_of(state, rows):
    """From the formula, on a model made for it."""
    return model_of(state)(torch.tensor(rows["input_ids"][:]), labels=torch.tensor(rows["labels"][:])).loss.item()


def batch_of(trainer, rows):
    return trainer.data_collator([rows[index] for index in range(len(rows))])


DOORS = {
    "evaluate": lambda trainer, rows: trainer.evaluate(rows)["eval_loss"],
    "evaluate several": lambda trainer, rows: trainer.evaluate({"x": rows})["eval_x_loss"],
    "predict": lambda trainer, rows: trainer.predict(rows).metrics["test_loss"],
    "evaluation_loop": lambda trainer, rows: trainer.evaluation_loop(
        trainer.get_eval_dataloader(rows), "Evaluation"
    ).metrics["eval_loss"],
    "prediction_step": lambda trainer, rows: trainer.prediction_step(
        trainer.model.eval(), batch_of(trainer, rows), True
    )[0].item(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_door_leads_to_a_model_that_is_somebodys(trained, kind):
    trainer = trained(kind)
    for name, door in DOORS.items():
        if kind == "shared":
            assert door(trainer, OTHER) == pytest.approx(loss_of(trainer.federation.state, OTHER), abs=1e-6), name
        else:
            trainer.model.train()
            with pytest.raises(ValueError, match="Every client has a model of its own, so there is not one to"):
                door(trainer, OTHER)
            assert trainer.model.training or name == "prediction_step", name  # before anything was done
        for client in "ab":
            with trainer.client_model(client) as model:
                loss = door(trainer, OTHER)
                assert model is trainer.model
            assert loss == pytest.approx(loss_of(trainer.client_state(client), OTHER), abs=1e-6), (name, client)
    live = trainer._live_adapter.read()
    assert all(torch.equal(live[key], tensor) for key, tensor in trainer.federation.state.items())
    losses = {client: loss_of(trainer.client_state(client), OTHER) for client in "ab"}
    assert (losses["a"] != losses["b"]) == (kind != "shared")


@pytest.mark.parametrize("kind", MODELS)
def test_a_client_is_evaluated_by_its_name_with_its_model_on_its_data(trained, kind):
    seen = Counts()
    trainer = trained(kind, callbacks=[seen])
    expected = {client: loss_of(trainer.client_state(client), HELD_OUT[client]) for client in CLIENTS}
    before = len(trainer.state.log_history)
    seen.events.clear()
    mean = trainer.evaluate()
    assert {c: f["eval_loss"] for c, f in trainer.client_evaluation.items()} == pytest.approx(expected, abs=1e-6)
    assert mean["eval_loss"] == pytest.approx(sum(expected.values()) / 3, abs=1e-6)
    assert [event for event, _ in seen.events] == ["step"] * 3 + ["log", "evaluate"]
    assert len(trainer.state.log_history) == before + 1
    for client in CLIENTS:
        assert trainer.evaluate(client)["eval_loss"] == pytest.approx(expected[client], abs=1e-6)
        with trainer.client_model(client):
            assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[client], abs=1e-6)
            assert trainer.evaluate("b", metric_key_prefix="test")["test_loss"] == pytest.approx(
                loss_of(trainer.client_state(client), HELD_OUT["b"]), abs=1e-6
            )
        loader = trainer.get_eval_dataloader(client)
        assert torch.cat([batch["labels"] for batch in loader]).tolist() == HELD_OUT[client]["labels"][:]


@pytest.mark.parametrize("kind", PERSONAL)
def test_the_model_of_a_client_is_not_the_federations(trained, kind, tmp_path):
    trainer = trained(kind)
    inputs = {"input_ids": torch.tensor(OTHER["input_ids"][:])}
    with trainer.client_model("b") as model, torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.allclose(logits, model_of(trainer.client_state("b"))(**inputs).logits, atol=1e-6)
        for use in (trainer.save_model, trainer.push_to_hub, trainer.train):
            with pytest.raises(
                ValueError, match="The live model is that of client 'b', which is not the federation's to"
            ):
                use()
        with pytest.raises(ValueError, match="is that of client 'b', so it cannot be that of 'a' too"):
            trainer.save_client_model("a", tmp_path / "a")
    with pytest.raises(ZeroDivisionError), trainer.client_model("b"):
        raise ZeroDivisionError
    live = trainer._live_adapter.read()
    assert all(torch.equal(live[key], tensor) for key, tensor in trainer.federation.state.items())
    trainer.save_model(str(tmp_path / "shared"))  # the shared part, which its card says
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert "stays with it" in card or "stay with the clients" in card


def test_the_model_in_training_is_nobodys(make_trainer):
    class Peeks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(RuntimeError, match="The live model is in training"), trainer.client_model("a"):
                pass

    trainer = make_trainer("local tensors", callbacks=[Peeks()])
    trainer.train()
    assert trainer.record["rounds"][0]["refused"] == {}


@pytest.mark.parametrize("kind", ["shared", "local tensors"])
def test_nothing_is_evaluated_in_the_middle_of_a_local_round(make_trainer, kind):
    """The model is half trained there, and figures of an evaluation would count as those of the client."""
    looked = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for look in (trainer.evaluate, lambda: trainer.evaluate(OTHER), lambda: trainer.predict(OTHER)):
                with pytest.raises((ValueError, RuntimeError), match="local round|in training|model of its own"):
                    look()
                looked.append(look)

    trainer = make_trainer(kind, callbacks=[Looks()])
    trainer.train()
    quiet = make_trainer(kind, output="quiet")
    quiet.train()
    assert len(looked) == 3 * 3 * LOCAL["max_steps"]
    assert trainer.record["rounds"][0]["refused"] == {}
    assert all(torch.equal(quiet.federation.state[key], tensor) for key, tensor in trainer.federation.state.items())


def test_held_out_data_is_asked_for_by_a_name_that_there_is(make_trainer):
    trainer = make_trainer()
    for ask in (trainer.evaluate, trainer.get_eval_dataloader):
        with pytest.raises(ValueError, match=r"There is no held-out set 'z': the held-out sets are \['a', 'b', 'c'\]"):
            ask("z")
    with pytest.raises(
        ValueError, match="There are 3 held-out sets, of which a loader takes one. Name it, such as 'a'"
    ):
        trainer.get_eval_dataloader()
    with pytest.raises(ValueError, match="There is no held-out set 'a': the held-out data has no names"):
        make_trainer(held_out=OTHER).evaluate("a")


def test_held_out_data_of_a_client_that_cannot_be_prepared_is_named_and_left_out(
    tiny_model_dir, make_clients, tmp_path, caplog
):
    clients = make_clients(num_clients=2)
    broken = Dataset.from_dict({**clients["client_1"].to_dict(), "completion": [None] * 16})
    trainer = FederatedTrainer(
        str(tiny_model_dir),
        FederatedConfig(output_dir=str(tmp_path), **LOCAL),
        clients,
        eval_dataset={**clients, "client_1": broken},
        peft_config=LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    )
    metrics = trainer.evaluate()
    assert "held-out data of client 'client_1' cannot be prepared: AttributeError. Correct" in caplog.text
    assert trainer.client_evaluation["client_1"] == {}
    assert metrics["eval_loss"] == trainer.client_evaluation["client_0"]["eval_loss"]
    assert trainer.client_means.num_clients["eval_loss"] == 1
    assert trainer.client_means.without["eval_loss"] == {"client_1": "missing"}
    trainer.eval_dataset = {"client_1": broken}
    with pytest.raises(ValueError, match="held-out data of client 'client_1' cannot be prepared: AttributeError"):
        trainer.evaluate()


# What the base trainer does for one data set


def without_speed(metrics, prefix="eval"):
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {k: v for k, v in metrics.items() if k not in {f"{prefix}_{name}" for name in speed} | {"epoch"}}


def figures_of(output, compute_result=True):
    """All that `compute_metrics` is given, as numbers."""
    predictions = torch.as_tensor(output.predictions).double()
    figures = {"logits": predictions.sum().item(), "labels": float(torch.as_tensor(output.label_ids).sum())}
    if output.inputs is not None:
        given = output.inputs if not isinstance(output.inputs, dict) else output.inputs["input_ids"]
        figures["inputs"] = float(torch.as_tensor(given).sum())
    if output.losses is not None:
        figures["losses"] = float(torch.as_tensor(output.losses).double().sum())
    return figures


OPTIONS = [
    {},
    {"include_for_metrics": ["inputs", "loss"]},
    {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2},
    {"prediction_loss_only": True},
    {"eval_accumulation_steps": 1, "per_device_eval_batch_size": 2},
    {"label_smoothing_factor": 0.2},
    {"include_num_input_tokens_seen": "all"},
]


@pytest.mark.fast("shared-{}", kind=["local tensors"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["shared", "local tensors"])
def test_evaluation_by_client_is_that_of_trainer_for_each(trained, tmp_path, kind, options):
    trainer = trained(kind, compute_metrics=figures_of, **options)
    means = without_speed(trainer.evaluate())
    assert list(trainer.client_evaluation) == list(CLIENTS)
    for client, figures in trainer.client_evaluation.items():
        plain = Trainer(
            model_of(trainer.client_state(client)),
            TrainingArguments(output_dir=str(tmp_path / "plain"), **QUIET, **options),
            compute_metrics=figures_of,
        )
        expected = without_speed(plain.evaluate(HELD_OUT[client]))
        expected.pop("num_input_tokens_seen", None)
        assert figures == pytest.approx(expected, rel=1e-5)
        by_name = without_speed(trainer.evaluate(client))
        assert {key: by_name[key] for key in figures} == figures
        assert means.keys() - {"num_input_tokens_seen"} == figures.keys()


def test_held_out_data_that_another_process_cannot_prepare_is_left_out_by_all(make_trainer, monkeypatch):
    trainer = make_trainer()
    held_out_of = trainer._held_out_of
    asked = []
    monkeypatch.setattr(trainer, "_held_out_of", lambda client: asked.append(client) or held_out_of(client))
    monkeypatch.setattr(trainer, "_any_stops", lambda stops: stops or asked[-1] == "b")  # what the others say
    metrics = trainer.evaluate()
    assert list(trainer.client_evaluation) == list(CLIENTS) and trainer.client_evaluation["b"] == {}
    assert trainer.client_means.num_clients["eval_loss"] == len(CLIENTS) - 1
    assert "eval_loss" in metrics and not trainer._all_have_stopped


class EvaluatesToo(TrainerCallback):
    """What `client_model` is there for: a look at one client, from within the evaluation of all."""

    def __init__(self, event):
        self.event, self.trainer, self.is_looking = event, None, False

    def on_event(self, event):
        if event == self.event and not self.is_looking:
            self.is_looking = True
            with self.trainer.client_model("b"):
                self.trainer.evaluate(OTHER, metric_key_prefix="other")
            self.is_looking = False

    def on_evaluate(self, args, state, control, **kwargs):
        self.on_event("on_evaluate")

    def on_log(self, args, state, control, **kwargs):
        self.on_event("on_log")


@pytest.mark.parametrize("event", ["on_evaluate", "on_log"])
def test_what_callbacks_evaluate_does_not_take_the_place_of_the_evaluation_by_client(make_trainer, event):
    looks = EvaluatesToo(event)
    trainer = make_trainer("local tensors", callbacks=[looks])
    looks.trainer = trainer
    trainer.train()
    entry = trainer.record["rounds"][-1]
    assert list(entry["client_eval"]) == list(CLIENTS)
    assert entry["eval_clients"]["eval_loss"] == len(CLIENTS)


def test_evaluation_by_client_is_that_of_trl_for_each(tiny_model_dir, make_clients, tmp_path):
    base = {"max_length": 64, "bf16": False, "gradient_checkpointing": False, "per_device_eval_batch_size": 4}
    pairs = {
        client: rows.map(lambda row: {"chosen": row["completion"], "rejected": " no"}).remove_columns("completion")
        for client, rows in make_clients(num_clients=2).items()
    }
    kinds = [
        (FederatedTrainer, FederatedConfig, SFTTrainer, SFTConfig, make_clients(num_clients=2), "CAUSAL_LM"),
        (FederatedDPOTrainer, FederatedDPOConfig, DPOTrainer, DPOConfig, pairs, "CAUSAL_LM"),
        (FederatedRewardTrainer, FederatedRewardConfig, RewardTrainer, RewardConfig, pairs, "SEQ_CLS"),
    ]
    for federated, config, plain, plain_config, clients, task in kinds:
        lora = {"r": 2, "target_modules": ["v_proj"], "task_type": task}
        trainer = federated(
            str(tiny_model_dir),
            config(output_dir=str(tmp_path / "out"), **LOCAL, **base),
            clients,
            eval_dataset=clients,
            peft_config=LoraConfig(**lora),
        )
        means = without_speed(trainer.evaluate())
        for client, figures in trainer.client_evaluation.items():
            alone = plain(
                str(tiny_model_dir),
                args=plain_config(output_dir=str(tmp_path / "plain"), **QUIET, **base),
                train_dataset=clients[client],
                eval_dataset=clients[client],
                peft_config=LoraConfig(**lora),
            )
            expected = without_speed(alone.evaluate())
            del expected["eval_num_tokens"]  # of training, so far
            assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6), plain
            assert figures.keys() == means.keys(), plain


# Generation


@dataclass
class GenerationConfig(FederationArguments, Seq2SeqTrainingArguments):
    pass


class GenerationTrainer(FederatedMixin, Seq2SeqTrainer):
    _config_class = GenerationConfig


PAIRS = {
    client: Dataset.from_dict(
        {"input_ids": [[5 + row, 6, 7] for row in range(4)], "labels": [[8, 9, 10 + number]] * 4}
    )
    for number, client in enumerate("ab")
}


@pytest.mark.fast("by client", "several sets")
@pytest.mark.parametrize(
    ("kind", "held_out"),
    [
        ("shared", PAIRS["a"]),
        ("shared", {"x": PAIRS["a"], "y": PAIRS["b"]}),
        ("shared", PAIRS),
        ("local tensors", PAIRS),
    ],
    ids=["one set", "several sets", "by client", "by client, local tensors"],
)
def test_every_form_of_evaluation_generates_what_it_is_asked_for(tiny_model_dir, tmp_path, kind, held_out):
    set_seed(0)
    config = T5Config(
        vocab_size=320,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=319,
    )
    tokenizer, lengths = AutoTokenizer.from_pretrained(tiny_model_dir), []
    args = GenerationConfig(
        str(tmp_path), **LOCAL, predict_with_generate=True, generation_max_length=9,
        tensor_roles=None if kind == "shared" else {"local": ["lora_B"]},
    )  # fmt: skip
    trainer = GenerationTrainer(
        T5ForConditionalGeneration(config),
        args,
        PAIRS,
        eval_dataset=held_out,
        peft_config=LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=lambda output: lengths.append(output.predictions.shape[1]) or {},
    )
    trainer.model.generation_config.max_length = 5  # the shortest that predictions are padded to
    trainer.train()
    number = 1 if isinstance(held_out, Dataset) else 2
    assert lengths == [9] * number
    for options, length in (({}, 9), ({"max_length": 6}, 6), ({"max_new_tokens": 6, "num_beams": 2}, 7)):
        lengths.clear()
        trainer.evaluate(**options)
        assert lengths == [length] * number
        if held_out is PAIRS:
            trainer.evaluate("a", **options)
            with trainer.client_model("a"):
                trainer.predict(PAIRS["b"], **options)
                trainer.evaluate(PAIRS["b"], **options)
            assert lengths == [length] * 5
