# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a process that holds its own copy of the base model joins a federation: the start is the server's, everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel, get_peft_model_state_dict

from .adapter_state import AdapterState, LiveAdapter, base_digest


__all__ = ["Invitation", "invite", "join"]


@dataclass(frozen=True)
class Invitation:
    """
    What the server sends to a client before its first round.

    Args:
        base_digest (`str` or `None`):
            Digest of the server's base model, see [`base_digest`]; `None` if it is quantised.
        adapter (`dict[str, torch.Tensor]`):
            The whole adapter as PEFT saves it, on CPU, with what is never trained: the start of SCL and FeDeRA.
    """

    base_digest: str | None
    adapter: AdapterState


def invite(model: PeftModel) -> Invitation:
    """The invitation to train the active adapter of `model`."""
    saved = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    return Invitation(base_digest(model), {key: tensor.detach().cpu().clone() for key, tensor in saved.items()})


def join(model: PeftModel, invitation: Invitation, client: str) -> None:
    """
    Take over the server's adapter, bit for bit; a base model that holds a FeDeRA residual moves with it.

    Singular vectors that another machine has computed from the same weights are as good as the server's but not the same
    tensors, and averaging factors presupposes that all clients start from the same ones.

    Args:
        model (`PeftModel`):
            The client's model, with an adapter made from the same PEFT config.
        invitation (`Invitation`):
            What the server sent.
        client (`str`):
            Name of the client, for the error message.

    Raises:
        ValueError: If the client holds another base model, or the adapter does not fit; `model` is unchanged.
    """
    ours = base_digest(model)
    if ours is not None and invitation.base_digest is not None and ours != invitation.base_digest:
        raise ValueError(
            f"Client {client!r} holds another base model than the server (digests {ours[:12]} and "
            f"{invitation.base_digest[:12]}), so what it trains would not fit what the others train. Load the server's "
            "checkpoint, unchanged, on every client."
        )
    LiveAdapter(model).load(invitation.adapter, f"The adapter that the server sent to client {client!r}")
