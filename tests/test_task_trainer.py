# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federations over `transformers.Trainer`: a classifier with an adapter and its head, or without an adapter."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
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
from peft_scl import SclConfig


NUM_LABELS = 3
LOCAL = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
SCL = SclConfig(r=4, task_type="SEQ_CLS")
HAS_FEDERA = hasattr(peft_scl, "FederaConfig")
FEDERA = peft_scl.FederaConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS") if HAS_FEDERA else None
federa = pytest.mark.skipif(not HAS_FEDERA, reason="peft_scl has no FederaConfig")


def bert(trained=""):
    """A random classifier, always the same; only the parameters whose names match `trained` require gradients."""
    set_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=NUM_LABELS,
    )
    model = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.search(trained, name) is not None
    return model


BIASES = r"bias$|^classifier\."


def rows_of(client, number=16):
    """The label is the first token, so it can be learnt; clients differ in their labels."""
    labels = [(client if row % 2 else row // 2) % NUM_LABELS for row in range(number)]
    tokens = [[label, 5 + row % 7, 12 + client, 20 + (row * 3) % 11] for row, label in enumerate(labels)]
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 4] * number, "label": labels})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def make_trainer(tmp_path):
    def make(
        output="out",
        model=None,
        peft_config=None,
        clients=None,
        callbacks=None,
        eval_dataset=None,
        data_collator=None,
        **settings,
    ):
        args = FederatedTaskConfig(output_dir=str(tmp_path / output), **{"num_rounds": 2, **LOCAL, **settings})
        return FederatedTaskTrainer(
            model=model if model is not None else bert(),
            args=args,
            train_dataset=clients or {f"client_{client}": rows_of(client) for client in range(3)},
            eval_dataset=eval_dataset if eval_dataset is not None else rows_of(4, 12),
            data_collator=data_collator,
            compute_metrics=accuracy,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def weights(folder):
    (path,) = Path(folder).glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("peft_config", "trained"),
    [(LORA, ""), (SCL, ""), (None, ""), (None, BIASES)],
    ids=["lora", "scl", "full", "bitfit"],
)
def test_rounds_equal_fresh_trainers_averaged_in_float64(make_trainer, tmp_path, peft_config, trained):
    """The kept model and optimiser against a new model and `Trainer` per client and round, averaged densely."""
    clients = {"a": rows_of(0), "b": rows_of(1, 6), "c": rows_of(2)}  # unequal weights
    trainer = make_trainer(model=bert(trained), clients=clients, peft_config=peft_config)
    state = {key: tensor.clone() for key, tensor in trainer._global_state.items()}
    assert {"classifier.weight", "classifier.bias"} <= {key.removeprefix("base_model.model.") for key in state}
    trainer.train()

    for round in (1, 2):
        mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
        for name, rows in clients.items():
            model = bert(trained)
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
        saved = weights(tmp_path / "out" / f"checkpoint-{round}")
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


@pytest.mark.parametrize(
    ("peft_config", "trained"),
    [(LORA, ""), (SCL, ""), pytest.param(FEDERA, "", marks=federa), (None, ""), (None, BIASES)],
    ids=["lora", "scl", "federa", "full", "bitfit"],
)
def test_a_run_that_died_resumes_to_the_same_model(make_trainer, tmp_path, peft_config, trained):
    class Dies(TrainerCallback):
        may_differ = True  # the resumed run has none

        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:  # after the last client of the round, before its checkpoint
                raise KeyboardInterrupt

    settings = {"peft_config": peft_config, "num_rounds": 3, "clients_per_round": 2}
    whole = make_trainer("whole", model=bert(trained), **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", model=bert(trained), callbacks=[Dies()], **settings).train()
    again = make_trainer("died", model=bert(trained), **settings)
    again.train(resume_from_checkpoint=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "died"))
    assert [entry["eval"]["eval_accuracy"] for entry in whole._record["rounds"]] == [
        entry["eval"]["eval_accuracy"] for entry in again._record["rounds"]
    ]


def test_frozen_parameters_of_a_plain_model_neither_travel_nor_change(make_trainer, tmp_path):
    trainer = make_trainer(model=bert(BIASES), num_rounds=1)
    trainer.train()
    before, after = bert().state_dict(), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == trainer._global_state.keys() == {key for key in before if re.search(BIASES, key)}
    sent = sum(before[key].numel() for key in changed)
    assert trainer._record["num_trainable_parameters"] == sent
    assert trainer._record["rounds"][0]["bytes_up"] == 3 * (4 * sent + 8)


def test_running_statistics_travel_and_tied_weights_travel_once():
    class Tied(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(4)
            self.twin = torch.nn.Linear(16, NUM_LABELS)
            self.twin.weight = self.classifier.weight

    model = Tied(bert().config)
    live = LiveModel(model)
    state = live.read()
    assert {"norm.running_mean", "norm.running_var", "classifier.weight", "twin.bias"} <= state.keys()
    assert not {"norm.num_batches_tracked", "twin.weight"} & state.keys()
    live.write({key: tensor + 1 for key, tensor in state.items()})
    assert torch.equal(model.norm.running_mean, torch.ones(4))
    assert torch.equal(model.twin.weight, state["classifier.weight"] + 1)


def test_a_model_of_mixed_dtypes_is_loaded_bit_for_bit(tmp_path):
    model = bert().to(torch.bfloat16)
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
    bert().save_pretrained(tmp_path / "base")
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
        make_trainer(model=Normed(bert().config), peft_config=LORA)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["norm"], task_type="SEQ_CLS")
    trainer = make_trainer(model=Normed(bert().config), peft_config=config)
    assert "base_model.model.norm.running_mean" in trainer._global_state


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
        make_trainer(model=Normed(bert().config), peft_config=peft_config)


