# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The job folder that `fed-trainer nvflare-job` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fed_trainer.cli import main
from fed_trainer.cli.networks import KeyOptions
from fed_trainer.cli.nvflare_job import RUN, keys_in, write_job
from fed_trainer.cli.run_file import RunFile


def run_file(folder: Path, **fields: object) -> Path:
    content = {"model_name_or_path": "some/model", "clients": ["a", "b"], "output_dir": str(folder / "out"), **fields}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_job_goes_to_the_clients_of_the_run_and_carries_its_file_to_the_server_only(tmp_path):
    path = run_file(tmp_path, prompt_template="What is {question}? ${x}", completion_column="answer")
    job = write_job(path, tmp_path / "job")
    meta = read(job / "meta.json")
    assert meta["deploy_map"] == {"app_server": ["server"], "app_client": ["a", "b"]} and meta["min_clients"] == 2
    assert [each.relative_to(job).as_posix() for each in job.rglob("*.yaml")] == [f"app_server/{RUN}"]
    assert RunFile.load(job / "app_server" / RUN) == RunFile.load(path)
    assert not list(job.rglob("custom")) and not list(job.rglob("*.py"))  # no code travels


def test_both_sides_name_classes_that_a_kit_allows(tmp_path):
    from fed_trainer.federation.transport.nvflare.kit import ATTACH_ID, CLIENT_CLASS, SERVER_CLASS

    job = write_job(run_file(tmp_path), tmp_path / "job")
    (workflow,) = read(job / "app_server" / "config" / "config_fed_server.json")["workflows"]
    (executor,) = read(job / "app_client" / "config" / "config_fed_client.json")["executors"]
    assert (workflow["path"], workflow["args"]) == (SERVER_CLASS, {})
    assert executor["executor"]["path"] == CLIENT_CLASS
    told = executor["executor"]["args"]
    assert told["attach_id"] == ATTACH_ID and told["allow_reconnect"] is True
    module, _, name = SERVER_CLASS.rpartition(".")
    source = Path(__file__).parents[3].joinpath(*module.split(".")).with_suffix(".py").read_text()
    assert f"class {name}(" in source


def test_clients_without_names_need_sites(tmp_path):
    path = run_file(tmp_path, clients=2)
    with pytest.raises(ValueError, match="--sites site-1 site-2"):
        write_job(path, tmp_path / "job")
    assert not (tmp_path / "job").exists()
    meta = read(write_job(path, tmp_path / "job", ["x", "y"]) / "meta.json")
    assert meta["deploy_map"]["app_client"] == ["x", "y"]


def test_a_relative_output_dir_is_refused_and_a_folder_that_is_there_stays(tmp_path, capsys):
    path = run_file(tmp_path, output_dir="out")
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "job")]) == 2
    assert "absolute path on the server's machine" in capsys.readouterr().err
    path = run_file(tmp_path)
    (tmp_path / "job").mkdir()
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "job")]) == 2
    assert "is there already" in capsys.readouterr().err and not list((tmp_path / "job").iterdir())
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")


def test_fields_can_be_set_for_the_job(tmp_path, capsys):
    path = run_file(tmp_path, output_dir="out")
    where = tmp_path / "elsewhere"
    settings = ["--set", f"output_dir={where}", "--set", "num_rounds=7"]
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "job"), *settings]) == 0
    run = RunFile.load(tmp_path / "job" / "app_server" / RUN)
    assert run.config == {"output_dir": str(where), "num_rounds": 7} and run.clients == ["a", "b"]
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "other"), *settings, "--set", "num_round=7"]) == 2
    assert "`num_round`" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_who_may_speak_stands_in_the_job_and_the_keys_do_not(tmp_path, capsys):
    path = run_file(tmp_path)
    keys = ["--key", str(tmp_path / "server.key"), "--known", str(tmp_path / "known"), "--encrypt"]
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "job"), *keys]) == 0
    told = KeyOptions(str(tmp_path / "server.key"), str(tmp_path / "known"), encrypts=True)
    assert keys_in(tmp_path / "job" / "app_server") == told
    assert keys_in(write_job(path, tmp_path / "without") / "app_server") is None
    assert main(["nvflare-job", str(path), "--to", str(tmp_path / "x"), "--key", "server.key", "--known", "k"]) == 2
    assert "absolute path on the server's machine" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_kit_verb_names_what_it_has_written_or_why_it_has_not(tmp_path, capsys):
    assert main(["nvflare-kit", str(tmp_path)]) == 2
    assert "no start-up kit" in capsys.readouterr().err
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    (tmp_path / "startup" / "fed_server.json").write_text("{}")
    (tmp_path / "local" / "resources.json.default").write_text("{}")
    assert main(["nvflare-kit", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("resources.json")
