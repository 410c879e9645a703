# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federations over `transformers.Trainer`: a classifier with an adapter and its head, or without an adapter."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.trainer.utils import disable_dropout_in_model

import peft_scl
from fed_trainer import FederatedConfig, FederatedMixin, FederatedTaskConfig, FederatedTaskTrainer, read_record
from fed_trainer.client.live.model import LiveModel, load_model
from fed_trainer.federation.sampling import client_seed
from fed_trainer.output.digests import write_digests
from fed_trainer.output.report import round_table, write_report
from helpers.comparison import same, weights_in
from helpers.data import token_rows
from helpers.models import tiny_bert
from helpers.runs import Dies, Stops
from helpers.trainers import QUICK
from peft_scl import SclConfig


NUM_LABELS = 3
LOCAL = {**QUICK, "max_steps": 3, "learning_rate": 3e-3}
LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
SCL = SclConfig(r=4, task_type="SEQ_CLS")
HAS_FEDERA = hasattr(peft_scl, "FederaConfig")
FEDERA = peft_scl.FederaConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS") if HAS_FEDERA else None
federa = pytest.mark.skipif(not HAS_FEDERA, reason="peft_scl has no FederaConfig")


BIASES = r"bias$|^classifier\."


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def make_trainer(make_trainer):
    return partial(
        make_trainer, kind="task", adapter=None, eval_dataset=token_rows(4, 12), compute_metrics=accuracy, **LOCAL
    )


@pytest.mark.fast("lora", "full")
@pytest.mark.parametrize(
    ("peft_config", "trained"),
    [(LORA, ""), (SCL, ""), (None, ""), (None, BIASES)],
    ids=["lora", "scl", "full", "bitfit"],
)
def test_rounds_equal_fresh_trainers_averaged_in_float64(make_trainer, tmp_path, peft_config, trained):
    """The kept model and optimiser against a new model and `Trainer` per client and round, averaged densely."""
    clients = {"a": token_rows(0), "b": token_rows(1, 6), "c": token_rows(2)}  # unequal weights
    trainer = make_trainer(model=tiny_bert(trained), clients=clients, peft_config=peft_config)
    state = {key: tensor.clone() for key, tensor in trainer.federation.state.items()}
    assert {"classifier.weight", "classifier.bias"} <= {key.removeprefix("base_model.model.") for key in state}
    trainer.train()

    for round in (1, 2):
        mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
        for name, rows in clients.items():
            model = tiny_bert(trained)
            if peft_config is not None:
                model = get_peft_model(model, deepcopy(peft_config))
                set_peft_model_state_dict(model, {key: tensor.clone() for key, tensor in state.items()})
            else:
                model.load_state_dict(state, strict=False)
            args = TrainingArguments(
                output_dir=str(tmp_path / "local"), save_strategy="no", lr_scheduler_type="constant", **LOCAL
            )
            local = Trainer(model=model, args=args, train_dataset=rows)
            set_seed(client_seed(42, round, name))
            local.train()
            after = get_peft_model_state_dict(model) if peft_config is not None else model.state_dict()
            for key in mean:
                mean[key] += len(rows) / 38 * after[key].double()
        saved = weights_in(tmp_path / "out" / f"checkpoint-{round}")
        for key in mean:
            torch.testing.assert_close(
                saved[key], mean[key].float(), rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
            assert not torch.equal(saved[key], state[key]), f"{key} was not trained"
        state = {key: tensor.float() for key, tensor in mean.items()}


def test_metrics_reach_the_log_the_record_the_report_and_the_card(make_trainer, tmp_path, capsys):
    trainer = make_trainer(peft_config=LORA, disable_tqdm=False)
    trainer.train()
    record = read_record(tmp_path / "out")
    recorded = [record["start"]["eval"], *(entry["eval"] for entry in record["rounds"])]
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 2]
    assert [entry["eval_accuracy"] for entry in logged] == [entry["eval_accuracy"] for entry in recorded]
    assert trainer.evaluate()["eval_accuracy"] == recorded[-1]["eval_accuracy"]

    shown = [f"{entry['eval_accuracy']:.4f}" for entry in recorded]
    table = round_table(record).splitlines()
    assert re.split(r"  +", table[0].strip())[3:5] == ["eval loss", "eval accuracy"]
    assert [line.split()[4] for line in table[2:]] == shown
    assert round_table(record) in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card[card.index("| round | eval_loss | eval_accuracy |") :].splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:5]] == shown
    assert write_report(tmp_path / "out")[0].stat().st_size > 1000


