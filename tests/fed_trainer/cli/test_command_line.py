# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer`: a sentence and an exit code for what cannot work, and the same result as in Python for what can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from fed_trainer import FederatedConfig, FederatedTrainer, Store
from fed_trainer.cli import main
from fed_trainer.cli.data import DataFields, load_rows, prepared_rows
from fed_trainer.cli.joining import CommandSite, SiteOptions
from fed_trainer.cli.main import TERMINATED
from fed_trainer.cli.networks import network_at
from fed_trainer.cli.run_file import RunFile, config_of, names_in, peft_config_of
from fed_trainer.cli.serving import serve
from fed_trainer.cli.status import status_lines
from fed_trainer.client.invitations import FORMAT, received_settings, versions
from fed_trainer.client.process import DeclinedError
from fed_trainer.federation.packet import Packet
from fed_trainer.federation.transport.store import lease
from helpers.comparison import same


NAMES = ["site-1", "site-2"]


@pytest.fixture(autouse=True)
def short_wait_for_another_coordinator(monkeypatch):
    monkeypatch.setattr(lease, "BEATS_PER_LEASE", 100)


@pytest.fixture
def sites(make_clients, tmp_path) -> dict[str, Path]:
    """Files with the rows of two clients."""
    files = {}
    for name, rows in zip(NAMES, make_clients(num_clients=2).values(), strict=True):
        files[name] = tmp_path / f"{name}.jsonl"
        rows.select_columns(["prompt", "completion"]).to_json(files[name])
    return files


@pytest.fixture
def run_yaml(tiny_model_dir, tmp_path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_model_dir),
        "clients": NAMES,
        "peft_config": {"peft_type": "LORA", "r": 4, "target_modules": ["v_proj"]},
        "output_dir": str(tmp_path / "server"),
        "num_rounds": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 32,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "wait": 60,
        "round_timeout": 60,
    }


