# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is carried between machines: bytes with a header, signed by whom they are from, and encrypted for whom they are.

    magic (7) | version (1) | 1 if encrypted (1) | bytes of the header (4, big-endian) | header
    | SHA-256 of the payload (32) | signature (64) | payload

The header is JSON in the clear. The payload is the content, or what HPKE (RFC 9180: X25519, HKDF-SHA256,
ChaCha20-Poly1305) makes of it: the key of this message, the encrypted content and its tag. The signature is over all
that is before it, and so, by the SHA-256, over the payload as it is carried. What the payload is encrypted with
depends on all that is before the SHA-256, too, and on the sender's public key: with another header, or a signature of
somebody else in place of the first, it cannot be decrypted.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from peft_scl.foreign_files import short_repr

from .ends import DamagedMessageError
from .keys import Identity, PublicIdentity


__all__ = ["Header", "RefusedMessageError", "seal", "unseal"]

MAGIC, VERSION = b"fedseal", 1
START = struct.Struct(">7sBBI")
DIGEST_BYTES, SIGNATURE_BYTES = 32, 64
MOST_HEADER = 2**16  # bytes
MISSING = object()
SCALARS = (str, int, float, type(None))
MOST_ENCRYPTED = 2**31 - 2**10  # bytes of content, beyond which the library refuses


class RefusedMessageError(DamagedMessageError):
    """A message is not what is expected here: another one, from somebody else, damaged, or not for this key."""


