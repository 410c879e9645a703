# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A resumed run is the run that was begun: whatever decides the result is recorded, compared, and refused by its name.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DefaultDataCollator,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_callback import ProgressCallback

from fed_trainer import FederatedConfig, FederatedDPOConfig, FederatedRewardConfig, FederatedTaskConfig
from fed_trainer.config import FederationArguments
from fed_trainer.data.client_datasets import ClientDatasets
from fed_trainer.data.digests import client_digest, dataset_digest
from fed_trainer.output.record import read_record, write_json
from fed_trainer.output.same_run import check_same_run
from fed_trainer.output.settings import (
    COMPARED_ELSEWHERE,
    MAY_DIFFER,
    described_arguments,
    federation_settings,
    local_settings,
)
from fed_trainer.state.described import agree, described, difference, storable
from fed_trainer.trainers.task import FederatedTaskTrainer


PLAIN: dict[str, Any] = {"use_cpu": True, "report_to": "none", "bf16": False, "per_device_train_batch_size": 4}


@dataclass
class OwnConfig(FederationArguments, Seq2SeqTrainingArguments):
    temperature: float = 1.0
    levels: list = field(default_factory=lambda: [1, 2])
    wandb_api_key: str | None = None
    started: float = field(default_factory=time.time, metadata={"may_differ": True})


CONFIGS = [FederatedConfig, FederatedDPOConfig, FederatedRewardConfig, FederatedTaskConfig, OwnConfig]
LISTED = {name for names in MAY_DIFFER.values() for name in names}


# Settings


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_compared_or_listed(config, tmp_path):
    args = config(output_dir=str(tmp_path), **PLAIN)
    recorded = local_settings(args).keys() | federation_settings(args).keys()
    names = {field.name for field in fields(config)} - {"wandb_api_key", "started"}  # a secret, and what says so
    assert recorded - {"world_size"} == names - LISTED - COMPARED_ELSEWHERE.keys()


def test_what_is_listed_exists_once():
    listed = [name for names in MAY_DIFFER.values() for name in names]
    known = {field.name for config in CONFIGS for field in fields(config)}
    assert len(listed) == len(LISTED) and known >= LISTED and not LISTED & COMPARED_ELSEWHERE.keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_difference_in_any_recorded_setting_is_refused_by_its_name(config, tmp_path):
    args = config(output_dir=str(tmp_path), **PLAIN)
    ours = _record_of(args)
    check_same_run(ours, ours, tmp_path)
    for part in ("settings", "federation"):
        for name in ours[part]:
            theirs = ours | {part: ours[part] | {name: "another"}}
            with pytest.raises(ValueError, match=rf"another run \({name}: 'another' there, "):
                check_same_run(theirs, ours, tmp_path)


def test_the_record_is_json_without_addresses_or_secrets(tmp_path):
    args = OwnConfig(
        output_dir=str(tmp_path), wandb_api_key="hush", hub_token="hush", max_grad_norm=float("inf"), **PLAIN
    )
    model_init = {"token": "hush", "cache_dir": "/home/me", "dtype": torch.bfloat16}
    text = json.dumps(_record_of(args) | {"init": described(model_init)}, allow_nan=False)
    assert "hush" not in text and "/home/me" not in text and " at 0x" not in text
    assert json.loads(text)["settings"]["levels"] == [1, 2]


def test_what_an_older_record_does_not_hold_is_not_compared(tmp_path):
    ours = _record_of(FederatedTaskConfig(output_dir=str(tmp_path), **PLAIN))
    theirs = dict(ours, settings={"max_steps": -1}, federation={})
    for name in ("arguments", "initial_digest"):
        del theirs[name]
    ours = _record_of(FederatedTaskConfig(output_dir=str(tmp_path), server_lr=0.5, weight_decay=0.3, **PLAIN))
    check_same_run(theirs, ours, tmp_path)
    # but a record that is complete has the default of a setting that there was not yet
    del (newer := dict(ours["federation"]))["server_lr"]
    with pytest.raises(ValueError, match="server_lr: None there, 0.5 here"):
        check_same_run(ours | {"federation": newer}, ours, tmp_path)


def _record_of(args: Any) -> dict[str, Any]:
    return {
        "rounds": [{}],
        "clients": {},
        "initial_digest": None,
        "peft_config": {},
        "settings": local_settings(args),
        "federation": federation_settings(args),
        "arguments": {},
    }


