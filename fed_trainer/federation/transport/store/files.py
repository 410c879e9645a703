# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Single files at an address that fsspec opens, tried again while the store does not answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from transformers.utils import logging

from ..ends import NetworkError


__all__ = ["FIRST_PAUSE", "LONGEST_PAUSE", "Files", "StoreError"]

logger = logging.get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts at a store that does not answer

# without folders: what is missing there is the bucket, which is not ours to make
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "hf"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# of botocore and google.auth, which may not be installed: no time helps
REFUSED = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
MISUSED = {"ParamValidationError", "NoRegionError"}


class StoreError(NetworkError):
    """A store that cannot be used."""


class Files:
    """
    The files below one address, by their names.

    Args:
        address (`str`):
            Whatever [`fsspec.url_to_fs`](https://filesystem-spec.readthedocs.io) takes: a folder, `s3://bucket/path`,
            `memory://path`, ...
        patience (`float`):
            Seconds for which a store that does not answer is tried again.
        storage_options (`dict`, *optional*):
            Passed to the file system, such as `{"endpoint_url": ...}`.
        sleep, clock (`Callable`, *optional*):
            Those of `time`.

    Raises:
        StoreError: If the address cannot be opened; the message says what is missing.
    """

    def __init__(
        self,
        address: str,
        patience: float,
        storage_options: dict[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address, self._patience = address, patience
        self.sleep, self._clock = sleep, clock
        scheme = urlsplit(address).scheme
        self._has_folders = scheme not in BUCKETS
        self._fs, self._root = _opened(address, scheme, storage_options or {})

    @property
    def is_local(self) -> bool:
        """Whether a look costs next to nothing."""
        return isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """The content; `None` if it is not there."""

        def act() -> bytes | None:
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError as error:
                self._refuse_no_bucket(error)
                return None
            return content

        return self._insisting(act, f"read {name!r}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of one that is there; who reads it meanwhile may see half of it."""
        self._insisting(lambda: self._pipe(self._path(name), content), f"write {name!r}")

    def replace(self, name: str, content: bytes) -> None:
        """As `write`, but whole or not at all, where that can be had: in a folder, and where files are objects."""
        if not self.is_local:
            return self.write(name, content)
        path = self._path(name)

        def act() -> None:
            beside = f"{path}.{secrets.token_hex(4)}"
            self._pipe(beside, content)
            self._fs.mv(beside, path)

        return self._insisting(act, f"write {name!r}")

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

        def act() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._insisting(act, f"delete {name!r}")

    def names(self, folder: str) -> list[str]:
        """The names in a folder, as far as a listing shows them: it may lag behind."""

        def act() -> list[str]:
            try:
                paths = self._fs.ls(self._path(folder), detail=False, refresh=True)
            except FileNotFoundError:
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in paths} - {""})

        return self._insisting(act, f"list {folder!r}")

    def delete_folder(self, folder: str) -> None:
        """Delete what is in a folder, as far as a listing shows it."""

        def act() -> None:
            try:
                self._fs.rm(self._path(folder), recursive=True)
            except FileNotFoundError:
                return

        self._insisting(act, f"delete {folder!r}")

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _pipe(self, path: str, content: bytes) -> None:
        try:
            self._fs.pipe_file(path, content)
        except FileNotFoundError as error:
            if not self._has_folders:
                raise self._no_bucket() from error
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content)

    def _refuse_no_bucket(self, error: FileNotFoundError) -> None:
        """Of s3fs, which says so; elsewhere it shows when something is written."""
        if not self._has_folders and "NoSuchBucket" in str(error.__cause__):
            raise self._no_bucket() from error

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"{self.address!r} is in a bucket that does not exist. Look for a misspelling, or make the bucket first."
        )

    def _insisting(self, act: Callable[[], T], what: str) -> T:
        """
        What `act` returns, tried again while the store does not answer.

        Raises:
            StoreError: If it does not for too long, or does not let us.
        """
        began, pause = self._clock(), FIRST_PAUSE
        while True:
            try:
                return act()
            except StoreError:
                raise
            except Exception as error:  # whatever a file system raises where its server does not answer
                if refusal := self._refusal(error, what):
                    raise refusal from error
                if self._clock() - began >= self._patience:
                    raise StoreError(
                        f"{self.address!r} did not let this process {what} for {self._patience:.0f} seconds "
                        f"({type(error).__name__}: {error}). Nothing is lost: start again once it answers."
                    ) from error
                logger.warning(f"{self.address!r}: could not {what} ({type(error).__name__}: {error}); trying again.")
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _refusal(self, error: Exception, what: str) -> StoreError | None:
        """What is to be said of an error that no waiting helps against."""
        name = type(error).__name__
        if isinstance(error, PermissionError) or name in REFUSED:
            return StoreError(
                f"{self.address!r} does not let this process {what} ({error}). Ask for the right to read, write and "
                "delete below this address, and look whether its credentials are set."
            )
        if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
            return StoreError(f"{self.address!r} cannot {what} ({error}). Give a folder of its own as the address.")
        if isinstance(error, (ImportError, NotImplementedError, TypeError)) or type(error) is ValueError:
            return StoreError(f"{self.address!r} cannot be used to {what} ({error}). Give another address.")
        if name in MISUSED:
            return StoreError(f"{self.address!r} cannot be used ({error}). Look for a misspelling in the address.")
        return None


def _opened(address: str, scheme: str, storage_options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system, and the path in it."""
    options: dict[str, Any] = {"use_listings_cache": False}  # others write there, too
    if scheme in ("s3", "s3a"):
        options["max_concurrency"] = 1  # more, and s3fs asks for the size first, and lists what is not there
    try:
        fs, root = fsspec.url_to_fs(address, **options, **storage_options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        how = "Install it, or give another address."
        raise StoreError(
            f"The address {address!r} needs a package that is not installed ({error}). "
            f"{how if extra is None else f'''`pip install 'peft-scl[{extra}]'` installs it.'''}"
        ) from error
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"The address {address!r} cannot be opened ({error}). Give a folder, or an address that fsspec knows, "
            "such as 's3://bucket/run'."
        ) from error
    if "::" in address or not root.strip("/"):
        raise StoreError(
            f"The address {address!r} is no place of its own{' (it chains file systems)' if '::' in address else ''}. "
            "Give a folder, or a path in a bucket, such as 's3://bucket/run'."
        )
    return fs, root
