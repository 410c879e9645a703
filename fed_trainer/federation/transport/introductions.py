# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The first message of each side, which shows its keys: the greeting of a coordinator and the hello of a client.

    public line | line feed | a sealed message with the same line, a line feed and the content

The line outside says which key to check the signature with, and the one inside makes it part of what is signed: nobody
can put another key for encryption into it.
"""

from __future__ import annotations

from peft_scl.foreign_files import short_repr

from .keys import KIND, Identity, PublicIdentity
from .seal import Header, RefusedMessageError, seal, unseal


__all__ = ["introduce", "is_introduction", "offered_by", "open_introduction"]

MOST_LINE = 2**11  # bytes: the longest name in UTF-8, and the keys


def introduce(content: bytes, header: Header, identity: Identity) -> bytes:
    """A first message, in the clear: whoever reads it may not be known yet."""
    line = f"{identity.public}\n".encode()
    return line + seal(line + content, header, identity)


def is_introduction(message: bytes) -> bool:
    """Whether it shows keys, whoever's they are."""
    return message.startswith(f"{KIND} ".encode())


def offered_by(message: bytes) -> PublicIdentity:
    """
    Whom a first message says that it is from. Nothing is checked yet.

    Raises:
        RefusedMessageError: If it shows no keys.
    """
    line = message[:MOST_LINE].partition(b"\n")[0]
    try:
        return PublicIdentity.parse(line.decode("utf-8"))
    except ValueError as error:
        raise RefusedMessageError(f"The keys in it cannot be read: {error}") from error


def open_introduction(message: bytes, expected: Header, offered: PublicIdentity, identity: Identity) -> bytes:
    """
    The content of a first message, if it is signed with the keys that it shows. Whether these are trusted is not asked
    here.

    Args:
        message (`bytes`):
            What has come.
        expected ([`Header`]):
            Which message it should be.
        offered ([`PublicIdentity`]):
            Whom it is from, as [`offered_by`] says.
        identity ([`Identity`]):
            Who opens it.

    Raises:
        RefusedMessageError: If it is another message, or not signed with these keys.
    """
    line = f"{offered}\n".encode()
    if not message.startswith(line):
        raise RefusedMessageError(f"Its first line is not written as {short_repr(str(offered))}.")
    content = unseal(message[len(line) :], expected, offered, identity)
    if not content.startswith(line):
        raise RefusedMessageError(f"{offered.name!r} has signed other keys than are shown beside it.")
    return content[len(line) :]