# Descriptions

TEMPLATE = "Q: {}"


def helper(text):
    return TEMPLATE.format(text)


def uses_helper(text):
    return helper(text)


def adds(amount):
    return lambda value: value + amount


FUNCTIONS = {
    "another constant": (lambda rows: rows["text"] + "!", lambda rows: rows["text"] + "?"),
    "another name": (lambda rows: rows.upper(), lambda rows: rows.lower()),
    "another default": (lambda a, b=1: a, lambda a, b=2: a),
    "other members": (lambda a: a in {"x", "y"}, lambda a: a in {"x", "z"}),
    "an inner function": (lambda a: [lambda: 1 for _ in a], lambda a: [lambda: 2 for _ in a]),
    "what it encloses": (adds(1), adds(2)),
    "enclosed weights": (adds(torch.tensor([1.0, 2.0])), adds(torch.tensor([1.0, 3.0]))),
    "arguments of a partial": (partial(helper, text="a"), partial(helper, text="b")),
    "a field of a collator": (DefaultDataCollator("pt"), DefaultDataCollator("np")),
    "a setting of an optimiser": (
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.2),
    ),
    "enclosed names": (adds(np.array(["a", "b"])), adds(np.array(["a", "c"]))),
    "enclosed objects": (adds(np.array([{"a": 1}, None])), adds(np.array([{"a": 2}, None]))),
    "enclosed times": (adds(np.array(["2020"], "datetime64[Y]")), adds(np.array(["2021"], "datetime64[Y]"))),
    "a class": ((torch.optim.SGD, {"lr": 0.1}), (torch.optim.Adam, {"lr": 0.1})),
    "a config": (LoraConfig(r=2), LoraConfig(r=4)),
}


