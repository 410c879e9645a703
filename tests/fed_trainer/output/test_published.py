# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is published says nothing of single clients, unless it is let out; what is free text stays text."""

from __future__ import annotations

import html
import itertools
import json
import logging
import re
import traceback
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers.trainer_callback import TrainerState

from fed_trainer.client.agreement import AgreementMixin, FailedAloneError
from fed_trainer.client.engines import Engine
from fed_trainer.output.card import model_card
from fed_trainer.output.published import Openings, published_log, published_record
from fed_trainer.output.record import read_record
from fed_trainer.output.report import failures, main, round_table
from helpers.hub import REPO
from helpers.hub_server import HubServer


SIZES = {"clinic-anna": 37, "clinic-bert": 41, "clinic-carl": 43, "clinic-dora": 47}
LABELS = {"clinic-anna": "zoster", "clinic-bert": "ypsilon", "clinic-carl": "xanthoma", "clinic-dora": "walleye"}
SECRET = "patient Melpomene has 3 days"
BROKEN, NAMED = "clinic-dora", "clinic-bert"
NUMBERED = {f"client {number}" for number in range(1, 5)}


@pytest.fixture
def make_trainer(make_trainer, make_clients, monkeypatch):
    """
    Four clients of different sizes, one of which fails with a row in the message, and held-out sets of which one is
    called like a client.
    """

    def make(output="adapter", clients=tuple(SIZES), held_out=None, **given):
        rows = make_clients(num_clients=1, rows=48)["client_0"].remove_columns("topic")
        data = {
            name: rows.select(range(SIZES[name])).add_column("diagnosis", [LABELS[name]] * SIZES[name])
            for name in clients
        }
        if held_out is None:
            held_out = {NAMED: rows.select(range(8)), "all": rows.select(range(12))}
        settings = {
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "label_column": "diagnosis",
            "partition": "natural",
        }
        settings |= {"client_settings": {name: {"max_steps": 2} for name in clients[:1]}}
        adapter = {"r": 2, "target_modules": ["q_proj"]}
        trainer = make_trainer(output, adapter=adapter, clients=data, eval_dataset=held_out, **settings | given)
        prepare = trainer._prepare_client_dataset

        def failing(dataset: Dataset, client: str) -> Dataset:
            if client == BROKEN:
                raise ValueError(f"cannot tokenise the row {SECRET!r}")
            return prepare(dataset, client)

        monkeypatch.setattr(trainer, "_prepare_client_dataset", failing)
        return trainer

    return make


def published(hub: HubServer) -> list[dict[str, bytes]]:
    """The files of every commit."""
    return [files for _, _, files in hub.commits(REPO)[1:]]


