# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""NVFlare on this machine: start-up kits by its own provisioning, and the processes of a server and its sites."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .paths import ROOT


HAS_NVFLARE = importlib.util.find_spec("nvflare") is not None
needs_nvflare = pytest.mark.skipif(not HAS_NVFLARE, reason="nvflare is not installed: pip install 'peft-scl[nvflare]'")

ADMIN = "lead@clinic.example"
ORG = "clinic"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def project(sites: list[str]) -> dict[str, Any]:
    """What `nvflare provision` is told."""
    server = {
        "name": "localhost",
        "type": "server",
        "org": ORG,
        "fed_learn_port": free_port(),
        "admin_port": free_port(),
    }
    clients = [{"name": site, "type": "client", "org": ORG} for site in sites]
    admin = {"name": ADMIN, "type": "admin", "org": ORG, "role": "lead"}
    builders: list[dict[str, Any]] = [
        {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
        {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": "nvflare.lighter.impl.cert.CertBuilder"},
        {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
    ]
    return {
        "api_version": 3,
        "name": "wards",
        "description": "one coordinator and its sites",
        "participants": [server, *clients, admin],
        "builders": builders,
    }


class Sites:
    """
    A server and its sites, each with the kit that NVFlare has provisioned.

    Args:
        folder: For the kits and the logs.
        names: Of the sites.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.kits = folder / "workspace" / "wards" / "prod_00"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}

    def provision(self) -> None:
        (self.folder / "project.yml").write_text(yaml.safe_dump(project(self.names)))
        self.run("-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", str(self.folder / "workspace"))
        for kit in ("localhost", *self.names):
            self.run("-m", "fed_trainer", "nvflare-kit", str(self.kits / kit))
        resources = self.kits / "localhost" / "local" / "resources.json"
        # where all servers of a machine keep their jobs, which then take each other's
        resources.write_text(resources.read_text().replace("/tmp/nvflare", str(self.folder)))

    def start(self) -> None:
        self.start_one("localhost")
        for name in self.names:
            self.start_one(name)

    def start_one(self, name: str) -> None:
        """As `startup/start.sh` does, without the loop around it that starts it anew."""
        is_server = name == "localhost"
        side, file = ("server", "fed_server.json") if is_server else ("client", "fed_client.json")
        command = ["-m", f"nvflare.private.fed.app.{side}.{side}_train", "-m", str(self.kits / name), "-s", file]
        command += ["--set", "secure_train=true", f"org={ORG}", "config_folder=config"]
        self.spawn(name, *command, *([] if is_server else [f"uid={name}"]))

    def spawn(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start Python as the leader of a group; what it prints goes to `<name>.log`."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**self.env, **environment},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def run(self, *arguments: str) -> str:
        """Run Python to its end, and return what it prints."""
        done = subprocess.run(
            [sys.executable, *arguments], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: Path) -> str:
        """Returns the id of the job."""
        told = self.admin("submit", "-j", str(job))
        return str(told["data"]["job_id"])

    def admin(self, *arguments: str) -> dict[str, Any]:
        """`nvflare job ...`, with what it answers."""
        kit = str(self.kits / ADMIN)
        return dict(
            json.loads(self.run("-m", "nvflare.cli", "job", *arguments, "--startup-kit", kit, "--format", "json"))
        )

    def kill(self, name: str) -> None:
        """A process with all that it has started."""
        process = self.processes.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)