@pytest.mark.parametrize("pair", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_differs_is_described_differently(pair):
    first, second = map(described, pair)
    assert agree(first, described(pair[0])) and not agree(first, second)
    assert json.loads(json.dumps(first, allow_nan=False)) == first


@pytest.mark.parametrize("changed", ["helper", "TEMPLATE"])
def test_what_a_function_uses_of_its_module_counts(changed, monkeypatch):
    before = described(uses_helper)
    monkeypatch.setitem(globals(), changed, "A: {}" if changed == "TEMPLATE" else adds(1))
    assert not agree(before, described(uses_helper))


def test_code_is_compared_within_one_python():
    here = described(helper)
    other = here | {"python": "3.99", "digest": "another"}
    assert agree(other, here) and not agree(here | {"digest": "another"}, here)
    assert not agree(other | {"function": "another"}, here)


UNUSUAL = {
    "data": Dataset.from_dict({"a": [1]}),
    "meta": torch.ones(2, device="meta"),
    "sparse": torch.eye(2).to_sparse(),
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "of a view": np.arange(6).reshape(2, 3)[:, ::-1],
    "fails": type("Fails", (), {"to_dict": lambda self: 1 / 0})(),
    "generator": np.random.default_rng(0),
    "stream": iter([1]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_whatever_a_function_encloses_can_be_described(value):
    assert agree(described(adds(value)), json.loads(json.dumps(described(adds(value)), allow_nan=False)))


def test_the_rows_that_a_function_encloses_are_not_read(monkeypatch):
    monkeypatch.setattr(Dataset, "to_dict", lambda self: pytest.fail("reads all rows"))
    described(adds(Dataset.from_dict({"a": [1]})))


def test_a_function_that_differs_is_told_by_what_is_another(monkeypatch):
    name = f"{__name__}.adds.<locals>.<lambda>"
    assert difference(described(adds(1)), described(adds(2))) == f"'amount', which {name} uses, is another"
    collator = {"a": [described(partial(uses_helper, text="a"))]}
    monkeypatch.setitem(globals(), "TEMPLATE", "A: {}")
    other = {"a": [described(partial(uses_helper, text="a"))]}
    assert difference(collator, other) == f"'helper', which {__name__}.uses_helper uses, is another"
    first, second = FUNCTIONS["an inner function"]
    assert difference(described(first), described(second)) == f"the code of {__name__}.<lambda> is another"
    assert difference(described(first), None) is None is difference(1, 2)


def test_secrets_that_a_function_uses_leave_no_digest():
    def asks(row, api_key="hush"):
        return row

    assert described(asks)["uses"] == {}


def test_callbacks_are_told_by_class_but_for_those_that_only_show():
    class Own(TrainerCallback):
        pass

    class Watches(TrainerCallback):
        may_differ = True

    assert described_arguments({}, [ProgressCallback(), Watches()]) == {}
    assert [name.rsplit(".", 1)[1] for name in described_arguments({}, [Own(), Own])["callbacks"]] == ["Own", "Own"]


# Data


COLUMNS = {
    "text": (["a", "bc", ""], ["ab", "c", ""]),
    "null": (["a", None], ["a", ""]),
    "int": ([1, 2], [1, 3]),
    "float": ([0.5, float("nan")], [0.5, 1.0]),
    "bool": ([True, False], [True, True]),
    "bytes": ([b"\x00\x01", b""], [b"\x00", b"\x01"]),
    "list": ([[1, 2], [3]], [[1], [2, 3]]),
    "list of texts": ([["a", "b"], None], [["ab"], None]),
    "messages": ([[{"role": "user", "content": "hi"}]], [[{"role": "user", "content": "ho"}]]),
    "struct with null": ([{"a": None, "b": 1}, {"a": 1, "b": None}], [{"a": None, "b": 1}, {"a": None, "b": 1}]),
}


@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
def test_equal_rows_have_equal_digests_wherever_they_lie(values, tmp_path):
    ours, others = ({"column": part, "other": list(range(len(part)))} for part in values)
    digest = dataset_digest(Dataset.from_dict(ours))
    assert dataset_digest(Dataset.from_dict(others)) != digest
    padded = {name: [entries[-1], *entries, entries[0]] for name, entries in ours.items()}
    Dataset.from_dict(padded).save_to_disk(tmp_path / "rows")
    on_disk, number = load_from_disk(tmp_path / "rows"), len(values[0])
    assert dataset_digest(on_disk.select(range(1, number + 1))) == digest
    backwards = on_disk.select(list(reversed(range(number + 2))))
    clients = ClientDatasets(backwards, {"a": [number - index for index in range(number)], "b": [0, 0]})
    assert client_digest(clients, "a") == digest != client_digest(clients, "b")
    assert client_digest(dict(clients), "a") == digest


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_texts_are_texts_in_every_form_of_arrow(kind):
    values = pa.array(["a", None, "bc"])
    datasets = [Dataset(pa.table({"text": rows})) for rows in (values, values.cast(kind))]
    assert dataset_digest(datasets[0]) == dataset_digest(datasets[1])
    assert dataset_digest(Dataset(pa.table({"text": pa.array(["a", None, "bd"], kind)}))) != dataset_digest(
        datasets[0]
    )


def test_long_data_sets_and_class_labels_and_column_order():
    rows = {"text": [str(index) for index in range(3000)], "label": [index % 2 for index in range(3000)]}
    features = Features({"text": Value("large_string"), "label": ClassLabel(names=["no", "yes"])})
    plain = Dataset.from_dict(rows)
    assert dataset_digest(Dataset.from_dict(rows, features=features)) == dataset_digest(plain)
    assert dataset_digest(plain.select_columns(["label", "text"])) == dataset_digest(plain)
    rows["text"][2999] = "another"
    assert dataset_digest(Dataset.from_dict(rows)) != dataset_digest(plain)
    assert dataset_digest(plain.to_iterable_dataset()) is None


# Whole runs


def _model() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
        return BertForSequenceClassification(config)


def _rows(first: int = 0) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[first, index % 9, 5] for index in range(4)], "label": [index % 2 for index in range(4)]}
    )


def loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


class Observer(TrainerCallback):
    pass


@dataclass
class TaskConfig(FederatedTaskConfig):
    temperature: float = 1.0


