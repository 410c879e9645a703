# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where things are at an address."""

from __future__ import annotations

import re


__all__ = [
    "MEMBERS",
    "check_name",
    "down_name",
    "generation_name",
    "generation_of",
    "greeting_name",
    "is_session",
    "member_name",
    "session_name",
    "up_name",
]

MEMBERS = "members"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SESSION = re.compile(r"[0-9a-f]{16}")
_GENERATION = re.compile(r"g([0-9]+)")


def check_name(client: str) -> str:
    """
    The name, after refusing one that cannot stand in an address.

    Raises:
        ValueError: Saying what it may be.
    """
    if not _NAME.fullmatch(client) or client.endswith("."):
        raise ValueError(
            f"The client name {client!r} cannot stand in an address. Use up to 64 letters, digits, '.', '_' and '-', "
            "and begin with a letter or a digit, as in 'ward-3'."
        )
    return client


def is_session(text: str) -> bool:
    """Whether it is the id of a process: it comes from elsewhere, and becomes part of names."""
    return _SESSION.fullmatch(text) is not None


def generation_name(generation: int) -> str:
    """All that is sent by one coordinator, and to it."""
    return f"g{generation}"


def generation_of(name: str) -> int | None:
    """The number in a `generation_name`."""
    found = _GENERATION.fullmatch(name)
    return None if found is None else int(found[1])


def greeting_name(generation: int) -> str:
    """What a coordinator shows to all."""
    return f"{generation_name(generation)}/greeting"


def member_name(client: str, number: int) -> str:
    """What the `number`th process under a name says of itself."""
    return f"{MEMBERS}/{client}/{number:06d}"


def session_name(generation: int, client: str, session: str) -> str:
    """All that goes to and from a process."""
    return f"{generation_name(generation)}/{client}/{session}"


def down_name(generation: int, client: str, session: str) -> str:
    """The box with the messages to a client."""
    return f"{session_name(generation, client, session)}/down"


def up_name(generation: int, client: str, session: str) -> str:
    """The box with its answers."""
    return f"{session_name(generation, client, session)}/up"
