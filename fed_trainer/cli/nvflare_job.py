# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer nvflare-job RUN.yaml --to FOLDER`"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..federation.transport.nvflare.kit import ATTACH_ID, CLIENT_CLASS, SERVER_CLASS
from .networks import KeyOptions
from .run_file import RunFile, read_yaml


__all__ = ["RUN", "keys_in", "write_job"]

# in the folder of the server's app
RUN, KEYS = "config/run.yaml", "config/keys.json"
HEARTBEAT, SILENCE = 5.0, 30.0  # seconds between a site's heartbeats, and without them before its process is gone
FETCH = 0.5  # seconds between a site's questions for a task


def write_job(
    path: str | os.PathLike,
    to: str | os.PathLike,
    sites: Sequence[str] | None = None,
    keys: KeyOptions | None = None,
    **overrides: Any,
) -> Path:
    """
    Write the job that coordinates a run, for `nvflare job submit`. It carries the run's file and no code.

    Args:
        path (`str` or `os.PathLike`):
            The run, as [`RunFile.load`] takes it.
        to (`str` or `os.PathLike`):
            Folder of the job, which must not be there yet.
        sites (`Sequence[str]`, *optional*):
            Names of the sites; the clients of the run, if not given.
        keys ([`KeyOptions`], *optional*):
            Who may speak. The files are those of the server's machine.
        overrides (`dict[str, Any]`, *optional*):
            Fields of the run, in place of those in the file.

    Raises:
        FileExistsError: If the folder is there.
        ValueError: If the run cannot be used.
    """
    run = RunFile.load(path)
    content = {**read_yaml(path), **overrides}
    if overrides:
        run = RunFile.of(content)
    _check_paths(run, os.fspath(path))
    _check_keys(keys)
    names = _names(run, sites)
    folder = Path(to)
    if folder.exists():
        raise FileExistsError(f"{os.fspath(to)!r} is there already. Remove it, or choose another folder (`--to`).")
    server, client = folder / "app_server" / "config", folder / "app_client" / "config"
    server.mkdir(parents=True)
    client.mkdir(parents=True)
    meta = {
        "name": folder.name,
        "min_clients": len(names),
        "resource_spec": {},
        "deploy_map": {"app_server": ["server"], "app_client": names},
    }
    _write(folder / "meta.json", meta)
    _write(server / "config_fed_server.json", _server_config())
    _write(client / "config_fed_client.json", _client_config())
    (folder / "app_server" / RUN).write_text(yaml.safe_dump(content, sort_keys=False))
    if keys is not None and keys.key is not None:
        _write(folder / "app_server" / KEYS, dataclasses.asdict(keys))
    return folder


def keys_in(folder: Path) -> KeyOptions | None:
    """Who may speak in the job whose server's app is in this folder."""
    path = folder / KEYS
    return KeyOptions(**json.loads(path.read_text())) if path.is_file() else None


def _names(run: RunFile, sites: Sequence[str] | None) -> list[str]:
    if sites:
        return list(sites)
    if isinstance(run.clients, list):
        return run.clients
    raise ValueError(
        f"The run has {run.clients} clients without names, but NVFlare sends a job to sites by their names. "
        "Name them: `--sites site-1 site-2`, or `clients: [site-1, site-2]` in the run."
    )


def _check_paths(run: RunFile, name: str) -> None:
    """A job runs in a folder of NVFlare's, so that relative paths lead nowhere."""
    output = run.config.get("output_dir")
    if not isinstance(output, str) or not Path(output).is_absolute():
        raise ValueError(
            f"The run {name!r} has the `output_dir` {output!r}, but a job of NVFlare runs in a folder of its own. "
            "Give an absolute path on the server's machine."
        )


def _check_keys(keys: KeyOptions | None) -> None:
    for path in (keys.key, keys.known) if keys is not None else ():
        if path is not None and not Path(path).is_absolute():
            raise ValueError(
                f"The keys {path!r} are read by the job, which runs in a folder of its own. Give an absolute path on "
                "the server's machine."
            )


def _server_config() -> dict[str, Any]:
    return {
        "format_version": 2,
        "server": {"task_request_interval": FETCH},
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [{"id": "fed_trainer", "path": SERVER_CLASS, "args": {}}],
    }


def _client_config() -> dict[str, Any]:
    args = {
        "execution_mode": "attach",
        "attach_id": ATTACH_ID,
        "allow_reconnect": True,
        "heartbeat_interval": HEARTBEAT,
        "heartbeat_timeout": SILENCE,
        "server_expected_format": "raw",
    }
    return {
        "format_version": 2,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "executors": [{"tasks": ["*"], "executor": {"path": CLIENT_CLASS, "args": args}}],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