def _trainer(folder: Any, **changes: Any) -> FederatedTaskTrainer:
    arguments: dict[str, Any] = {
        "train_dataset": {"a": _rows(1), "b": _rows(2), "c": _rows(3)},
        "eval_dataset": _rows(4),
        "compute_loss_func": loss,
        "compute_metrics": lambda output: {"accuracy": 0.5},
        "callbacks": [Observer()],
        "data_collator": DefaultDataCollator("pt"),
        "peft_config": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2),
    }
    names = {field.name for field in fields(TaskConfig)}
    settings = {name: changes.pop(name) for name in list(changes) if name in names}
    args = TaskConfig(
        str(folder),
        **{"num_rounds": 2, "max_steps": 1, "clients_per_round": 2, "disable_tqdm": True, **PLAIN} | settings,
    )
    return FederatedTaskTrainer(_model(), args, **arguments | changes)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one round, in which two of the three clients have trained."""
    folder = tmp_path_factory.mktemp("begun")
    trainer = _trainer(folder, num_rounds=1)
    trainer.train()
    return folder, sorted(trainer.record["rounds"][0]["clients"])


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a field of the user's own": ({"temperature": 2.0}, "temperature: 1.0 there, 2.0 here"),
    "a field of transformers": ({"weight_decay": 0.3}, "weight_decay: 0.0 there, 0.3 here"),
    "a field of the federation": ({"server_lr": 0.5}, "server_lr: None there, 0.5 here"),
    "the adapter": ({"peft_config": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, lora_alpha=1)}, "lora_alpha"),
    "optimizer_cls_and_kwargs": ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, "`optimizer_cls_and_kwargs`"),
    "compute_loss_func": ({"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs["logits"].sum()}, "`compute_loss_func`"),
    "a transform": ({"train_dataset": {name: _rows(first).with_transform(lambda rows: rows) for name, first in zip("abc", (1, 2, 3), strict=True)}}, "`transforms`: None there"),
    "no compute_loss_func": ({"compute_loss_func": None}, "`compute_loss_func`: .* there, None here"),
    "compute_metrics": ({"compute_metrics": lambda output: {"accuracy": 0.6}}, "`compute_metrics`"),
    "preprocess_logits_for_metrics": ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "`preprocess_logits_for_metrics`"),
    "callbacks": ({"callbacks": []}, "`callbacks`: .*Observer.* there, None here"),
    "data_collator": ({"data_collator": lambda rows: DefaultDataCollator()(rows)}, "`data_collator`"),
    "a held-out set": ({"eval_dataset": _rows(5)}, "run on other data: the held-out data changed"),
    "other held-out sets": ({"eval_dataset": {"x": _rows(4)}}, r"the held-out data \(only there\), the held-out data 'x' \(only here\)"),
    "names of clients": ({"train_dataset": {"a": _rows(1), "b": _rows(2), "d": _rows(3)}}, r"clients: \['c'\] only there, \['d'\] only here"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_is_not_resumed_as_another(change, begun):
    changes, message = change
    with pytest.raises(ValueError, match=message):
        _trainer(begun[0], **changes).train(resume_from_checkpoint=True)


def test_a_changed_row_of_a_client_that_has_trained_is_noticed(begun):
    folder, trained = begun
    numbers = {"a": 1, "b": 2, "c": 3}
    for client in numbers:
        data = {name: _rows(9 if name == client else first) for name, first in numbers.items()}
        if client in trained:
            with pytest.raises(ValueError, match=f"run on other data: the data of client '{client}' changed"):
                _trainer(folder, train_dataset=data).train(resume_from_checkpoint=True)
    digests = {name for name, about in read_record(folder)["clients"].items() if "digest" in about}
    assert digests == set(trained)  # of others nothing has been learnt yet


def test_an_unchanged_run_goes_on_and_so_does_one_of_before(tmp_path):
    _trainer(tmp_path / "new", num_rounds=1).train()
    again = _trainer(tmp_path / "new", run_name="another", num_rounds=2, dataloader_num_workers=0, save_total_limit=3)
    again.train(resume_from_checkpoint=True)
    assert len(again.record["rounds"]) == 2
    _trainer(tmp_path / "old", num_rounds=1).train()
    checkpoint = tmp_path / "old" / "checkpoint-1"
    record = read_record(checkpoint)
    kept = {"max_steps", "learning_rate", "optim", "world_size"}
    record["settings"] = {name: value for name, value in record["settings"].items() if name in kept}
    for name in ("arguments", "initial_digest", "side_metrics", "held_out", "optimizer"):
        del record[name]
    for about in record["clients"].values():
        about.pop("digest", None)
    for entry in record["rounds"]:
        for name in ("training_metrics", "eval_clients", "eval_without"):
            del entry[name]
    write_json(checkpoint / "federation.json", record)
    _refresh_digest(checkpoint)
    old = _trainer(tmp_path / "old", num_rounds=2, compute_metrics=None)
    old.train(resume_from_checkpoint=True)
    assert len(old.record["rounds"]) == 2 and "arguments" in old.record


def test_more_rounds_can_be_asked_of_the_trainer_itself(tmp_path):
    trainer = _trainer(tmp_path, num_rounds=1, round_lr_scheduler_type="linear")
    trainer.train()
    trainer.args.num_rounds = 2
    trainer.train(resume_from_checkpoint=True)
    assert [entry["learning_rate"] for entry in trainer.record["rounds"]] == [5e-5, 2.5e-5]


class _Interrupts(TrainerCallback):
    may_differ = True

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


KINDS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedex_lora": {"aggregation": "fedex_lora"},
    "slora": {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1}},
    "local tensors": {"aggregation": "fedsa_lora", "eval_dataset": {name: _rows(4) for name in "abc"}},
    "kept optimiser": {"keep_optimizer_state": True},
}


@pytest.mark.fast("fedavg", "local tensors")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rounds_of_which_nothing_was_saved_are_not_gone_on_from(kind, tmp_path):
    settings = {"num_rounds": 3, "save_rounds": 3, "learning_rate": 0.1, **kind}
    expected = _trainer(tmp_path / "whole", **settings)
    expected.train()
    again = _trainer(tmp_path / "again", callbacks=[interrupts := _Interrupts(), Observer()], **settings)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(interrupts)
    again.train(resume_from_checkpoint=True)  # there is nothing to resume yet: it starts again
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_of_a_whole_model_such_rounds_are_refused(tmp_path):
    trainer = _trainer(
        tmp_path, peft_config=None, num_rounds=3, save_rounds=3, callbacks=[interrupts := _Interrupts()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupts)
    with pytest.raises(ValueError, match="has trained its model already.* and make a new trainer"):
        trainer.train(resume_from_checkpoint=True)


def _refresh_digest(checkpoint):
    digests = json.loads((checkpoint / "digests.json").read_text())
    digests["federation.json"] = hashlib.sha256((checkpoint / "federation.json").read_bytes()).hexdigest()
    write_json(checkpoint / "digests.json", digests)


def _two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, *others = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": others}], lr=0.1, momentum=0.5)


@pytest.mark.parametrize(
    ("given", "kind", "rates"),
    [
        ("args", "AdamW", [0.02]),
        ("class", "SGD", [0.1]),
        ("object", "SGD", [0.3, 0.1]),
    ],
)
def test_the_record_says_the_optimiser_and_the_rates_that_were_used(given, kind, rates, tmp_path):
    changes: dict[str, Any] = {"learning_rate": 0.02, "round_lr_scheduler_type": "linear", "compute_metrics": None}
    if given == "class":
        changes["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 0.1})
    if given == "object":
        model = _model()
        for parameter in model.bert.encoder.parameters():
            parameter.requires_grad = False
        changes |= {"peft_config": None}
        args = FederatedTaskConfig(
            str(tmp_path), num_rounds=2, max_steps=1, disable_tqdm=True, round_lr_scheduler_type="linear", **PLAIN
        )
        trainer = FederatedTaskTrainer(model, args, {"a": _rows()}, optimizers=(_two_groups(model), None))
    else:
        trainer = _trainer(tmp_path, **changes)
    trainer.train()
    record = read_record(tmp_path)
    assert record["optimizer"]["class"].endswith(kind)
    used = [group["lr"] for group in record["optimizer"]["groups"]]
    assert sorted(set(used), reverse=True) == rates and all("params" not in g for g in record["optimizer"]["groups"])
    for entry, factor in zip(record["rounds"], (1.0, 0.5), strict=True):
        assert entry["learning_rate"] == pytest.approx(rates[0] * factor)
        several = [rate * factor for rate in rates]
        assert entry.get("learning_rates") == (pytest.approx(several) if len(rates) > 1 else None)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [entry["learning_rate"] for entry in record["rounds"]]


def test_storable_is_strict_json():
    odd = {
        "nan": float("nan"),
        "inf": -np.inf,
        "array": np.arange(2),
        "tensor": torch.tensor([1.5]),
        3: {1},
        "t": (1,),
    }
    stored = storable(odd)
    assert json.loads(json.dumps(stored, allow_nan=False)) == {
        "nan": "nan", "inf": "-inf", "array": [0, 1], "tensor": [1.5], "3": "builtins.set", "t": [1],
    }  # fmt: skip


def test_the_code_of_a_library_may_change_with_its_version():
    name = "transformers.data.data_collator.default_data_collator"
    assert described(default_data_collator) == name
    assert "digest" not in json.dumps(described([default_data_collator, DefaultDataCollator()]))