def leaves(content, path=()):
    """All keys and values, with the way to them."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key), key
            yield from leaves(value, (*path, key))
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value, path)
    else:
        yield path, content


def figures_of_clients(record):
    """
    Every number that is surely that of one client: sizes, bytes, and what is no integer (losses, seconds,
    evaluations).
    """
    yield from (client["num_examples"] for client in record["clients"].values())
    for entry in record["rounds"]:
        for figures in [*entry["clients"].values(), *(entry["client_eval"] or {}).values()]:
            values = [value for path, value in leaves(figures) if value != path[-1]]
            yield from (value for value in values if isinstance(value, float) and not value.is_integer())
            yield from (figures[key] for key in ("bytes_up", "bytes_down") if key in figures)


# Closed


def test_nothing_of_single_clients_is_published(hub, make_trainer, tmp_path, capfd, caplog):
    trainer = make_trainer(push_to_hub=True)
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        trainer.train()
    trainer.push_to_hub()
    whole = read_record(tmp_path / "adapter")
    assert whole["rounds"][0]["refused"] == {BROKEN: "its local round failed: ValueError"}
    assert whole["clients"].keys() == SIZES.keys() and whole["clients"][NAMED]["composition"] == {"ypsilon": 41}
    assert whole["rounds"][1]["eval"].keys() > {f"eval_{NAMED}_loss", "eval_all_loss"}

    texts = [*SIZES, *LABELS.values(), "Melpomene", "diagnosis", "ValueError", "client_settings"]
    numbers = {value for value in figures_of_clients(whole) if value not in (0, sum(SIZES.values()))}  # 0 tells nobody
    for files in published(hub):
        for name, content in files.items():
            if name not in ("tokenizer.json", "adapter_model.safetensors"):
                for text in texts:
                    assert text.encode() not in content, (
                        name,
                        text,
                        [line for line in content.decode().splitlines() if text in line][:3],
                    )
            assert SECRET.encode() not in content
        for name in ("federation.json", "trainer_state.json"):
            found = {path: value for path, value in leaves(json.loads(files[name])) if value in numbers}
            assert not {path: value for path, value in found.items() if not isinstance(value, bool)}, (name, found)
        assert not {int(number) for number in re.findall(r"\b\d+\b", files["README.md"].decode())} & set(
            SIZES.values()
        )
        assert "| examples | 168 |" in files["README.md"].decode()
        record = json.loads(files["federation.json"])
        assert record["clients"].keys() == NUMBERED
        assert [len(entry["clients"]) for entry in record["rounds"]] == [3] * len(record["rounds"])
        assert all("eval_all_loss" in entry["eval"] for entry in record["rounds"])
    # the message of the exception is in the log of the client's turn, and nowhere else
    spoken = {line.name for line in caplog.records if SECRET in logging.Formatter().format(line)}
    assert spoken == {"fed_trainer.client.turn"}
    for path in (tmp_path / "adapter").rglob("*.json"):
        assert SECRET not in path.read_text(encoding="utf-8"), path


def test_published_files_serve_reports_and_further_training(hub, make_trainer, tmp_path, capsys):
    make_trainer(push_to_hub=True).train()
    files = published(hub)[-1]
    for name, content in files.items():
        path = tmp_path / "fetched" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    whole, record = read_record(tmp_path / "adapter"), json.loads(files["federation.json"])
    for row, expected in zip(round_table(record).splitlines(), round_table(whole).splitlines(), strict=True):
        cells = expected.split()
        assert set(row.split()) <= set(cells), (
            "the rows of the published table are those of the whole one, without the named set"
        )
    assert failures(record) == ""
    main([str(tmp_path / "fetched")])
    assert "learning_curves.png" in capsys.readouterr().out
    state = TrainerState.load_from_json(str(tmp_path / "fetched" / "trainer_state.json"))
    assert state.global_step == 2 and any("eval_all_loss" in entry for entry in state.log_history)

    make_trainer("more", initial_adapter=REPO).train()
    for name in ("base_digest", "base_model"):
        assert record[name] == whole[name] is not None
    (tmp_path / "fetched" / "federation.json").write_text(json.dumps(record | {"base_digest": "another"}))
    with pytest.raises(ValueError, match="was trained on another base model"):
        make_trainer("other", initial_adapter=str(tmp_path / "fetched"))


# Opened


@pytest.fixture
def run():
    """A record and a log with something in each place."""
    entry = {
        "clients": {
            "ward a": {
                "num_examples": 5,
                "train_loss": 2.5,
                "num_steps": 3,
                "seconds": 0.25,
                "bytes_up": 7,
                "note": "text",
            },
            "ward b": {"num_examples": 9, "train_loss": 3.5, "num_steps": 4, "seconds": 0.5, "bytes_up": 8},
        },
        "refused": {"ward c": "Client 'ward c' has 6 examples"},
        "client_eval": {"ward a": {"eval_loss": 1.25}, "ward c": {"eval_loss": 1.75}},
        "eval": {"eval_loss": 1.5, "eval_ward a_loss": 1.0625, "eval_acc_ward b": 0.375, "eval_text": "text"},
        "train_loss": 3.0,
        "learning_rate": 0.1,
        "bytes_up": 15,
        "bytes_down": 16,
        "base_change_bytes": 0,
        "seconds": {"local": 0.75},
    }
    record = {
        "format": 1,
        "base_model": "org/base",
        "base_digest": "abc",
        "peft_type": "LORA",
        "num_trainable_parameters": 100,
        "num_local_parameters": 0,
        "aggregation": "fedavg",
        "federation": {"server_optimizer": "sgd", "local_objective": None, "client_settings": {"ward a": {"r": 2}}},
        "peft_config": {"r": 2},
        "settings": {"learning_rate": 0.1},
        "seed": 0,
        "num_rounds": 2,
        "num_sampled": 3,
        "partition": "by ward",
        "label_column": "diagnosis",
        "clients": {
            "ward a": {"num_examples": 5, "composition": {"flu": 5}},
            "ward b": {"num_examples": 9, "composition": {"flu": 4, "gout": 5}},
            "ward c": {"num_examples": 6, "composition": {"gout": 6}},
        },
        "start": {"eval": {"eval_loss": 4.5}},
        "rounds": [{"round": number, **entry} for number in (1, 2)],
    }
    history = [
        {"step": 0, "epoch": 0, "eval_loss": 4.5, "eval_ward a_loss": 4.0625},
        {
            "step": 1,
            "loss": 3.0,
            "bytes_up": 15,
            "seconds_local": 0.75,
            "clients/ward a/loss": 2.5,
            "clients/x/loss": 9.5,
        },
        {"step": 1, "eval_loss": 1.5, "eval_ward a_loss": 1.0625},
    ]
    state = {
        "epoch": 1,
        "global_step": 2,
        "max_steps": 2,
        "stateful_callbacks": {"Mine": {"args": {"client": "ward a"}}},
    }
    return record, {**state, "trial_name": "ward a", "log_history": history}


def everything(run, openings):
    record, state = run
    public = published_record(record, openings)
    card = str(model_card(public, "CAUSAL_LM", "user/x"))
    return json.dumps([public, published_log(state, record, openings), card], ensure_ascii=False)


@pytest.mark.parametrize(
    "openings", [Openings(*flags) for flags in itertools.product([False, True], repeat=3)], ids=str
)
def test_each_opening_lets_out_its_own(run, openings):
    names, metrics, counts = openings
    text = everything(run, openings)
    for name in ("ward a", "ward b"):
        assert (name in text) == names
    for figure in ('"num_examples": 5', "2.5", "1.75", '"num_steps": 3', '"clients/', "5 to 9, 20 in all"):
        assert (figure in text) == metrics, figure
    for count in ('"flu": 4', '"diagnosis"', "gout"):
        assert (count in text) == counts, count
    for both in ("has 6 examples", "client_settings", "1.0625", "4.0625", "0.375"):
        assert (both in text) == (names and metrics), both
    for always in (
        '"eval_loss": 1.5',
        '"train_loss": 3.0',
        '"seconds_local": 0.75',
        '"bytes_up": 15',
        "by ward",
        '"base_digest": "abc"',
    ):
        assert always in text, always
    for never in ("stateful_callbacks", "trial_name", '"text"', "clients/x/"):
        assert never not in text, never


def dictionaries(content):
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from dictionaries(value)
    elif isinstance(content, list):
        for value in content:
            yield from dictionaries(value)


@pytest.mark.parametrize("openings", [Openings(), Openings(True, True, True)], ids=str)
def test_what_is_new_in_the_record_is_not_published_by_itself(run, openings):
    """The list names what goes out, in every dictionary whose keys are ours to choose."""
    record, state = json.loads(json.dumps(run))
    free = [
        record["peft_config"],
        record["federation"]["client_settings"],
        record["federation"]["client_settings"]["ward a"],
    ]
    free += [client["composition"] for client in record["clients"].values()]
    free += [
        record["clients"],
        *(
            entry[key]
            for entry in record["rounds"]
            for key in ("clients", "refused", "client_eval", "seconds", "eval")
        ),
    ]
    free += [
        figures for entry in record["rounds"] for figures in entry["client_eval"].values()
    ]  # metrics have the user's names
    free += [record["start"]["eval"]]
    planted = 0
    for dictionary in dictionaries([record, state]):
        if not any(dictionary is other for other in free):
            dictionary["planted"] = "planted"
            planted += 1
    assert planted > 15
    assert "planted" not in everything((record, state), openings)


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_of_a_single_client_has_no_figures(run, number):
    record, state = run
    for entry in record["rounds"]:
        entry["clients"] = dict(list(entry["clients"].items())[:number])
        entry["client_eval"] = {"ward a": {"eval_loss": 1.25}}
    record["clients"] = dict(list(record["clients"].items())[:1])
    public = published_record(record)
    assert public["num_examples"] is None and public["start"]["eval"] is None
    for entry in public["rounds"]:
        assert [entry[key] for key in ("train_loss", "bytes_up", "bytes_down", "seconds", "eval")] == [None] * 5
        assert len(entry["clients"]) == number
    history = published_log(state, record)["log_history"]
    assert all(entry.keys() <= {"step", "epoch", "learning_rate"} for entry in history)
    assert [row.split()[2:] for row in round_table(public).splitlines()[2:]] == [["-"] * 5] * 2
    card = str(model_card(public, "CAUSAL_LM", "user/x"))
    assert "| examples | not stated |" in card and "| sent per client and round | - |" in card
    opened = published_record(record, Openings(client_metrics=True))
    assert opened["rounds"][0]["train_loss"] == 3.0 and opened["num_examples"] == 5


@pytest.mark.parametrize("how", ["the others could not be evaluated", "the others have no number"])
def test_a_metric_that_one_client_alone_has_is_not_published(run, how):
    record, state = run
    for entry in record["rounds"]:
        if how == "the others have no number":
            entry["client_eval"] = {"ward a": {"eval_loss": 1.25, "eval_f1": 0.0625}, "ward c": {"eval_loss": 1.75}}
            entry["eval"] = {"eval_loss": 1.5, "eval_f1": 0.0625}
            entry["eval_clients"] = {"eval_loss": 2, "eval_f1": 1}
        else:
            entry["client_eval"] = {"ward a": {"eval_loss": 1.25, "eval_f1": 0.0625}, "ward c": {}}
            entry["eval"] = {"eval_loss": 1.25, "eval_f1": 0.0625, "eval_runtime": 1.0}
            entry["eval_clients"] = {"eval_loss": 1, "eval_f1": 1}
    record["start"] = {"eval": {"eval_loss": 2.0, "eval_f1": 0.0625}}
    state["log_history"] = [{"step": number, "eval_f1": 0.0625} for number in range(3)]
    kept = {"eval_loss": 1.5} if how == "the others have no number" else None
    public = published_record(record)
    assert [entry["eval"] for entry in public["rounds"]] == [kept] * 2
    assert public["start"]["eval"] == ({"eval_loss": 2.0} if kept else None)
    assert 0.0625 not in dict(leaves([public, published_log(state, record)])).values()
    opened = published_record(record, Openings(client_metrics=True))
    assert opened["rounds"][0]["eval"]["eval_f1"] == 0.0625


# Updates of single clients


def warnings_of(caplog):
    return [line.getMessage() for line in caplog.records if "the update of a" in line.getMessage()]


@pytest.mark.fast("settings0-expected0", "settings1-expected1", "settings5-expected5")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clients_per_round": 1, "push_to_hub": True}, ["Each round has a single client"]),
        ({"clients_per_round": 1, "push_to_hub": True, "hub_strategy": "end"}, []),
        ({"clients_per_round": 1}, []),
        ({"push_to_hub": True}, []),
        ({"clients": ["clinic-anna", BROKEN], "push_to_hub": True}, ["Round 1 is", "Round 2 is"]),
        ({"clients": ["clinic-anna", BROKEN], "push_to_hub": True, "hub_strategy": "end"}, ["Round 2 is"]),
        ({"clients": ["clinic-anna", BROKEN], "push_to_hub": True, "save_rounds": 2}, ["Round 2 is"]),
        ({"clients": ["clinic-anna", BROKEN]}, []),
    ],
)
def test_publishing_the_update_of_one_client_is_warned_of(settings, expected, hub, make_trainer, caplog):
    clients = settings.pop("clients", ["clinic-anna", "clinic-bert"])
    trainer = make_trainer(clients=clients, held_out={}, eval_on_start=False, **settings)
    trainer.eval_dataset = None
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        trainer.train()
    found = warnings_of(caplog)
    assert len(found) == len(expected)
    assert all(message.startswith(begin) for message, begin in zip(found, expected, strict=True))


def test_a_resumed_run_compares_with_what_it_published(hub, make_trainer, caplog):
    make_trainer(clients=["clinic-anna", "clinic-bert"], push_to_hub=True).train()
    resumed = make_trainer(clients=["clinic-anna", "clinic-bert"], push_to_hub=True, num_rounds=3)
    train = resumed.client._train

    def failing(turn, *args):
        if turn.client == "clinic-bert":
            raise RuntimeError
        return train(turn, *args)

    resumed.client._train = failing
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        resumed.train(resume_from_checkpoint=True)
    assert [message[:10] for message in warnings_of(caplog)] == ["Round 3 is"]


# Free text


HOSTILE = [
    "a | b || c\n| injected | row |",
    "<script>alert(1)</script> & <img src=x onerror=y>",
    "[click](javascript:x) ![image](http://x/y.png)",
    "`code` ``more`` *bold* _low_ ~~gone~~ \\",
    "\r\n\r\n# Title\u2028---\ntags: [x]\n---",
]


def cells(line):
    """The cells of a row of a Markdown table, as they are read."""
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
    return [html.unescape(re.sub(r"\\([\\`*_\[\]|~#])", r"\1", part.strip().strip("`"))) for part in parts]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["partition", "metric", "model_name", "base_model"])
def test_free_text_in_the_card_stays_text(run, text, field):
    record, _ = run
    names = {"model_name": "A name"}
    if field == "metric":
        record["rounds"][0]["eval"] = {f"eval_{text}_loss": 1.5}
    elif field == "model_name":
        names["model_name"] = text
    else:
        record[field] = text
    plain = model_card(
        published_record(run[0] | {"partition": "x", "base_model": "x"}),
        "CAUSAL_LM",
        "user/x",
        **names | {"model_name": "A"},
    )
    card = model_card(published_record(record), "CAUSAL_LM", "user/x", **names)
    lines = card.text.splitlines()
    assert len(lines) == len(plain.text.splitlines())
    assert card.data.to_dict() == plain.data.to_dict()
    assert [line[0] for line in lines if line.startswith(("#", "-"))] == [
        line[0] for line in plain.text.splitlines() if line.startswith(("#", "-"))
    ]
    flat = " ".join(text.split())
    (line,) = {
        "partition": [line for line in lines if line.startswith("| split")],
        "metric": [line for line in lines if line.startswith("| round | ")],
        "model_name": [line for line in lines if line.startswith("# ")],
        "base_model": [line for line in lines if line.startswith("| base model")],
    }[field]
    for sign in "<>":
        assert sign not in line
    if field == "model_name":
        assert html.unescape(re.sub(r"\\(.)", r"\1", line.removeprefix("# "))) == flat
    else:
        assert flat in [cell.removeprefix("eval_").removesuffix("_loss").strip() for cell in cells(line)][1:]


@pytest.mark.parametrize("field", ["partition", "metric", "base_model"])
def test_text_that_is_no_utf8_does_not_keep_the_card_from_being_written(run, field, tmp_path):
    record, _ = run
    if field == "metric":
        record["rounds"][0]["eval"] = {"eval_\udc80_loss": 1.5}
    else:
        record[field] = "ward \udc80"
    model_card(published_record(record), "CAUSAL_LM", "user/x").save(tmp_path / "README.md")
    assert "?" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_error_that_ends_a_run_does_not_carry_that_of_the_client(caplog):
    """
    Of several processes one has failed where the others wait: its traceback, and a log of it, would hold the row.
    """
    trainer = AgreementMixin.__new__(AgreementMixin)
    trainer.accelerator = SimpleNamespace(process_index=1)
    trainer._engine = Engine(SimpleNamespace(num_processes=2))
    with caplog.at_level(logging.WARNING, "fed_trainer"), pytest.raises(FailedAloneError) as caught:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            trainer._reason_of_all(error, "clinic-anna", 3)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "process 1 failed with ValueError" in str(caught.value)
    (line,) = caplog.records  # the log of the process that has trained the client
    assert SECRET in logging.Formatter().format(line) and SECRET not in line.getMessage()


def test_what_whole_cards_say_is_as_before(run):
    card = model_card(published_record(run[0], Openings(True, True, True)), "CAUSAL_LM", "user/x")
    assert "| split | by ward |" in card.text and "| base model | `org/base` |" in card.text
    assert "| round | eval_loss |" in model_card(published_record(run[0]), "CAUSAL_LM", "user/x").text