@pytest.mark.fast("scl", "bitfit")
@pytest.mark.parametrize(
    ("peft_config", "trained"),
    [(LORA, ""), (SCL, ""), pytest.param(FEDERA, "", marks=federa), (None, ""), (None, BIASES)],
    ids=["lora", "scl", "federa", "full", "bitfit"],
)
def test_a_run_that_died_resumes_to_the_same_model(make_trainer, tmp_path, peft_config, trained):
    settings = {"peft_config": peft_config, "num_rounds": 3, "clients_per_round": 2}
    whole = make_trainer("whole", model=tiny_bert(trained), **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", model=tiny_bert(trained), callbacks=[Dies()], **settings).train()
    again = make_trainer("died", model=tiny_bert(trained), **settings)
    again.train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    assert [entry["eval"]["eval_accuracy"] for entry in whole.record["rounds"]] == [
        entry["eval"]["eval_accuracy"] for entry in again.record["rounds"]
    ]


def test_frozen_parameters_of_a_plain_model_neither_travel_nor_change(make_trainer, tmp_path):
    trainer = make_trainer(model=tiny_bert(BIASES), num_rounds=1)
    trainer.train()
    before, after = tiny_bert().state_dict(), weights_in(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == trainer.federation.state.keys() == {key for key in before if re.search(BIASES, key)}
    sent = sum(before[key].numel() for key in changed)
    assert trainer.record["num_trainable_parameters"] == sent
    assert trainer.record["rounds"][0]["bytes_up"] == 3 * (4 * sent + 8)


def test_running_statistics_travel_and_tied_weights_travel_once():
    class Tied(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(4)
            self.twin = torch.nn.Linear(16, NUM_LABELS)
            self.twin.weight = self.classifier.weight

    model = Tied(tiny_bert().config)
    live = LiveModel(model)
    state = live.read()
    assert {"norm.running_mean", "norm.running_var", "classifier.weight", "twin.bias"} <= state.keys()
    assert not {"norm.num_batches_tracked", "twin.weight"} & state.keys()
    live.write({key: tensor + 1 for key, tensor in state.items()})
    assert torch.equal(model.norm.running_mean, torch.ones(4))
    assert torch.equal(model.twin.weight, state["classifier.weight"] + 1)


def test_a_model_of_mixed_dtypes_is_loaded_bit_for_bit(tmp_path):
    model = tiny_bert().to(torch.bfloat16)
    model.classifier.float()
    with torch.no_grad():
        model.classifier.weight.add_(1e-5)  # no bfloat16
    model.save_pretrained(tmp_path)
    saved = LiveModel(model).read(include_frozen=True)
    other = with_another_head().to(torch.bfloat16)
    other.classifier.float()
    LiveModel(other).load(load_model(tmp_path, other), "The model")
    restored = LiveModel(other).read(include_frozen=True)
    assert same(saved, restored)
    assert {key: tensor.dtype for key, tensor in saved.items()} == {
        key: tensor.dtype for key, tensor in restored.items()
    }


@pytest.mark.parametrize("peft_config", [LORA, SCL, None], ids=["lora", "scl", "full"])
def test_the_example_in_the_card_loads_what_was_trained(make_trainer, tmp_path, peft_config):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make_trainer(model=model, peft_config=peft_config, num_rounds=1)
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    namespace = {}
    example = example.replace("path/to/this/folder", str(tmp_path / "out"))
    exec(example.replace("path/to/the/base/model", str(tmp_path / "base")), namespace)
    tokens = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        assert torch.equal(namespace["model"].eval()(tokens).logits, expected)
    assert card.data.library_name == ("transformers" if peft_config is None else "peft")


def test_a_whole_model_is_published(make_trainer, hub):
    trainer = make_trainer(push_to_hub=True, hub_model_id="user/classifier", num_rounds=1)
    trainer.train()
    _, title, files = hub.commits("user/classifier")[-1]
    assert title == "Round 1, end of training"
    published = {
        ".gitattributes",
        "README.md",
        "config.json",
        "federation.json",
        "model.safetensors",
        "trainer_state.json",
    }
    assert files.keys() == published
    loaded = AutoModelForSequenceClassification.from_pretrained("user/classifier")
    assert same(loaded.state_dict(), {key: tensor.cpu() for key, tensor in trainer.model.state_dict().items()})


def test_running_statistics_outside_the_adapter_are_refused(make_trainer):
    class Normed(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(4)

    with pytest.raises(ValueError, match="Training updates the running statistics of base_model.model.norm"):
        make_trainer(model=Normed(tiny_bert().config), peft_config=LORA)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["norm"], task_type="SEQ_CLS")
    trainer = make_trainer(model=Normed(tiny_bert().config), peft_config=config)
    assert "base_model.model.norm.running_mean" in trainer.federation.state


@pytest.mark.parametrize(
    "peft_config",
    [None, LoraConfig(r=2, target_modules=["query"], modules_to_save=["norm"], task_type="SEQ_CLS")],
    ids=["full", "lora"],
)
def test_running_statistics_that_are_a_cumulative_average_are_refused(make_trainer, peft_config):
    class Normed(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(4, momentum=None)

    with pytest.raises(ValueError, match=r"norm.* has `momentum=None`: .* Set a momentum, such as 0.1"):
        make_trainer(model=Normed(tiny_bert().config), peft_config=peft_config)


def test_a_collator_may_tokenise(make_trainer):
    def collate(rows):
        tokens = torch.tensor([[ord(letter) - 97 for letter in row["text"]] for row in rows])
        return {"input_ids": tokens, "labels": torch.tensor([row["label"] for row in rows])}

    raw = Dataset.from_dict({"text": ["abcd", "dcba"] * 4, "label": [0, 1] * 4})
    trainer = make_trainer(
        clients={"a": raw}, eval_dataset=raw, num_rounds=1, remove_unused_columns=False, data_collator=collate
    )
    trainer.train()
    assert trainer.record["rounds"][0]["eval"]["eval_accuracy"] >= 0.5


@pytest.mark.parametrize("looks_at_the_count", [False, True])
def test_accumulated_batches_equal_one_whatever_the_loss_of_the_model_looks_at(
    make_trainer, tmp_path, looks_at_the_count
):
    """
    BERT computes a mean over its rows, but takes any keyword, from which `Trainer` concludes that it divides by the
    count.
    """

    class Counting(BertForSequenceClassification):
        def forward(self, input_ids, labels, num_items_in_batch=None, **inputs):
            output = super().forward(input_ids, labels=labels, **inputs)
            if num_items_in_batch is not None:
                output.loss = output.loss * len(labels) / num_items_in_batch
            return output

    for output, batch, batches in (("one", 4, 1), ("accumulated", 1, 4)):
        model = tiny_bert()
        if looks_at_the_count:
            model.__class__ = Counting
        disable_dropout_in_model(model)
        make_trainer(
            output,
            model=model,
            peft_config=LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=batches,
            optim="sgd",  # a multiple of the gradients would not change the steps of Adam
        ).train()
    records = [read_record(tmp_path / output) for output in ("one", "accumulated")]
    losses = [[entry["train_loss"] for entry in record["rounds"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, accumulated = (weights_in(tmp_path / output) for output in ("one", "accumulated"))
    for key, tensor in one.items():
        torch.testing.assert_close(accumulated[key], tensor, atol=1e-6, rtol=0)


def test_a_plain_run_is_not_resumed_with_other_parameters_trained(make_trainer):
    make_trainer(model=tiny_bert(BIASES), num_rounds=1).train()
    with pytest.raises(ValueError, match="belongs to another run .*num_trainable_parameters: "):
        make_trainer(num_rounds=2).train(resume_from_checkpoint=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        make_trainer(num_rounds=2).train()


def test_a_plain_checkpoint_of_another_architecture_is_refused(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    path = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
    from safetensors.torch import save_file

    state = load_file(path)
    del state["classifier.bias"]
    save_file(state, path, metadata={"format": "pt"})
    write_digests(path.parent, [other.name for other in path.parent.iterdir()])  # undamaged, but another model
    with pytest.raises(ValueError, match="does not fit: it lacks 1 tensors of BertForSequenceClassification"):
        make_trainer(num_rounds=2).train(resume_from_checkpoint=True)


def test_the_same_seed_gives_the_same_adapter_and_a_peft_model_is_taken_as_it_is(make_trainer, tmp_path):
    make_trainer("a", peft_config=LORA, num_rounds=1).train()
    make_trainer("b", peft_config=LORA, num_rounds=1).train()
    make_trainer("c", peft_config=LORA, num_rounds=1, seed=7).train()
    assert same(weights_in(tmp_path / "a"), weights_in(tmp_path / "b"))
    assert not same(weights_in(tmp_path / "a"), weights_in(tmp_path / "c"))
    model = tiny_bert()
    set_seed(42)
    make_trainer("d", model=get_peft_model(model, deepcopy(LORA)), num_rounds=1).train()
    assert same(weights_in(tmp_path / "a"), weights_in(tmp_path / "d"))


def test_a_published_classifier_is_a_start(make_trainer, tmp_path):
    make_trainer(peft_config=LORA, num_rounds=1).train()
    again = make_trainer("more", initial_adapter=str(tmp_path / "out"))
    assert same(again._live_adapter.read(), weights_in(tmp_path / "out"))


def with_another_head():
    model = tiny_bert()
    set_seed(1)
    model.classifier.reset_parameters()
    assert not torch.equal(model.classifier.weight, tiny_bert().classifier.weight)
    return model


@pytest.mark.fast("lora")
@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "full"])
def test_a_run_resumes_to_the_same_model_from_another_random_head(make_trainer, tmp_path, peft_config):
    make_trainer("whole", peft_config=peft_config).train()
    make_trainer("stopped", peft_config=peft_config, callbacks=[Stops()]).train()
    again = make_trainer("stopped", model=with_another_head(), peft_config=peft_config)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "stopped"))


def test_a_published_classifier_is_a_start_for_a_model_with_another_random_head(make_trainer, tmp_path):
    make_trainer(peft_config=LORA, num_rounds=1).train()
    again = make_trainer("more", model=with_another_head(), initial_adapter=str(tmp_path / "out"))
    assert same(again._live_adapter.read(), weights_in(tmp_path / "out"))


def test_a_published_whole_model_is_no_initial_adapter(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match=r"`initial_adapter` takes adapters only.* `from_pretrained\('.*out'\)`"):
        make_trainer("more", initial_adapter=str(tmp_path / "out"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    again = make_trainer("more", model=model)
    assert same(again._live_adapter.read(), weights_in(tmp_path / "out"))


def test_a_trainer_of_your_own_is_federated_by_the_mixin(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class Mine(FederatedMixin, Doubled):
        pass

    losses = []
    for kind in (FederatedTaskTrainer, Mine):
        args = FederatedTaskConfig(
            output_dir=str(tmp_path / kind.__name__), num_rounds=1, **{**LOCAL, "learning_rate": 0}
        )
        trainer = kind(model=tiny_bert(), args=args, train_dataset={"a": token_rows(0)}, peft_config=LORA)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(2 * losses[0])


def test_refusals_before_training(make_trainer, tmp_path):
    raw = Dataset.from_dict({"text": ["a"] * 8, "label": [0] * 8})
    with pytest.raises(
        ValueError, match=r"Client 'a' has the columns \['label', 'text'\], none of which is an input of Bert"
    ):
        make_trainer(clients={"a": raw})
    with pytest.raises(
        ValueError, match=r"Held-out set 'eval_dataset' has the columns .* Tokenise \(or process\) first"
    ):
        make_trainer(eval_dataset=raw)
    with pytest.raises(ValueError, match=r"but client 'a' has .* Give all clients the same columns"):
        make_trainer(clients={"a": token_rows(0), "b": token_rows(1).remove_columns("label")})
    with pytest.raises(TypeError, match="should be a `PreTrainedModel` or a `PeftModel` but is a str. Load it first"):
        make_trainer(model="some/model", remove_unused_columns=False)
    with pytest.raises(ValueError, match="is a `PeftModel` already, but a `peft_config` was given too"):
        make_trainer(model=get_peft_model(tiny_bert(), deepcopy(LORA)), peft_config=LORA)
    with pytest.raises(ValueError, match="No parameter of the `BertForSequenceClassification` .* requires gradients"):
        make_trainer(model=tiny_bert("^nothing$"))
    with pytest.raises(ValueError, match="Client 'a' has 3 examples, fewer than one local batch of 4"):
        make_trainer(clients={"a": token_rows(0, 3)})
    config = FederatedConfig(output_dir=str(tmp_path / "x"), **LOCAL)
    with pytest.raises(
        TypeError, match="should be a `FederatedTaskConfig` but is a FederatedConfig.* of `TrainingArguments`"
    ):
        FederatedTaskTrainer(tiny_bert(), config, {"a": token_rows(0)})


def test_the_config_differs_from_training_arguments_where_it_says_so(tmp_path):
    config = FederatedTaskConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    added = set(config.to_dict()) - set(plain.to_dict())
    assert {"num_rounds", "clients_per_round", "aggregation", "eval_rounds", "save_rounds", "label_column"} <= added
    differing = {key for key, value in plain.to_dict().items() if config.to_dict()[key] != value}
    assert differing == {"lr_scheduler_type", "eval_on_start"}
    with pytest.raises(ValueError, match="`num_rounds` should be an integer of at least 1"):
        FederatedTaskConfig(output_dir=str(tmp_path), num_rounds=0)
