# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a start-up kit of NVFlare needs for a federation: which class may run, and where a process is attached."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


__all__ = ["ATTACH_ID", "CLIENT_CLASS", "PROFILE", "SERVER_CLASS", "prepare_kit"]

ATTACH_ID = "fed_trainer"
SERVER_CLASS = "fed_trainer.cli.nvflare_controller.FedTrainerController"
CLIENT_CLASS = "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"
PROFILE = "fed_trainer.json"
EXCHANGE = "fed_trainer_exchange"  # the folder in which NVFlare's process and ours meet
EXCHANGE_MODE = 0o770  # NVFlare refuses one that everybody may enter
ALLOWED = "class_allow_list"


def prepare_kit(kit: str | os.PathLike, exchange: str | os.PathLike | None = None) -> list[Path]:
    """
    Let a start-up kit of `nvflare provision` take part in federations. At the server, jobs may run our controller; at
    a site they may attach a process, over a folder of the machine that only its owner and group can enter.

    Args:
        kit (`str` or `os.PathLike`):
            The kit's folder, with `startup` and `local`.
        exchange (`str` or `os.PathLike`, *optional*):
            The folder over which a process is attached; one in the kit, if not given.

    Returns:
        `list[Path]`: The files that were written.

    Raises:
        ValueError: If the folder is no kit.
    """
    folder = Path(kit).resolve()
    is_server, is_site = ((folder / "startup" / f"fed_{side}.json").is_file() for side in ("server", "client"))
    if not is_server and not is_site:
        raise ValueError(
            f"{os.fspath(kit)!r} is no start-up kit of a server or a site: it has neither `startup/fed_server.json` "
            "nor `startup/fed_client.json`. Take a folder that `nvflare provision` has written, as `prod_00/site-1`."
        )
    allowed = _allow(folder / "local", SERVER_CLASS if is_server else CLIENT_CLASS)
    return [allowed] if is_server else [allowed, *_attach(folder, Path(exchange or folder / EXCHANGE).resolve())]


def _allow(local: Path, name: str) -> Path:
    """Add a class to those that jobs may run."""
    path, default = local / "resources.json", local / "resources.json.default"
    resources = _read(path if path.is_file() else default)
    classes = resources.setdefault(ALLOWED, [])
    if not isinstance(classes, list):
        raise ValueError(f"`{ALLOWED}` in {os.fspath(path)!r} should be a list. Look at what was changed there.")
    if name not in classes:
        classes.append(name)
    return _write(path, resources)


def _attach(folder: Path, exchange: Path) -> list[Path]:
    exchange.mkdir(parents=True, exist_ok=True)
    exchange.chmod(EXCHANGE_MODE)
    path = folder / "local" / "comm_config.json"
    config = _read(path) if path.is_file() else {}
    config["client_api_attach"] = {"scheme": "shared-file", "resources": {"root_dir": str(exchange)}}
    profile = {
        "schema_version": 1,
        "execution_mode": "attach",
        "attach_id": ATTACH_ID,
        "site_name": _site_name(folder),
        "rendezvous_dir": str(exchange),
    }
    return [_write(path, config), _write(folder / PROFILE, profile)]


def _site_name(folder: Path) -> str:
    """The name that the kit starts its client under."""
    name: Any = _read(folder / "startup" / "fed_client.json").get("client", {}).get("fqsn")
    if isinstance(name, str) and name:
        return name.split(".")[-1]  # behind relays it is a path
    script = folder / "startup" / "sub_start.sh"
    found = re.search(r"uid=(\S+)", script.read_text()) if script.is_file() else None
    if found is None:
        raise ValueError(
            f"The kit {os.fspath(folder)!r} does not say the name of its site. Provision it with NVFlare 2.9."
        )
    return found[1]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} of the start-up kit cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)!r} of the start-up kit should hold an object with fields.")
    return content


def _write(path: Path, content: dict[str, Any]) -> Path:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)
    return path
