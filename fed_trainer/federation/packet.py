# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the server and a client send each other: tensors, and a small JSON-like dictionary.

The server's side and the client's side meet only here. What is not in a packet, neither knows of the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load, save

from ..state.adapter_state import AdapterState, state_bytes
from ..state.described import storable


__all__ = ["BASE", "DELTA", "DRAWN", "EXTRAS", "OBJECTIVE", "STATE", "Packet", "Reply", "named"]

# parts of the tensors: down
STATE, OBJECTIVE, DRAWN, BASE = "state", "objective", "drawn", "base"
# and up
DELTA, EXTRAS = "delta", "extras"

META = "packet"  # in the metadata of the file
LENGTH = struct.Struct("<Q")  # of the header of a safetensors file, which it begins with
MOST_INTEGER = 2**63
NUMBER_BYTES = 8  # an integer or a float of 64 bits


@dataclass(frozen=True)
class Packet:
    """
    One message between the server and a client.

    Args:
        kind (`str`):
            From the server: `"train"`, a client's turn of a round; `"evaluate"`, an evaluation on its held-out data;
            `"stop"`, the end of the run. From a client: `"update"` and `"metrics"`, what came of the first two;
            `"failed"`, that nothing came of them.
        tensors (`dict[str, torch.Tensor]`):
            On the CPU, as `<part>/<name>`. Nothing changes them in place. Down: `state` (shared tensors that have
            changed since the client was last here), `objective` (what the local objective sends along), `drawn` (what
            every machine could draw itself from the seed of the run; it is counted where it travels), `base` (what
            goes into base weights, as factors, to clients elsewhere). Up: `delta` and `extras`.
        meta (`dict[str, Any]`):
            What goes into JSON. Down: `round`, `client`, `lr_factor`, `counted` (the last round in which an update
            of the client counted; none, if there is none), `saved` (the same, as of the last checkpoint of the
            server, to which it may go back), `rank` (if it is not that of the PEFT config), `base_bytes` (of what
            went into base weights since the client was last here and is not carried: in one process the base is
            the server's too), `base_is` (what `base` holds: `"change"`, since the client's last packet, or `"sum"`,
            of all rounds). Up: `round`, `client`, `num_examples`, `num_steps`, `num_tokens`, `base_digest`,
            `numbers` (the names of those that the rule reads), `figures`, `moved`, `has_rate`, `seconds`; of
            `"metrics"`: `num_examples` and `metrics`; of `"failed"`: `reason`. A number that may not leave the
            client is `None`, figures are `{"figures_withheld": True}`.
    """

    kind: str
    tensors: AdapterState = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> AdapterState:
        """The tensors of a part, by name."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    @property
    def num_bytes(self) -> int:
        """
        Bytes of what is sent: the tensors as they are encoded, what went into base weights, and 8 per number that
        the rule reads. Names, framing and figures for the record are not counted, nor, in one process, what both
        sides can draw.
        """
        is_elsewhere = "base_is" in self.meta
        sent = {key: tensor for key, tensor in self.tensors.items() if is_elsewhere or not key.startswith(f"{DRAWN}/")}
        numbers, base = self.meta.get("numbers"), self.meta.get("base_bytes")
        num_numbers = len(numbers) if isinstance(numbers, list) else 0
        return state_bytes(sent) + (base if isinstance(base, int) else 0) + NUMBER_BYTES * num_numbers

    def to_bytes(self) -> bytes:
        """
        As one safetensors file, with the dictionary as JSON in its metadata; numbers that are not finite are strings.
        """
        meta = json.dumps({"kind": self.kind, "meta": storable(self.meta)}, allow_nan=False)
        return save({key: tensor.contiguous() for key, tensor in self.tensors.items()}, metadata={META: meta})

    @classmethod
    def from_bytes(cls, content: bytes) -> Packet:
        """
        What `to_bytes` has written. Nothing is unpickled.

        Raises:
            ValueError: If it is something else.
        """
        try:
            (length,) = LENGTH.unpack_from(content)
            header = json.loads(content[LENGTH.size : LENGTH.size + length])
            told = json.loads(
                header["__metadata__"][META], parse_int=_integer, parse_float=_finite, parse_constant=_finite
            )
            packet = cls(told["kind"], load(content), told["meta"])
        except Exception as error:  # whatever bytes of somebody else's lead to
            raise ValueError(f"This is no packet of a federation ({type(error).__name__}).") from error
        if not isinstance(packet.kind, str) or not isinstance(packet.meta, dict):
            raise ValueError("This is no packet of a federation: its kind is no text, or its dictionary none.")
        return packet


def _integer(text: str) -> int:
    """A number of somebody else's, that arithmetic with floats bears."""
    value = int(text)
    if abs(value) >= MOST_INTEGER:
        raise ValueError("an integer of many digits")
    return value


def _finite(text: str) -> float:
    """Numbers that are not finite travel as strings, so that none comes in where a number is expected."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


@dataclass(frozen=True)
class Reply:
    """
    What came of a packet: exactly one for each.

    Args:
        client (`str`):
            The client that the packet went to.
        status (`str`):
            `"ok"`, `"error"` (its turn failed: the packet has arrived), `"timeout"` or `"lost"` (nobody answers).
        packet ([`Packet`], *optional*):
            Its answer, if it is `"ok"`.
        reason (`str`, *optional*):
            What is wrong otherwise, in words that may stand in the record.
        seconds (`Mapping[str, float]`):
            What its turn took, by phase.
    """

    client: str
    status: str = "ok"
    packet: Packet | None = None
    reason: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def named(part: str, state: AdapterState) -> AdapterState:
    """The tensors of a part under their names in a packet."""
    return {f"{part}/{key}": tensor for key, tensor in state.items()}
