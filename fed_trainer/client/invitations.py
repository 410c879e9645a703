# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a coordinator says of its run before anything is trained, and whether a client has the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from peft_scl.foreign_files import short_repr

from ..federation.packet import Packet
from ..methods.aggregation.base import weights_of
from ..output.record import peft_fields
from ..output.settings import COMPARED_ELSEWHERE, MAY_DIFFER, federation_settings, local_settings
from ..state.adapter_state import state_bytes
from ..state.described import agree, difference, is_secret, storable
from .joining import Invitation, check_invitation


__all__ = ["FORMAT", "check_run", "check_versions", "describe_run", "received_settings", "versions"]

logger = logging.get_logger(__name__)

FORMAT = 1  # of the messages
LIBRARIES = ("accelerate", "peft", "torch", "transformers", "trl")
# what a coordinator does with its result is of interest to the policy of a client
_TOLD = frozenset({"partition", "publish_client_names", "publish_client_metrics", "publish_label_counts"})
# of the machine, or of the coordinator alone
_OF_THE_MACHINE = frozenset(
    {
        *next(names for reason, names in MAY_DIFFER.items() if reason.startswith("where things")),
        *next(names for reason, names in MAY_DIFFER.items() if reason.startswith("the machine")),
        "resume_from_checkpoint", "initial_adapter", "initial_adapter_revision", "accelerator_config", "deepspeed",
        "fsdp", "fsdp_config", "parallelism_config",
    }
) - _TOLD  # fmt: skip
_OF_THE_DOWNLOAD = frozenset({"cache_dir", "force_download", "local_files_only", "proxies"})
# compared as the coordinator has it, whatever becomes of it on a machine
_NOT_COMPARED = frozenset(
    {"world_size", "fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config"}
)


def versions() -> dict[str, str]:
    """The versions of this package and of those that the numbers depend on."""
    own = {"peft-scl": importlib.metadata.version("peft-scl")}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def describe_run(trainer: Any) -> dict[str, Any]:
    """
    What is said of the run of a coordinator.

    Args:
        trainer ([`FederatedMixin`]):
            The coordinator's trainer.

    Returns:
        `dict[str, Any]`: For JSON. Nothing of it is a secret, a path of the machine, or code.
    """
    args, plan, record = trainer.args, trainer.client.plan, trainer.record
    config = trainer.model.peft_config[trainer.model.active_adapters[0]] if record["peft_type"] else None
    state = trainer.federation.state
    asked = {key: state[key] for key in plan.shared_keys(state, 1)}
    return {
        "format": FORMAT,
        "run": trainer._run_id,
        "versions": versions(),
        "trainer": trainer._kind,
        "base_model": record["base_model"],
        "base_is_local": os.path.isdir(str(get_config_model_id(trainer.model.config) or "")),
        "base_digest": trainer._base_digest,
        "task_type": None if config is None else config.task_type,
        "peft_type": record["peft_type"],
        "peft_config": {} if config is None else peft_fields(config),
        "num_rounds": args.num_rounds,
        "num_clients": len(trainer.sampler.clients),
        "num_sampled": trainer.sampler.num_sampled,
        "upload_bytes": state_bytes(plan.up.encode(asked, 0)),
        "weights": weights_of(plan.rule),
        "settings": sendable_settings(args),
        "compared": compared(trainer),
        "told": dict(trainer._told),
    }


def sendable_settings(args: Any) -> dict[str, Any]:
    """The fields of a config that a client takes over, as JSON has them."""
    told = args.to_dict()
    names = [field.name for field in dataclasses.fields(args) if field.init]
    return {name: _without_secrets(storable(told[name])) for name in names if name in told and _is_of_the_run(name)}


def received_settings(settings: Any) -> dict[str, Any]:
    """
    Of the settings that a coordinator sends those that are its to decide, whatever else it sends: not where a site
    reports and publishes, nor its machine.

    Raises:
        ValueError: If it sends none.
    """
    if not isinstance(settings, dict):
        raise ValueError("The coordinator does not say its settings. Use the same version of peft-scl on both sides.")
    return {name: value for name, value in settings.items() if _is_of_the_run(name)}


