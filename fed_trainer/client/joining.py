# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How a process that holds its own copy of the base model joins a federation: the start is the server's, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from ..output.record import peft_fields, peft_type_name
from ..state.adapter_state import AdapterState
from .live import live_state
from .live.base_model import base_digest


__all__ = ["Invitation", "check_invitation", "invite", "join"]

# how the adapter starts, which the server's replaces, and where its pieces are kept
_HARMLESS_FIELDS = {"keep_base", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}


@dataclass(frozen=True)
class Invitation:
    """
    What the server sends to a client before its first round.

    Args:
        base_digest (`str` or `None`):
            Digest of the server's base model, see [`base_digest`]; `None` if it is quantised.
        peft_type (`str`):
            The PEFT method, as in `"LORA"`.
        peft_config (`dict[str, Any]`):
            Fields of the server's PEFT config, as JSON keeps them.
        adapter (`dict[str, torch.Tensor]`):
            The whole adapter as PEFT saves it, on CPU, with what is never trained: the start of SCL and FeDeRA. Of
            a prompt, the whole encoder.
    """

    base_digest: str | None
    peft_type: str
    peft_config: dict[str, Any]
    adapter: AdapterState


def invite(model: PeftModel) -> Invitation:
    """The invitation to train the active adapter of `model`."""
    name = model.active_adapters[0]
    config = model.peft_config[name]
    live = live_state(model)
    if live.saved_file_is_state:
        saved = get_peft_model_state_dict(model, adapter_name=name)
    else:
        saved = live.read(include_frozen=True)
    return Invitation(
        base_digest(model),
        peft_type_name(config),
        peft_fields(config),
        {key: tensor.detach().cpu().clone() for key, tensor in saved.items()},
    )


def join(model: PeftModel, invitation: Invitation, client: str) -> None:
    """
    Take over the server's adapter, bit for bit; a base model that holds a FeDeRA residual moves with it.

    Singular vectors that another machine has computed from the same weights are as good as the server's but not the
    same tensors, and averaging factors presupposes that all clients start from the same ones. Of a quantised base
    model, on either side, the weights are not compared, only the adapter and its PEFT config.

    Args:
        model (`PeftModel`):
            The client's model, with an adapter made from the same PEFT config; only how it starts
            (`init_lora_weights` and the like) and the `keep_base` of FeDeRA may differ.
        invitation (`Invitation`):
            What the server sent.
        client (`str`):
            Name of the client, for the error message.

    Raises:
        ValueError: If the client holds another base model or has another PEFT config, or the adapter does not fit;
            `model` is unchanged.
    """
    check_invitation(model, invitation, client)
    live_state(model).load(invitation.adapter, f"The adapter that the server sent to client {client!r}")


def check_invitation(model: PeftModel, invitation: Invitation, client: str) -> None:
    """
    Refuse an invitation to train another adapter, or one on another base model.

    Args:
        model, invitation, client:
            As for [`join`].

    Raises:
        ValueError: Naming what differs.
    """
    _check_kinds(invitation, client)
    ours = base_digest(model)
    if ours is not None and invitation.base_digest is not None and ours != invitation.base_digest:
        raise ValueError(
            f"Client {client!r} holds another base model than the server (digests {ours[:12]} and "
            f"{invitation.base_digest[:12]}), so what it trains would not fit what the others train. Load the "
            "server's checkpoint, unchanged, on every client."
        )
    config = model.peft_config[model.active_adapters[0]]
    here = {"peft_type": peft_type_name(config), **peft_fields(config)}
    there = {"peft_type": invitation.peft_type, **invitation.peft_config}
    for field in here | there:
        if field in _HARMLESS_FIELDS or field.startswith("init_"):
            continue
        if here.get(field) != there.get(field):
            raise ValueError(
                f"The adapter of client {client!r} has another PEFT config than the server's (`{field}` is "
                f"{here.get(field)!r} instead of {there.get(field)!r}), so the same tensors would compute "
                "something else. Make it with the server's PEFT config."
            )


def _check_kinds(invitation: Invitation, client: str) -> None:
    """What came over a network may be of any kind."""
    kinds: dict[str, tuple[type, ...]] = {
        "base_digest": (str, type(None)), "peft_type": (str,), "peft_config": (dict,), "adapter": (dict,),
    }  # fmt: skip
    for field, types in kinds.items():
        value = getattr(invitation, field)
        if not isinstance(value, types) or (
            isinstance(value, dict) and not all(isinstance(key, str) for key in value)
        ):
            raise ValueError(
                f"The invitation of client {client!r} has a `{field}` of type {type(value).__name__}. Send what "
                "`invite` returns."
            )
