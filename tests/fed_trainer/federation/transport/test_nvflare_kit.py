# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a start-up kit of NVFlare is told, and by which addresses and profiles a process finds its job."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from fed_trainer.cli.networks import network_at
from fed_trainer.federation.transport.ends import NetworkError
from fed_trainer.federation.transport.nvflare import NVFlare, NVFlareJob
from fed_trainer.federation.transport.nvflare.kit import CLIENT_CLASS, PROFILE, SERVER_CLASS, prepare_kit
from fed_trainer.federation.transport.nvflare.needed import nvflare_module
from helpers.nvflare_job import Job


def kit_of(folder: Path, side: str, fqsn: str | None = "relay.site-1", **resources: Any) -> Path:
    """As `nvflare provision` writes one, as far as we read it."""
    (folder / "startup").mkdir(parents=True)
    (folder / "local").mkdir()
    client = {"client": {"fqsn": fqsn}} if fqsn else {}
    (folder / "startup" / f"fed_{side}.json").write_text(json.dumps(client))
    (folder / "startup" / "sub_start.sh").write_text("python -m client_train --set uid=site-9 org=clinic\n")
    (folder / "local" / "resources.json.default").write_text(json.dumps({"class_allow_list": ["a.B"], **resources}))
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_server_may_run_our_controller_and_nothing_else_changes(tmp_path):
    kit = kit_of(tmp_path / "server", "server", components=[1])
    assert prepare_kit(kit) == [kit / "local" / "resources.json"] == prepare_kit(kit)
    assert read(kit / "local" / "resources.json") == {"class_allow_list": ["a.B", SERVER_CLASS], "components": [1]}
    assert read(kit / "local" / "resources.json.default") == {"class_allow_list": ["a.B"], "components": [1]}


def test_what_the_operator_has_allowed_stays(tmp_path):
    kit = kit_of(tmp_path / "site", "client")
    (kit / "local" / "resources.json").write_text('{"class_allow_list": ["own.Class"]}')
    (kit / "local" / "comm_config.json").write_text('{"max_message_size": 5}')
    prepare_kit(kit)
    assert read(kit / "local" / "resources.json") == {"class_allow_list": ["own.Class", CLIENT_CLASS]}
    assert read(kit / "local" / "comm_config.json").keys() == {"max_message_size", "client_api_attach"}


@pytest.mark.parametrize(("fqsn", "site"), [("site-1", "site-1"), ("relay.site-1", "site-1"), (None, "site-9")])
def test_a_site_attaches_a_process_over_a_folder_that_others_cannot_enter(tmp_path, fqsn, site):
    kit = kit_of(tmp_path / "kit", "client", fqsn)
    exchange = tmp_path / "exchange"
    prepare_kit(kit, exchange)
    assert stat.S_IMODE(exchange.stat().st_mode) & 0o007 == 0
    told = read(kit / "local" / "comm_config.json")["client_api_attach"]
    assert told == {"scheme": "shared-file", "resources": {"root_dir": str(exchange)}}
    profile = read(kit / PROFILE)
    assert (profile["site_name"], profile["rendezvous_dir"]) == (site, str(exchange))
    assert profile["execution_mode"] == "attach"


def test_what_is_no_kit_is_named(tmp_path):
    with pytest.raises(ValueError, match="no start-up kit.*nvflare provision"):
        prepare_kit(tmp_path)
    kit = kit_of(tmp_path / "kit", "server")
    (kit / "local" / "resources.json").write_text("{")
    with pytest.raises(ValueError, match=r"resources\.json.*cannot be read"):
        prepare_kit(kit)
    (kit / "local" / "resources.json").write_text('{"class_allow_list": "*"}')
    with pytest.raises(ValueError, match="should be a list"):
        prepare_kit(kit)


def test_a_client_has_the_name_of_its_site(tmp_path):
    path = prepare_kit(kit_of(tmp_path / "kit", "client"))[-1]
    network = network_at(f"nvflare:{path}", 5.0)
    assert isinstance(network, NVFlare)
    with pytest.raises(NetworkError, match="--name site-1"):
        network.client_end("ward")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_profile_that_is_none_says_who_writes_one(tmp_path, content):
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    with pytest.raises(NetworkError, match="fed-trainer nvflare-kit"):
        NVFlare(tmp_path / "profile.json").client_end("site-1")


def test_either_side_has_its_own_end():
    with pytest.raises(NetworkError, match="nvflare-job"):
        NVFlare("profile.json").server_end()
    with pytest.raises(NetworkError, match="fed-trainer join"):
        NVFlareJob(Job("a")).client_end("a")
    with pytest.raises(ValueError, match="patience"):
        NVFlare("profile.json", patience=0)


def test_without_nvflare_a_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-scl\[nvflare\]'"):
        nvflare_module("nvflare.client")
    path = prepare_kit(kit_of(tmp_path / "kit", "client"))[-1]
    monkeypatch.setitem(sys.modules, "nvflare.client", None)
    with pytest.raises(ImportError, match=r"peft-scl\[nvflare\]"):
        NVFlare(path).client_end("site-1")
