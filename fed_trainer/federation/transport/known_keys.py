# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whom a coordinator or a site trusts: the list of public lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peft_scl.foreign_files import short_repr

from ...output.disk import replace_durably
from .keys import KeyFileError, PublicIdentity, no_access


__all__ = ["KnownKeys", "UntrustedKeyError"]

MOST_BYTES = 2**24  # of the list
LOCK_SECONDS = 60.0


class UntrustedKeyError(ValueError):
    """A key is not known under the name that somebody uses it with, or another one is."""


class KnownKeys:
    """
    Whom a coordinator trusts, or a site: the public keys in a file with one line each. Empty lines, and those that
    begin with `#`, are passed over. The file is read once.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        accept_first (`bool`, *optional*, defaults to `False`):
            Trust on first use: the first key that comes with a name is added to the file, which need not be there.
            From then on it is the only one for this name.

    Raises:
        KeyFileError: If the file cannot be read, or a line is malformed, names a site that another line names, or
            repeats a key of another site. The message names the line.
    """

    def __init__(self, path: str | os.PathLike, accept_first: bool = False) -> None:
        self._path = Path(path).resolve()  # the file itself, which is replaced when a key is added
        self._accept_first = accept_first
        self._keys = self._read()

    @property
    def names(self) -> list[str]:
        """Those of the sites that are known."""
        return sorted(self._keys)

    def key_of(self, name: str) -> PublicIdentity:
        """
        The keys of a site.

        Raises:
            UntrustedKeyError: If none are known.
        """
        if name not in self._keys:
            raise UntrustedKeyError(
                f"No key of {short_repr(name)} is known here: add its public line to {str(self._path)!r}, after a "
                "comparison of fingerprints."
            )
        return self._keys[name]

    def accept(self, offered: PublicIdentity) -> PublicIdentity:
        """
        Check keys that somebody shows. This is no proof that they are his: only a signature is.

        Args:
            offered ([`PublicIdentity`]):
                The name and the keys that he shows.

        Returns:
            [`PublicIdentity`]: The same, which is known now, and is on the disk.

        Raises:
            UntrustedKeyError: If other keys are known under this name, the key is that of another name, or none is
                known and the first is not accepted.
            KeyFileError: If the file cannot be written or was damaged.
        """
        if offered.name not in self._keys and self._accept_first:
            self._add(offered)
        if offered.name not in self._keys:
            raise UntrustedKeyError(
                f"{offered.name!r} is unknown here, and shows the key with the fingerprint {offered.fingerprint}. If "
                f"that is the one that the site itself tells you, add this line to {str(self._path)!r}: {offered}"
            )
        known = self._keys[offered.name]
        if known != offered:
            raise UntrustedKeyError(
                f"{offered.name!r} shows the key with the fingerprint {offered.fingerprint}, but {known.fingerprint} "
                f"is known. Somebody else uses its name, or the site has new keys: ask there, and only then replace "
                f"its line in {str(self._path)!r}."
            )
        return known

    def _add(self, offered: PublicIdentity) -> None:
        with _locked(self._path):
            self._keys = self._read()  # another process may have added one
            if offered.name in self._keys:
                return
            if other := _name_of(offered.signing, self._keys):
                raise UntrustedKeyError(
                    f"{offered.name!r} shows the key of {other!r}, and a key belongs to one name: give it keys of its "
                    "own, or the name that it had."
                )
            try:
                text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
                lines = f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{offered}\n"
                beside = self._path.with_name(f"{self._path.name}.new")
                beside.write_text(lines, encoding="utf-8")
                replace_durably(beside, self._path)
            except OSError as error:
                raise no_access(self._path, "written", error) from error
            self._keys[offered.name] = offered

    def _read(self) -> dict[str, PublicIdentity]:
        if self._accept_first and not self._path.exists():
            return {}
        try:
            with self._path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise no_access(self._path, "read", error) from error
        if len(content) > MOST_BYTES:
            raise KeyFileError(
                f"The file {str(self._path)!r} is no list of keys: it has more than {MOST_BYTES} bytes."
            )
        keys: dict[str, PublicIdentity] = {}
        for number, line in enumerate(content.split(b"\n"), start=1):
            try:
                text = line.decode("utf-8").strip()
                if text and not text.startswith("#"):
                    public = PublicIdentity.parse(text)
                    _check_new(public, keys)
                    keys[public.name] = public
            except ValueError as error:
                raise KeyFileError(f"Line {number} of {str(self._path)!r} cannot be used: {error}") from error
        return keys


def _check_new(public: PublicIdentity, keys: dict[str, PublicIdentity]) -> None:
    if public.name in keys:
        raise ValueError(f"a line before it names {public.name!r}, too: leave one of the two.")
    if other := _name_of(public.signing, keys):
        raise ValueError(f"it has the key of {other!r}, and a key belongs to one name: leave one of the two.")


def _name_of(signing: bytes, keys: dict[str, PublicIdentity]) -> str | None:
    return next((name for name, known in keys.items() if known.signing == signing), None)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise KeyFileError(
            f"Another process has held {lock.lock_file!r} for {LOCK_SECONDS:.0f} seconds: see which one."
        ) from error
    except OSError as error:
        raise no_access(path, "written", error) from error
    try:
        yield
    finally:
        lock.release()
