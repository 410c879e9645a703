# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands between a client and the way out: its policy, and the log of what leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..federation.packet import Packet
from ..federation.transport.ends import Network
from ..federation.transport.sealed import Sealed
from ..state.adapter_state import state_bytes
from ..state.client_errors import ClientError
from .outgoing import KINDS, contents, refuse_unlisted
from .policy import Policy
from .process import DeclinedError
from .sent_log import SENT_NAME, SentLog


__all__ = ["PolicyGate", "gate_at"]

MIB = 2**20


class PolicyGate:
    """
    A [`Gate`] that lets through what a policy allows, and writes down what leaves.

    Args:
        log ([`SentLog`]):
            The log.
        policy ([`Policy`], *optional*):
            The policy. If not given, everything on the list of what leaves may leave; the log is kept all the same.
        is_signed, is_encrypted (`bool`, *optional*, defaults to `False`):
            Whether packets are signed, and encrypted between this client and the coordinator: by what this process
            has set up, whatever the coordinator says.
    """

    def __init__(
        self, log: SentLog, policy: Policy | None = None, is_signed: bool = False, is_encrypted: bool = False
    ) -> None:
        self._log, self._policy = log, policy
        self._packets_are = {"signed": is_signed, "encrypted": is_encrypted}
        self._runs: dict[str, str] = {}  # by client
        self._leaving: dict[str, dict[str, Any]] = {}  # by client what is written of the packet that is next to leave

    def check(self, run: Mapping[str, Any], client: str, num_examples: int, world_size: int) -> None:
        """As [`Gate.check`]."""
        self._runs[client] = str(run.get("run"))[:200]
        if self._policy is None:
            return
        refused = self._policy.violations({**run, **self._packets_are}, num_examples, client, world_size)
        if refused:
            names = ", ".join(dict.fromkeys(f"`{sentence.split('`')[1]}`" for sentence in refused))
            raise DeclinedError(
                f"The policy of client {client!r} does not allow the run ({names}). {' '.join(refused)}"
            )  # the coordinator may cut it off

    def out(self, client: str, answer: Packet) -> Packet:
        """
        As [`Gate.out`].

        Raises:
            ClientError: For what is on no list, and for an update that is too large, or of a round too many: whatever
                the coordinator has said of its run.
        """
        refuse_unlisted(answer)
        leaving = answer
        if self._policy is not None:
            _refuse_excess(answer, self._policy)
            leaving = replace(answer, meta=self._policy.tightened(answer.meta))
        self._leaving[client] = self._described(client, answer, leaving)
        return leaving

    def sent(self, client: str, num_bytes: int) -> None:
        """
        As [`Gate.sent`].

        Raises:
            OSError: If the log cannot be written.
        """
        self._log.write({**self._leaving.pop(client), "bytes": num_bytes})

    def _described(self, client: str, answer: Packet, leaving: Packet) -> dict[str, Any]:
        whole, left = contents(answer), contents(leaving)
        stays = [content.without(left.get(name)) for name, content in whole.items()]
        return {
            "run": self._runs.get(client),
            "client": client,
            "round": leaving.meta.get("round"),
            "kind": leaving.kind,
            "meaning": KINDS[leaving.kind],
            "contains": [str(content) for content in left.values()],
            "held_back": [str(content) for content in stays if content is not None],
        }


def gate_at(folder: str | os.PathLike, network: Network, policy: Policy | None) -> PolicyGate:
    """
    What stands between a site and the way out: its policy, and the log `sent.jsonl`.

    Args:
        folder (`str`):
            The folder of the site, where the log is.
        network ([`Network`]):
            How messages leave.
        policy ([`Policy`], *optional*):
            The policy; without one everything may leave that a run asks for, but the log is kept.
    """
    is_signed = isinstance(network, Sealed)
    log = SentLog(Path(folder) / SENT_NAME)
    return PolicyGate(log, policy, is_signed, is_encrypted=isinstance(network, Sealed) and network.encrypts)


def _refuse_excess(answer: Packet, policy: Policy) -> None:
    size, round = state_bytes(answer.tensors), answer.meta.get("round")
    most_mib, most_rounds = policy.largest_upload_mib, policy.most_rounds
    if most_mib is not None and size > most_mib * MIB:
        raise ClientError(
            f"its update has {size:,} bytes, but `largest_upload_mib` of its policy allows {most_mib * MIB:,.0f}. "
            "Lower `r` of the PEFT config, or raise the bound."
        )
    if answer.kind == "update" and most_rounds is not None and isinstance(round, int) and round > most_rounds:
        raise ClientError(f"it is round {round:,}, but `most_rounds` of its policy allows {most_rounds:,}.")
