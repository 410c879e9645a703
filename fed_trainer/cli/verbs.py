# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What each verb takes, and what it does. What a verb needs is imported when it runs: `--help` should not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


__all__ = ["VERBS", "Verb"]

PATIENCE, STATUS_PATIENCE = 600.0, 10.0  # seconds


@dataclass(frozen=True)
class Verb:
    """
    A verb of the command line.

    Args:
        help (`str`):
            What it does, in a line.
        add_arguments (`Callable`):
            Adds what it takes to a parser.
        act (`Callable`):
            Does it; returns an exit code, or nothing for 0.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int | None]


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at", required=True, metavar="ADDRESS", help="folder, s3://bucket/path, nvflare:PROFILE, ..."
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="of a server that speaks S3, if it is not Amazon's")
    parser.add_argument("--verbose", action="store_true", help="say what happens")


def _add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, metavar="SECONDS",
        help="without a sign of the other side, or of the store, before it counts as gone (default: %(default)g)",
    )  # fmt: skip


def _add_keys(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument("--key", metavar="FILE", help="keys of this process, which `fed-trainer keys` has made")
    parser.add_argument("--known", metavar="FILE", help=f"public lines of {whose}")
    parser.add_argument("--accept-first", action="store_true", help="trust the first key that comes under a name")
    parser.add_argument("--encrypt", action="store_true", help="let nobody else read what is sent")


def _network(given: argparse.Namespace) -> Any:
    from .networks import KeyOptions, network_at

    keys = KeyOptions(given.key, given.known, given.accept_first, given.encrypt)
    return network_at(given.at, given.patience, given.endpoint_url, keys)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml", help="what is trained, and how")
    _add_address(parser)
    _add_patience(parser)
    _add_keys(parser, "the sites")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, or begin")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in place of RUN.yaml's")


def _serve(given: argparse.Namespace) -> None:
    from .run_file import RunFile, names_in
    from .serving import serve

    trainer = serve(RunFile.load(given.run), _network(given), given.resume or None, **names_in(given.set))
    print(f"The run is done: {trainer.args.output_dir}")


def _add_join(parser: argparse.ArgumentParser) -> None:
    _add_address(parser)
    _add_patience(parser)
    _add_keys(parser, "the coordinator")
    parser.add_argument("--name", required=True, help="of this client")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_ID", help="rows to train on")
    parser.add_argument("--eval-data", nargs="+", metavar="FILE_OR_ID", help="rows to evaluate on")
    parser.add_argument("--output_dir", metavar="FOLDER", help="for what this client keeps (default: join-NAME)")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="where the base model of the run is here")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="of this machine: use_cpu, ..."
    )
    parser.add_argument("--policy", metavar="POLICY.yaml", help="what a run may ask, and what may leave")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code of the base model run here")


def _join(given: argparse.Namespace) -> None:
    from ..client.gate import gate_at
    from ..client.policy import Policy
    from .joining import SiteOptions, join
    from .run_file import names_in

    policy = None if given.policy is None else Policy.load(given.policy)
    given.encrypt = given.encrypt or (policy is not None and policy.needs_encrypted)

    options = SiteOptions(
        given.name,
        given.data,
        given.output_dir or f"join-{given.name}",
        given.eval_data,
        given.model,
        names_in(given.set),
        given.trust_remote_code or (policy is not None and policy.trust_remote_code),
    )
    network = _network(given)
    print(join(options, network, gate_at(options.output_dir, network, policy)))


def _status(given: argparse.Namespace) -> None:
    from .networks import network_at
    from .status import show_status

    show_status(network_at(given.at, STATUS_PATIENCE, given.endpoint_url))


def _add_keys_verb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="where the private keys go; nothing is overwritten")
    parser.add_argument("--name", help="of the client, or of the coordinator")
    parser.add_argument("--show", metavar="FILE", help="show the public line of keys that are there")


def _keys(given: argparse.Namespace) -> None:
    from .keys import public_lines

    for line in public_lines(given.file, given.name, given.show):
        print(line)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", choices=["check"], help="check RUN.yaml against a policy")
    parser.add_argument("run", metavar="RUN.yaml", help="the run")
    parser.add_argument("--policy", required=True, metavar="POLICY.yaml", help="what a run may ask")
    parser.add_argument("--client", metavar="NAME", help="for a budget of its own in `client_settings`")
    parser.add_argument("--num-examples", type=int, metavar="N", help="of the client, for a budget in epochs")


def _policy(given: argparse.Namespace) -> int:
    from ..client.planned_run import planned_run
    from ..client.policy import Policy, check_policy
    from .run_file import RunFile, read_yaml

    RunFile.load(given.run)  # refuses what is no run
    policy, run = Policy.load(given.policy), planned_run(read_yaml(given.run))
    code, text = check_policy(policy, run, given.num_examples, given.client)
    print(text)
    return code


def _add_nvflare_kit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kit", metavar="KIT", help="start-up kit of a server or a site, as `prod_00/site-1`")
    parser.add_argument(
        "--exchange", metavar="FOLDER", help="over which a site's process is attached (default: in KIT)"
    )


def _nvflare_kit(given: argparse.Namespace) -> None:
    from ..federation.transport.nvflare.kit import prepare_kit

    for path in prepare_kit(given.kit, given.exchange):
        print(path)


def _add_nvflare_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml", help="what is trained, and how")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="of the job, for `nvflare job submit`")
    parser.add_argument("--sites", nargs="+", metavar="NAME", help="in place of the clients that the run names")
    _add_keys(parser, "the sites")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in place of RUN.yaml's")


def _nvflare_job(given: argparse.Namespace) -> None:
    from .networks import KeyOptions
    from .nvflare_job import write_job
    from .run_file import names_in

    keys = KeyOptions(given.key, given.known, given.accept_first, given.encrypt)
    print(write_job(given.run, given.to, given.sites, keys, **names_in(given.set)))


VERBS: dict[str, Verb] = {
    "serve": Verb("Coordinate a run: wait for clients, and train with them until it is over.", _add_serve, _serve),
    "join": Verb("Take part in a run as a client, with the data of this site.", _add_join, _join),
    "keys": Verb("Make the keys of a site or a coordinator, and show what others may know.", _add_keys_verb, _keys),
    "policy": Verb("Say whether a policy allows a run, before anybody joins it.", _add_policy, _policy),
    "status": Verb("Show how a run goes, from anywhere that can read its store.", _add_address, _status),
    "nvflare-kit": Verb("Let a start-up kit of NVFlare take part in runs.", _add_nvflare_kit, _nvflare_kit),
    "nvflare-job": Verb("Write the NVFlare job that coordinates a run.", _add_nvflare_job, _nvflare_job),
}