def _without_secrets(value: Any) -> Any:
    """A value without the tokens and the folders of this machine that are in it, such as those of a base model."""
    if isinstance(value, Mapping):
        return {
            name: _without_secrets(inner)
            for name, inner in value.items()
            if not (is_secret(str(name)) or name in _OF_THE_DOWNLOAD)
        }
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _is_of_the_run(name: str) -> bool:
    return name not in _OF_THE_MACHINE and not is_secret(name)


def compared(trainer: Any) -> dict[str, Any]:
    """What has to be the same on both sides for the same packets to mean the same."""
    args = trainer.args
    settings = {**local_settings(args), **federation_settings(args)}
    alike = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    by_name = {name: getattr(args, name) for name in COMPARED_ELSEWHERE if not name.startswith("initial_adapter")}
    arguments = {name: value for name, value in trainer._arguments.items() if name != "transforms"}
    told: dict[str, Any] = json.loads(json.dumps(storable({**alike, **by_name, "arguments": arguments})))
    return {name: _without_secrets(value) for name, value in told.items()}


def check_run(trainer: Any, invitation: Packet, adapter: Mapping[str, Any], client: str) -> None:
    """
    Refuse a run that this process could not take part in.

    Args:
        trainer ([`FederatedMixin`]):
            The client's trainer.
        invitation ([`Packet`]):
            What the coordinator says of its run, see `describe_run`.
        adapter (`Mapping[str, torch.Tensor]`):
            What it has sent of the adapter.
        client (`str`):
            Name of the client, for the message.

    Raises:
        ValueError: Naming what differs.
    """
    run = invitation.meta
    check_versions(run)
    if run.get("trainer") != trainer._kind:
        raise ValueError(
            f"The run is one of the trainer {run.get('trainer')!r}, but client {client!r} has a "
            f"`{type(trainer).__name__}` ({trainer._kind!r}). Join with the trainer of the run."
        )
    has_adapter = isinstance(trainer.model, PeftModel)
    if has_adapter != (run.get("peft_type") is not None):
        raise ValueError(
            f"The run trains {'an adapter' if not has_adapter else 'the model itself'}, but client {client!r} "
            f"{'an adapter' if has_adapter else 'the model itself'}. Give the `peft_config` of the run, or none."
        )
    if has_adapter:
        fields: Any = run.get("peft_config")  # which is looked at there
        told = Invitation(run.get("base_digest"), str(run["peft_type"]), fields, dict(adapter))
        check_invitation(trainer.model, told, client)
    there, here = run.get("compared"), compared(trainer)
    if not isinstance(there, dict):
        raise ValueError("The coordinator does not say its settings. Use the same version of peft-scl on both sides.")
    differing = [
        f"`{name}`: {difference(there.get(name), here.get(name)) or _shown(there.get(name), here.get(name))}"
        for name in sorted(there.keys() | here.keys())
        if not agree(there.get(name), here.get(name))
    ]
    if differing:
        raise ValueError(
            f"Client {client!r} has other settings than the run ({'; '.join(differing[:5])}). Take over those of the "
            "coordinator."
        )


def check_versions(run: Mapping[str, Any]) -> None:
    """
    Refuse a coordinator whose messages this version may not understand.

    Raises:
        ValueError: Naming both versions.
    """
    theirs, ours = run.get("versions"), versions()
    theirs = theirs if isinstance(theirs, dict) else {}
    if run.get("format") != FORMAT or theirs.get("peft-scl") != ours["peft-scl"]:
        raise ValueError(
            f"The coordinator has peft-scl {short_repr(theirs.get('peft-scl'))} (messages of format "
            f"{short_repr(run.get('format'))}), but here is {ours['peft-scl']} (format {FORMAT}). Install the same "
            "version on both sides."
        )
    for name in LIBRARIES:
        if theirs.get(name) != ours[name]:
            logger.warning(
                f"The coordinator has {name} {short_repr(theirs.get(name))}, but here is {ours[name]}: the last bits "
                "of what is trained may differ from what the other clients would get."
            )


def _shown(there: Any, here: Any) -> str:
    return f"{short_repr(there)} there, {short_repr(here)} here"