def test_a_collator_may_tokenise(make_trainer):
    def collate(rows):
        tokens = torch.tensor([[ord(letter) - 97 for letter in row["text"]] for row in rows])
        return {"input_ids": tokens, "labels": torch.tensor([row["label"] for row in rows])}

    raw = Dataset.from_dict({"text": ["abcd", "dcba"] * 4, "label": [0, 1] * 4})
    trainer = make_trainer(
        clients={"a": raw}, eval_dataset=raw, num_rounds=1, remove_unused_columns=False, data_collator=collate
    )
    trainer.train()
    assert trainer._record["rounds"][0]["eval"]["eval_accuracy"] >= 0.5


@pytest.mark.parametrize("looks_at_the_count", [False, True])
def test_accumulated_batches_equal_one_whatever_the_loss_of_the_model_looks_at(
    make_trainer, tmp_path, looks_at_the_count
):
    """BERT computes a mean over its rows, but takes any keyword, from which `Trainer` concludes that it divides by the count."""

    class Counting(BertForSequenceClassification):
        def forward(self, input_ids, labels, num_items_in_batch=None, **inputs):
            output = super().forward(input_ids, labels=labels, **inputs)
            if num_items_in_batch is not None:
                output.loss = output.loss * len(labels) / num_items_in_batch
            return output

    for output, batch, batches in (("one", 4, 1), ("accumulated", 1, 4)):
        model = bert()
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
    one, accumulated = (weights(tmp_path / output) for output in ("one", "accumulated"))
    for key, tensor in one.items():
        torch.testing.assert_close(accumulated[key], tensor, atol=1e-6, rtol=0)


def test_a_plain_run_is_not_resumed_with_other_parameters_trained(make_trainer):
    make_trainer(model=bert(BIASES), num_rounds=1).train()
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
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    model = bert()
    set_seed(42)
    make_trainer("d", model=get_peft_model(model, deepcopy(LORA)), num_rounds=1).train()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "d"))


def test_a_published_classifier_is_a_start(make_trainer, tmp_path):
    make_trainer(peft_config=LORA, num_rounds=1).train()
    again = make_trainer("more", initial_adapter=str(tmp_path / "out"))
    assert same(again._live_adapter.read(), weights(tmp_path / "out"))


def with_another_head():
    model = bert()
    set_seed(1)
    model.classifier.reset_parameters()
    assert not torch.equal(model.classifier.weight, bert().classifier.weight)
    return model


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "full"])
def test_a_run_resumes_to_the_same_model_from_another_random_head(make_trainer, tmp_path, peft_config):
    class Stops(TrainerCallback):
        may_differ = True  # the resumed run has none

        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = True

    make_trainer("whole", peft_config=peft_config).train()
    make_trainer("stopped", peft_config=peft_config, callbacks=[Stops()]).train()
    again = make_trainer("stopped", model=with_another_head(), peft_config=peft_config)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_a_published_classifier_is_a_start_for_a_model_with_another_random_head(make_trainer, tmp_path):
    make_trainer(peft_config=LORA, num_rounds=1).train()
    again = make_trainer("more", model=with_another_head(), initial_adapter=str(tmp_path / "out"))
    assert same(again._live_adapter.read(), weights(tmp_path / "out"))


def test_a_published_whole_model_is_no_initial_adapter(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match=r"`initial_adapter` takes adapters only.* `from_pretrained\('.*out'\)`"):
        make_trainer("more", initial_adapter=str(tmp_path / "out"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    again = make_trainer("more", model=model)
    assert same(again._live_adapter.read(), weights(tmp_path / "out"))


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
        trainer = kind(model=bert(), args=args, train_dataset={"a": rows_of(0)}, peft_config=LORA)
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
        make_trainer(clients={"a": rows_of(0), "b": rows_of(1).remove_columns("label")})
    with pytest.raises(TypeError, match="should be a `PreTrainedModel` or a `PeftModel` but is a str. Load it first"):
        make_trainer(model="some/model", remove_unused_columns=False)
    with pytest.raises(ValueError, match="is a `PeftModel` already, but a `peft_config` was given too"):
        make_trainer(model=get_peft_model(bert(), deepcopy(LORA)), peft_config=LORA)
    with pytest.raises(ValueError, match="No parameter of the `BertForSequenceClassification` .* requires gradients"):
        make_trainer(model=bert("^nothing$"))
    with pytest.raises(ValueError, match="Client 'a' has 3 examples, fewer than one local batch of 4"):
        make_trainer(clients={"a": rows_of(0, 3)})
    config = FederatedConfig(output_dir=str(tmp_path / "x"), **LOCAL)
    with pytest.raises(
        TypeError, match="should be a `FederatedTaskConfig` but is a FederatedConfig.* of `TrainingArguments`"
    ):
        FederatedTaskTrainer(bert(), config, {"a": rows_of(0)})


def test_the_config_differs_from_training_arguments_where_it_says_so(tmp_path):
    config = FederatedTaskConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    added = set(config.to_dict()) - set(plain.to_dict())
    assert {"num_rounds", "clients_per_round", "aggregation", "eval_rounds", "save_rounds", "label_column"} <= added
    differing = {key for key, value in plain.to_dict().items() if config.to_dict()[key] != value}
    assert differing == {"lr_scheduler_type", "eval_on_start"}
    with pytest.raises(ValueError, match="`num_rounds` should be an integer of at least 1"):
        FederatedTaskConfig(output_dir=str(tmp_path), num_rounds=0)