def written(folder: Path, content: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


@pytest.mark.slow
def test_serve_and_join_end_with_the_adapter_of_one_process(run_yaml, sites, tiny_model_dir, tmp_path, capsys):
    address, env = (
        str(tmp_path / "store"),
        {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )

    def join(name: str) -> Any:
        arguments = ["join", "--at", address, "--name", name, "--data", str(sites[name]), "--set", "use_cpu=true"]
        arguments += ["--output_dir", str(tmp_path / name), "--model", str(tiny_model_dir)]
        return subprocess.Popen([sys.executable, "-m", "fed_trainer", *arguments], env=env)

    processes = [join(name) for name in NAMES]
    run = RunFile.of(run_yaml)
    trainer = serve(run, Store(address, lease=0.5))
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    args = FederatedConfig(**{**run.config, "output_dir": str(tmp_path / "one")})
    peft_config = peft_config_of(run.peft_config, "CAUSAL_LM")
    clients = {name: load_rows([str(path)]) for name, path in sites.items()}
    one = FederatedTrainer(str(tiny_model_dir), args, clients, peft_config=peft_config)
    one.train()
    assert same(
        load_file(tmp_path / "server" / "adapter_model.safetensors"),
        load_file(tmp_path / "one" / "adapter_model.safetensors"),
    )
    record = trainer.record
    assert record["clients"] == {n: {"num_examples": 16, "composition": None, "is_elsewhere": True} for n in NAMES}
    assert main(["status", "--at", address]) == 0
    told = capsys.readouterr().out
    assert "is over: 2 of 2 rounds are done" in told and all(name in told for name in NAMES)
    # a run that is done has no place for a client, which is no fault of the client's
    late = ["join", "--at", address, "--name", "late", "--data", str(sites["site-1"]), "--patience", "1"]
    assert main([*late, "--output_dir", str(tmp_path / "late")]) == 0


def test_nobody_serves(sites, tmp_path, capsys):
    arguments = ["join", "--at", str(tmp_path / "nowhere"), "--name", "a", "--data", str(sites["site-1"])]
    assert main([*arguments, "--patience", "0.2", "--set", "use_cpu=true", "--output_dir", str(tmp_path / "a")]) == 3
    assert "Nothing was heard of a coordinator" in capsys.readouterr().err


def test_nobody_comes(run_yaml, tmp_path, capsys):
    run = written(tmp_path, {**run_yaml, "wait": 0.2})
    for _ in range(2):  # nothing has come of it, so it may be tried again there
        assert main(["serve", run, "--at", str(tmp_path / "store"), "--set", f"output_dir={tmp_path / str(_)}"]) == 2
        assert "0 of 2 clients take part, but the run needs 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--at", "nosuch://x", "--name", "a", "--data", "FILE"], "nosuch"),
        (["--at", "gs://bucket/x", "--name", "a", "--data", "FILE"], r"peft-scl[gcs]"),
        (["--at", "", "--name", "a", "--data", "FILE"], "The address (`--at`) is empty"),
        (["--at", "STORE", "--name", "a/b", "--data", "FILE"], "'a/b' cannot stand in an address"),
        (["--at", "STORE", "--name", "a", "--data", "nowhere.jsonl"], "There is no file 'nowhere.jsonl'"),
        (
            ["--at", "STORE", "--name", "a", "--data", "FILE", "--set", "num_rounds=3"],
            "`num_rounds` is a setting of the run",
        ),
        (["--at", "STORE", "--name", "a", "--data", "FILE", "--set", "use_cpu"], "should be `name=value`"),
        (["--at", "STORE", "--name", "a", "--data", "FILE", "--patience", "-1"], "`patience` should be a positive"),
    ],
)
def test_what_cannot_join_is_a_sentence(arguments, complaint, sites, tmp_path, capsys):
    given = {"FILE": str(sites["site-1"]), "STORE": str(tmp_path / "store")}
    arguments = [given.get(argument, argument) for argument in arguments]
    assert main(["join", *arguments, "--output_dir", str(tmp_path / "a")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_round": 3}, "has the field `num_round`, which neither a run nor `FederatedConfig` has"),
        ({"trainer": "ppo"}, "`trainer` should be one of"),
        ({"clients": []}, "`clients` should be a list of names, or a number"),
        ({"clients": ["a", "a"]}, "has ['a'] more than once"),
        ({"clients": 0}, "`clients` should be a list of names, or a number"),
        ({"peft_config": {"peft_type": "LORRA"}}, "`peft_type` 'LORRA'"),
        ({"peft_config": {"peft_type": "LORA", "rank": 3}}, "`peft_config` has ['rank']"),
        ({"peft_config": 3}, "`peft_config` should have fields"),
        ({"trainer": ["sft"]}, "`trainer` should be one of"),
        ({"eval_dataset": 5}, "`eval_dataset` should be files, or an id, but the value is 5"),
        ({"prompt_template": "{a", "completion_column": "b"}, "which is no template (expected '}'"),
        ({"peft_config": {"peft_type": "LORA", "r": "x", "target_modules": ["v_proj"]}}, "of these settings ('<='"),
        ({"model_name_or_path": 5}, "`model_name_or_path` should be an id or a folder but the value is 5"),
        ({"trainer": "task", "max_length": None}, "needs `num_labels` and `text_column`"),
        ({"prompt_template": "{a}"}, "`completion_column` is None"),
        ({"num_rounds": 0}, "`num_rounds` should be an integer of at least 1"),
        (
            {"aggregation": "slora", "peft_config": {"peft_type": "LORA", "r": 2, "target_modules": ["v_proj"]}},
            "trains base weights",
        ),
        ({"eval_dataset": "nowhere.csv"}, "There is no file 'nowhere.csv'"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(changes, complaint, run_yaml, tmp_path, capsys):
    content = {**run_yaml, "wait": 0.2, **changes}
    run = written(tmp_path, {name: value for name, value in content.items() if value is not None})
    assert main(["serve", run, "--at", str(tmp_path / "store")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[1, 2]", "should have fields"), ("a: [", "is no YAML"), ("clients: 2", "lacks the field `model_name_or_path`")],
)
def test_a_file_that_is_no_run_is_a_sentence(content, complaint, tmp_path, capsys):
    assert main(["serve", written(tmp_path, content), "--at", str(tmp_path / "store")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_coordinator_that_is_terminated_while_it_waits_leaves_the_address_to_another(run_yaml, tmp_path):
    store = tmp_path / "store"
    run = written(tmp_path, {**run_yaml, "clients": 2})
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-m", "fed_trainer", "serve", run, "--at", str(store)], env=env)
    while not (store / "g1").exists():  # the greeting: from then on it waits
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == TERMINATED
    note = json.loads((store / "coordinator.json").read_text())
    assert (note["is_over"], note["is_void"]) == (True, True)


def test_a_value_that_is_no_yaml_is_a_sentence(run_yaml, tmp_path, capsys):
    run = written(tmp_path, run_yaml)
    assert main(["serve", run, "--at", str(tmp_path / "store"), "--set", "num_rounds=[1"]) == 2
    assert "'num_rounds=[1' has a value that is no YAML" in capsys.readouterr().err


def test_a_run_file_that_is_not_there(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none.yaml"), "--at", str(tmp_path / "store")]) == 2
    assert "cannot be read (No such file" in capsys.readouterr().err


def test_status_of_nothing_is_a_sentence(tmp_path, capsys):
    assert main(["status", "--at", str(tmp_path)]) == 2
    assert "There is no run at" in capsys.readouterr().err


def test_status_says_who_does_what():
    note = {"run": "r", "generation": 2, "is_over": False}
    clients = {
        "a": {"state": "at work", "round": 3, "bytes_down": 2048, "bytes_up": 10, "loss": 1.5},
        "b": {"state": "absent"},
    }
    lines = status_lines(note, {"round": 3, "num_rounds": 9, "clients": clients}, is_alive=False)
    assert lines[0] == "The run r has a coordinator that shows no sign of life (coordinator start 2)."
    assert lines[1:] == [
        "Round 3 of 9.",
        "client  state    round  bytes down  bytes up  loss",
        "a       at work  3      2,048       10        1.5000",
        "b       absent",
    ]


class TestRows:
    def test_prompts_and_completions_are_made_of_columns(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("q,a\nWhy?,Because.\nEmpty?,\n")
        fields = DataFields("Q: {q}\nA: ", "a")
        rows = prepared_rows(load_rows([str(path)]), fields, None, None, "client 'x'")
        assert rows.to_list() == [{"prompt": "Q: Why?\nA:", "completion": " Because."}]

    def test_a_column_that_is_missing_is_named_with_those_that_there_are(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"q": "Why?"}) + "\n")
        with pytest.raises(ValueError, match=r"needs the column 'a', but client 'x' has the columns \['q'\]"):
            prepared_rows(load_rows([str(path)]), DataFields("{q}", "a"), None, None, "client 'x'")

    def test_several_files_of_one_kind_and_a_saved_folder(self, make_clients, tmp_path):
        rows = make_clients(num_clients=1)["client_0"]
        for part in range(2):
            rows.select(range(part, part + 3)).to_json(tmp_path / f"{part}.jsonl")
        assert len(load_rows([str(tmp_path / f"{part}.jsonl") for part in range(2)])) == 6
        rows.save_to_disk(str(tmp_path / "saved"))
        assert len(load_rows([str(tmp_path / "saved")])) == len(rows)
        with pytest.raises(ValueError, match="of several kinds"):
            (tmp_path / "x.csv").write_text("a\n1\n")
            load_rows([str(tmp_path / "0.jsonl"), str(tmp_path / "x.csv")])

    def test_a_damaged_file_is_a_sentence(self, tmp_path):
        (tmp_path / "x.parquet").write_bytes(b"PAR1nothing")
        with pytest.raises(ValueError, match="cannot be read"):
            load_rows([str(tmp_path / "x.parquet")])


def test_a_site_sets_what_concerns_its_machine_only(tmp_path):
    SiteOptions("a", ["x"], str(tmp_path), settings={"use_cpu": True, "dataloader_num_workers": 2})
    with pytest.raises(ValueError, match="`learning_rate` is a setting of the run"):
        SiteOptions("a", ["x"], str(tmp_path), settings={"learning_rate": 1})


def invitation(model: Path, **settings: Any) -> Packet:
    about = {"format": FORMAT, "versions": versions(), "trainer": "sft", "base_model": str(model), "run": "run"}
    adapter = {"peft_type": "LORA", "peft_config": {"r": 2, "target_modules": ["v_proj"]}, "task_type": "CAUSAL_LM"}
    return Packet("invite", {}, {**about, **adapter, "settings": settings})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_only", False),  # unpickles
        ("trust_remote_code", True),
        ("allow_all_kernels", True),  # of the Hub, which are code
        ("attn_implementation", "somebody/kernel"),
        ("adapter_kwargs", {"trust_remote_code": True}),
    ],
)
def test_a_coordinator_cannot_make_code_of_a_model_run_at_a_site(field, value, sites, tiny_model_dir, tmp_path):
    site = CommandSite(
        SiteOptions("site-1", [str(sites["site-1"])], str(tmp_path / "out")), network_at(str(tmp_path / "store"), 1.0)
    )
    with pytest.raises(DeclinedError, match=f"`{field}`.*--trust-remote-code"):
        site.accept("site-1", invitation(tiny_model_dir, model_init_kwargs={"dtype": "auto", field: value}))


def test_where_a_site_reports_and_publishes_is_its_own_whatever_a_coordinator_sends():
    asked = {"report_to": ["wandb"], "push_to_hub": True, "hub_token": "theirs", "output_dir": "/", "max_steps": 3}
    assert received_settings(asked) == {"max_steps": 3}
    with pytest.raises(ValueError, match="does not say its settings"):
        received_settings(None)


def test_values_are_read_as_in_yaml():
    assert names_in(["use_cpu=true", "x=1e-3", "name=a=b"]) == {"use_cpu": True, "x": "1e-3", "name": "a=b"}


def test_an_address_with_an_endpoint_passes_it_on():
    store: Any = network_at("memory://x", 3.0, "http://localhost:1")
    assert (store.address, store._patience, store._options) == (
        "memory://x",
        3.0,
        {"endpoint_url": "http://localhost:1"},
    )


def test_a_config_says_what_it_does_not_take():
    with pytest.raises(ValueError):
        config_of(RunFile("m", 1).part, {"output_dir": "x", "max_steps": "three"})
