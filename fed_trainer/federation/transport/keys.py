# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Who is who between machines: the keys of a site, in a private file and as a public line."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_scl.foreign_files import short_repr

from ...output.disk import sync


__all__ = ["Identity", "KeyFileError", "PublicIdentity", "make_keys", "no_access"]

KIND = "fed-ed25519"  # the first word of a public line
FORMAT = "fed-trainer private key, version 1"
KEY_BYTES = 32  # of a key of either sort
MOST_BYTES = 2**16  # of a file of private keys
MOST_NAME = 200  # characters
GROUPS, GROUP_DIGITS = 8, 4  # of a fingerprint: 128 bits


class KeyFileError(ValueError):
    """A file of keys, or a line of one, cannot be used."""


@dataclass(frozen=True)
class PublicIdentity:
    """
    What others may know of a site. `str()` of it is one line of text: `fed-ed25519 <both keys in base64> <name>`.

    Args:
        name (`str`):
            The site's name: printable characters in one line.
        signing (`bytes`):
            Its public key of Ed25519, which its signatures are checked with.
        encryption (`bytes`):
            Its public key of X25519, which messages to it are encrypted with.

    Raises:
        ValueError: For a name that does not fit into a line, or keys that are not 32 bytes long.
    """

    name: str
    signing: bytes
    encryption: bytes

    def __post_init__(self) -> None:
        _check_identity(self.name, self.signing, self.encryption)

    @classmethod
    def parse(cls, line: str) -> PublicIdentity:
        """
        What a public line says.

        Raises:
            ValueError: If it is none, or nothing can be encrypted with its second key.
        """
        from . import ciphers

        words = line.strip().split(" ", 2)
        if len(words) < 3 or words[0] != KIND:
            raise ValueError(f"A public line is `{KIND} <base64> <name>`, but this one is {short_repr(line)}.")
        keys = _decoded(words[1])
        if len(keys) != 2 * KEY_BYTES:
            raise ValueError(
                f"The second word of a public line is {2 * KEY_BYTES} bytes in base64, but here are {len(keys)}: copy "
                "all of it."
            )
        public = cls(words[2], keys[:KEY_BYTES], keys[KEY_BYTES:])
        if not ciphers.can_encrypt_for(public.encryption):
            raise ValueError(f"The second key of {public.name!r} is none that one can encrypt with: make new keys.")
        return public

    def __str__(self) -> str:
        return f"{KIND} {_encoded(self.signing + self.encryption)} {self.name}"

    @property
    def fingerprint(self) -> str:
        """Half of the SHA-256 of both keys, in groups of digits to be read out and compared."""
        digits = hashlib.sha256(self.signing + self.encryption).hexdigest()
        return "-".join(digits[GROUP_DIGITS * group : GROUP_DIGITS * (group + 1)] for group in range(GROUPS))


@dataclass(frozen=True)
class Identity:
    """
    A site with its private keys, which its `repr` does not show.

    Args:
        name (`str`):
            The site's name.
        signing (`bytes`):
            Its private key of Ed25519.
        encryption (`bytes`):
            Its private key of X25519.

    Raises:
        ValueError: As [`PublicIdentity`].
    """

    name: str
    signing: bytes = field(repr=False)
    encryption: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_identity(self.name, self.signing, self.encryption)

    @classmethod
    def create(cls, path: str | os.PathLike, name: str) -> Identity:
        """
        Make new keys, and write them to a file that only its owner can read. Nothing is overwritten.

        Raises:
            ValueError: For a name that does not fit into a line.
            KeyFileError: If there is something at `path`, or it cannot be written.
        """
        from . import ciphers

        identity = cls(name, ciphers.new_signing_key(), ciphers.new_encryption_key())
        content = {
            "format": FORMAT,
            "name": name,
            "ed25519": _encoded(identity.signing),
            "x25519": _encoded(identity.encryption),
        }
        _write_private(Path(path), (json.dumps(content, indent=2) + "\n").encode())
        return identity

    @classmethod
    def load(cls, path: str | os.PathLike) -> Identity:
        """
        The keys that `create` has written.

        Raises:
            KeyFileError: If the file cannot be read, others than its owner can, or it is something else. The message
                shows nothing of its content.
        """
        path = Path(path)
        content = _read_private(path)
        try:
            told = json.loads(content)
            if told["format"] != FORMAT:
                raise ValueError("another format")
            return cls(told["name"], _decoded(told["ed25519"]), _decoded(told["x25519"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise KeyFileError(
                f"The file {str(path)!r} holds no private keys of a site as `fed-trainer keys` writes them: name "
                "another file, or restore this one from a backup."
            ) from None  # what the cause says may be private

    @property
    def public(self) -> PublicIdentity:
        """What others may know."""
        from . import ciphers

        return PublicIdentity(
            self.name, ciphers.public_signing_key(self.signing), ciphers.public_encryption_key(self.encryption)
        )

    @property
    def fingerprint(self) -> str:
        """That of the public keys."""
        return self.public.fingerprint


def make_keys(path: str | os.PathLike, name: str) -> PublicIdentity:
    """Make the keys of a site, as [`Identity.create`] does, and return what others may know."""
    return Identity.create(path, name).public


def _check_identity(name: Any, *keys: bytes) -> None:
    is_name = isinstance(name, str) and 0 < len(name) <= MOST_NAME
    if not is_name or name != name.strip() or not name.isprintable():
        raise ValueError(
            f"The name of a site consists of 1 to {MOST_NAME} printable characters, without a space at either end, "
            f"but this one is {short_repr(name)}."
        )
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ValueError(f"A key has {KEY_BYTES} bytes, but one of {name!r} has {len(key)}.")


def _encoded(keys: bytes) -> str:
    return base64.b64encode(keys).decode("ascii")


def _decoded(text: str) -> bytes:
    """What `_encoded` was given; its errors do not show the text, which may be private."""
    keys = base64.b64decode(text, validate=True)
    if _encoded(keys) != text:  # there are several ways to write the last bits
        raise ValueError("A key is not in the base64 that this program writes.")
    return keys


def _write_private(path: Path, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise KeyFileError(
            f"There is a file {str(path)!r}, and keys are never overwritten: name another one, or move it away."
        ) from error
    except OSError as error:
        raise no_access(path, "written", error) from error
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        sync(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)  # it was made here
        raise no_access(path, "written", error) from error


def _read_private(path: Path) -> bytes:
    """The content of a file that only its owner can read; outside POSIX, there are no modes to ask for."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name == "posix" and mode & 0o077:
                raise KeyFileError(
                    f"The private keys in {str(path)!r} can be read or written by others (mode {mode & 0o777:04o}): "
                    f"run `chmod 600 {path}`. If somebody else may have read it, make new keys."
                )
            return file.read(MOST_BYTES)
    except OSError as error:
        raise no_access(path, "read", error) from error


def no_access(path: Path, verb: str, error: OSError) -> KeyFileError:
    """The error for a file that cannot be read or written, as `verb` says."""
    return KeyFileError(f"The file {str(path)!r} cannot be {verb} ({error.strerror}).")