@dataclass(frozen=True)
class Header:
    """
    Which message this is: carried in the clear, and signed. Whoever takes a message says which one he expects.

    Args:
        run (`str`):
            The run that it belongs to.
        sender (`str`):
            The name of whom it is from. The receiver looks up the key under this name.
        recipient (`str`):
            The name of whom it is for.
        generation (`int`):
            Which start of the coordinator it belongs to: a message to or from an earlier one is stale.
        session (`str`):
            Which start of the client it belongs to.
        number (`int`):
            Which message of its sender in this session it is.
        kind (`str`):
            What it is for: two messages of different kinds cannot stand in each other's place.
    """

    run: str
    sender: str
    recipient: str
    generation: int
    session: str
    number: int
    kind: str

    def to_bytes(self) -> bytes:
        """As JSON in its one form: sorted, without spaces, in ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode("ascii")


def seal(content: bytes, header: Header, identity: Identity, recipient: PublicIdentity | None = None) -> bytes:
    """
    Make a message of `content`.

    Args:
        content (`bytes`):
            What to send.
        header ([`Header`]):
            Which message it is.
        identity ([`Identity`]):
            Whose signature it gets.
        recipient ([`PublicIdentity`], *optional*):
            Whom it is encrypted for; it is in the clear, if not given.

    Raises:
        ValueError: For a header of more than 64 KiB, or more than 2 GiB to encrypt.
    """
    told = header.to_bytes()
    if len(told) > MOST_HEADER:
        raise ValueError(f"A header has at most {MOST_HEADER} bytes, but this one has {len(told)}: use shorter names.")
    start = START.pack(MAGIC, VERSION, recipient is not None, len(told)) + told
    payload = content if recipient is None else _encrypt(content, start, identity, recipient)
    head = start + hashlib.sha256(payload).digest()
    return b"".join((head, _signature(head, identity), payload))


def unseal(
    sealed: bytes, expected: Header, sender: PublicIdentity, identity: Identity, must_be_encrypted: bool = False
) -> bytes:
    """
    The content of a message, if it is the one that is expected. Nothing remembers which ones came before: a message
    that comes twice is taken twice, unless `expected` has moved on.

    Args:
        sealed (`bytes`):
            What has come, from whomever.
        expected ([`Header`]):
            Which message it should be.
        sender ([`PublicIdentity`]):
            What is known under the name `expected.sender`.
        identity ([`Identity`]):
            Who opens it, if it is encrypted.
        must_be_encrypted (`bool`, *optional*, defaults to `False`):
            Refuse what came in the clear.

    Raises:
        RefusedMessageError: Whatever is wrong. In this order: it is no message, or of another version; its header; it
            is in the clear and should not be; its signature; its SHA-256; it cannot be decrypted.
    """
    parts = _split(sealed)
    _check_header(parts.header, expected)
    name = f"The message {expected.kind!r} of {expected.sender!r}"
    if must_be_encrypted and not parts.is_encrypted:
        raise RefusedMessageError(
            f"{name} is in the clear, but this run's messages are encrypted: start the sender again, so that it reads "
            "how this run is served."
        )
    _check_signature(name, parts, sender)
    if hashlib.sha256(parts.payload).digest() != parts.digest:
        raise RefusedMessageError(f"{name} was damaged on the way, or cut off: its SHA-256 is another one.")
    return _decrypt(name, parts, sender, identity) if parts.is_encrypted else bytes(parts.payload)


class _Parts(NamedTuple):
    start: bytes  # up to the header, with it
    is_encrypted: bool
    header: bytes
    digest: bytes
    signature: bytes
    payload: memoryview

    @property
    def signed(self) -> bytes:
        return self.start + self.digest


def _split(sealed: bytes) -> _Parts:
    if len(sealed) < START.size or sealed[: len(MAGIC)] != MAGIC:
        raise RefusedMessageError(f"This is no message of a federation: it begins with {short_repr(sealed[:16])}.")
    _, version, is_encrypted, length = START.unpack_from(sealed)
    if version != VERSION or is_encrypted > 1:
        raise RefusedMessageError(
            f"This message is in version {version}.{is_encrypted} of the format, but {VERSION}.0 and {VERSION}.1 are "
            "read here: use the same version of peft-scl on both sides."
        )
    end = START.size + length
    after = end + DIGEST_BYTES
    payload = after + SIGNATURE_BYTES
    if length > MOST_HEADER or payload > len(sealed):
        raise RefusedMessageError(
            f"This message was damaged on the way, or cut off: its header should have {length} bytes, and all of it "
            f"has {len(sealed)}."
        )
    return _Parts(
        start=sealed[:end],
        is_encrypted=bool(is_encrypted),
        header=sealed[START.size : end],
        digest=sealed[end:after],
        signature=sealed[after:payload],
        payload=memoryview(sealed)[payload:],
    )


def _check_header(header: bytes, expected: Header) -> None:
    """Bytes are compared, so that `1`, `1.0` and `true` differ; the fields are for the sentence only."""
    if header == expected.to_bytes():
        return
    try:
        found = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise RefusedMessageError(
            f"The header of a message that should be {expected.kind!r} of {expected.sender!r} is no JSON: it was "
            "damaged on the way, or is not ours."
        ) from error
    found = found if isinstance(found, dict) else {}
    for name in (field.name for field in fields(Header)):
        value, wanted = found.get(name, MISSING), getattr(expected, name)
        if type(value) is not type(wanted) or value != wanted:
            raise RefusedMessageError(
                f"A message says that its `{name}` is {_shown(value)}, but {_shown(wanted)} is expected, in "
                f"{expected.kind!r} of {expected.sender!r}. It was repeated, is for somebody else, or of another run."
            )
    raise RefusedMessageError(
        f"The header of the message {expected.kind!r} of {expected.sender!r} is not written as this version writes "
        "it: use the same version of peft-scl on both sides."
    )


def _check_signature(name: str, parts: _Parts, sender: PublicIdentity) -> None:
    from . import ciphers

    if not ciphers.signed_by(sender.signing, parts.signature, parts.signed):
        raise RefusedMessageError(
            f"{name} is not signed with the key that is known ({sender.fingerprint}): it was changed on the way, is "
            "from somebody else, or the sender has new keys, whose public line has to be known here first."
        )


def _signature(head: bytes, identity: Identity) -> bytes:
    from . import ciphers

    return ciphers.sign(head, identity.signing)


def _encrypt(content: bytes, start: bytes, identity: Identity, recipient: PublicIdentity) -> bytes:
    from . import ciphers

    if len(content) > MOST_ENCRYPTED:
        raise ValueError(f"At most {MOST_ENCRYPTED} bytes can be encrypted as one, but these are {len(content)}.")
    return ciphers.encrypt(content, recipient.encryption, _info(start, identity.public))


def _decrypt(name: str, parts: _Parts, sender: PublicIdentity, identity: Identity) -> bytes:
    from . import ciphers

    try:
        return ciphers.decrypt(parts.payload, identity.encryption, _info(parts.start, sender))
    except ciphers.CannotDecryptError as error:
        raise RefusedMessageError(
            f"{name} cannot be decrypted with the key of {identity.name!r} ({identity.fingerprint}): it is for "
            "another key, or was changed before it was signed. Give the sender this side's public line."
        ) from error


def _info(start: bytes, sender: PublicIdentity) -> bytes:
    """What the secret depends on: two messages with other headers, or of other senders, have no secret in common."""
    return start + sender.signing


def _shown(value: Any) -> str:
    """A value of a header in a message; what may be nested too deeply to be shown by its type."""
    if value is MISSING:
        return "missing"
    return short_repr(value) if isinstance(value, SCALARS) else f"a {type(value).__name__}"
