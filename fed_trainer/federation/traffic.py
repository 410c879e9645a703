# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What travels between the server and a client in a round, in bytes: all that an implementation over a network would have
to send.

Down: the shared tensors that have changed since the client was last here, cut to its rank; what the local objective
sends along; what went into the base model meanwhile. Up: the delta, what the local objective sends along, and the
numbers that the rule reads. Names, framing and figures for the record are not counted, nor what is agreed on before
the first round (the base model, the initial adapter's frozen part, the seed that masks and restarts are drawn from).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..methods.aggregation import ClientUpdate
from ..state.adapter_state import AdapterState, state_bytes
from .client_settings import ClientSettings
from .server import Server


__all__ = ["download", "download_bytes", "upload_bytes"]

NUMBER_BYTES = 8  # an integer or a float of 64 bits


def download_bytes(server: Server, client: str, settings: ClientSettings, rounds: Sequence[dict[str, Any]]) -> int:
    """
    Bytes of all that a client is sent in the round that has begun.

    Args:
        server ([`Server`]):
            The server.
        client (`str`):
            Name of the client.
        settings ([`ClientSettings`]):
            Its settings.
        rounds (`Sequence[dict]`):
            The record of the rounds so far.
    """
    missed, since = 0, None
    for entry in reversed(rounds):
        missed += entry["base_change_bytes"]
        if client in entry["clients"] or client in entry["refused"]:
            since = entry["round"]  # it came to that round with all that was added before
            break
    return missed + state_bytes(download(server, settings, since))


def download(server: Server, settings: ClientSettings, since: int | None) -> AdapterState:
    """
    The tensors that a client is sent, by name.

    Args:
        server ([`Server`]):
            The server.
        settings ([`ClientSettings`]):
            The client's settings.
        since (`int`, *optional*):
            The round in which it was last here.
    """
    keys = server.changed_since(since) - server.drawn_keys
    sent = server.sent_to(settings)
    message = {key: sent.get(key, tensor) for key, tensor in server.state.items() if key in keys}
    if server.objective is not None:
        along = server.objective.to_clients()
        message |= {f"objective.{key}": along[key] for key in along if key in sent and settings.trains(key)}
    return message


def upload_bytes(server: Server, update: ClientUpdate) -> int:
    """Bytes of all that a client sends."""
    return state_bytes(update.delta) + state_bytes(update.extras) + NUMBER_BYTES * len(server.rule.numbers)
