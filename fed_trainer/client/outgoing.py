# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What leaves a client: the one list of it, in words, and what holds it back. What is not on it does not leave."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..federation.packet import DELTA, EXTRAS, Packet
from ..output.figures import FIGURES_WITHHELD
from ..state.adapter_state import AdapterState, state_bytes
from ..state.client_errors import ClientError


__all__ = ["KINDS", "OUTGOING", "TENSORS", "Content", "Outgoing", "contents", "held_back", "refuse_unlisted"]

COUNTS, LABELS, METRICS = "example_counts", "label_counts", "metrics"
# figures from which numbers of examples or tokens follow
_TELLS_COUNTS = re.compile(
    r"epoch|num_input_tokens_seen|(.*_)?(num_tokens|runtime|samples|(samples|steps|tokens)_per_second)"
)


@dataclass(frozen=True)
class Outgoing:
    """
    A field of the dictionary of a packet that a client sends.

    Args:
        words (`str`):
            What it is, for a data-protection officer.
        closed_by (`tuple[str, ...]`, *optional*):
            The fields of `may_leave` of a policy, each of which holds it back. Nothing does if not given: the
            federation cannot do without it.
        withheld (`Any`, *optional*):
            What is sent in its place.
        shows (`str`, *optional*):
            What the log of what has left quotes of it: `"names"`, of what it holds, or its `"text"`. Neither is a
            value of the data.
    """

    words: str
    closed_by: tuple[str, ...] = ()
    withheld: Any = None
    shows: str | None = None


KINDS = {
    "joined": "says that the client takes part",
    "update": "what has come of the training of a round",
    "metrics": "what an evaluation has measured",
    "failed": "says that nothing has come of it, and why",
}
"""The packets that a client sends, by their kind."""

TENSORS = {DELTA: "change of the trained weights", EXTRAS: "numbers that the local objective sends along"}
"""The tensors of an update, by their part."""

OUTGOING: dict[str, Outgoing] = {
    "round": Outgoing("number of the round"),
    "client": Outgoing("name of the client"),
    "versions": Outgoing("versions of the software", shows="names"),
    "has_held_out": Outgoing("whether the client has data to evaluate on", (METRICS,)),
    "base_digest": Outgoing("digest of the base model"),
    "num_examples": Outgoing("number of examples", (COUNTS,)),
    "num_tokens": Outgoing("number of tokens that carry a loss", (COUNTS,)),
    "label_counts": Outgoing("number of examples by label", (LABELS, COUNTS)),  # their sum is the number of examples
    "num_steps": Outgoing("number of local steps"),
    "numbers": Outgoing("which numbers the aggregation reads", shows="names"),
    "figures": Outgoing("figures of the training", (METRICS,), {FIGURES_WITHHELD: True}, shows="names"),
    "metrics": Outgoing("figures of the evaluation", (METRICS,), {FIGURES_WITHHELD: True}, shows="names"),
    "moved": Outgoing("whether the training has changed anything"),
    "has_rate": Outgoing("whether the learning rate was above zero"),
    # how long the preparation takes tells how many rows there are
    "seconds": Outgoing("seconds of its work by phase", (METRICS, COUNTS), {}, shows="names"),
    "reason": Outgoing("reason", shows="text"),
    "is_damaged": Outgoing("that the message to the client was damaged on the way"),
}
"""The rest of what a packet says, by the name in `Packet.meta`."""


def refuse_unlisted(packet: Packet) -> None:
    """
    Refuse a packet with anything of which nobody has decided whether it may leave.

    Raises:
        ClientError: Naming it.
    """
    if packet.kind not in KINDS:
        raise ClientError(f"it would send a message of the kind {packet.kind!r}, which is none of {sorted(KINDS)}.")
    parts = TENSORS if packet.kind == "update" else ()
    unknown = [f"tensor {key!r}" for key in packet.tensors if key.partition("/")[0] not in parts]
    unknown += [f"field {name!r}" for name in packet.meta if name not in OUTGOING]
    if unknown:
        raise ClientError(
            f"it would send the {unknown[0]} ({packet.kind!r}), but what may leave a client is a list, which does not "
            "have it. Add it to fed_trainer/client/outgoing.py, with what holds it back."
        )


def held_back(meta: Mapping[str, Any], closed: Collection[str]) -> dict[str, Any]:
    """
    The dictionary of an outgoing packet without what may not leave.

    Args:
        meta (`Mapping[str, Any]`):
            As the client would send it, all of it in `OUTGOING`; not changed.
        closed (`Collection[str]`):
            The fields of `may_leave` that are `False`.

    Returns:
        `dict[str, Any]`: The same fields. In the place of a number that is held back stands `None`, never another
        number.
    """
    return {name: _held_back(OUTGOING[name], value, closed) for name, value in meta.items()}


def _held_back(field: Outgoing, value: Any, closed: Collection[str]) -> Any:
    if any(switch in closed for switch in field.closed_by):
        return copy.deepcopy(field.withheld)
    return _without_counts(value) if COUNTS in closed and METRICS in field.closed_by else value


def _without_counts(figures: Any) -> Any:
    """Figures, on all levels, without those that tell numbers of examples."""
    if not isinstance(figures, Mapping):
        return figures
    return {name: _without_counts(value) for name, value in figures.items() if not _TELLS_COUNTS.fullmatch(str(name))}


class Content(NamedTuple):
    """What a part or a field of a packet is, in words, and what the log quotes of it."""

    words: str
    quotes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.words}: {', '.join(self.quotes)}" if self.quotes else self.words

    def without(self, left: Content | None) -> Content | None:
        """What is not in `left`, which is the same field after something was held back; `None` if nothing is."""
        if left is None:
            return self
        missing = tuple(quote for quote in self.quotes if quote not in left.quotes)
        return Content(self.words, missing) if missing else None


def contents(packet: Packet) -> dict[str, Content]:
    """
    What a packet holds, by the part of its tensors or the field. No number of it is told, and no name of a label.

    Args:
        packet ([`Packet`]):
            All of it is on the list.
    """
    parts = {part: packet.part(part) for part in TENSORS}
    told = {part: Content(TENSORS[part], (_described(tensors),)) for part, tensors in parts.items() if tensors}
    for name, value in packet.meta.items():
        field = OUTGOING[name]
        if value is None or value == field.withheld or value in ([], {}):
            continue
        quotes = _names(value) if field.shows == "names" else [str(value)] if field.shows == "text" else []
        told[name] = Content(field.words, tuple(quotes))
    return told


def _described(tensors: AdapterState) -> str:
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    return f"{len(tensors):,} tensor{'s' if len(tensors) > 1 else ''} of {dtypes}, {state_bytes(tensors):,} bytes"


def _names(value: Any, within: str = "") -> list[str]:
    """The names of what a field holds, on all levels."""
    if isinstance(value, Mapping):
        return [name for key, inner in value.items() for name in _names(inner, f"{within}{key}/")]
    return [within.rstrip("/")] if within else [str(name) for name in value]
