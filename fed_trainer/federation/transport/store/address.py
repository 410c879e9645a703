# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from ....state.checks import check_number
from ..ends import Network
from .client import StoreClientEnd
from .lease import Lease
from .objects import Objects
from .server import StoreServerEnd


__all__ = ["Store"]


class Store(Network):
    """
    A folder, a bucket or whatever else fsspec opens, in which coordinator and clients leave messages for each other.
    Nobody listens at a port: all of them read and write there.

    Args:
        address (`str`):
            A folder, `s3://bucket/path`, `gs://bucket/path`, `hf://buckets/<owner>/<name>/path`, ... One run has one
            address.
        patience (`float`, *optional*, defaults to `600.0`):
            Seconds for which a store that does not answer is tried again, and after which a coordinator that shows no
            sign of life counts as gone.
        lease (`float`, *optional*, defaults to `20.0`):
            Seconds after which a coordinator that has died may be replaced by another one.
        storage_options (`dict`, *optional*):
            Passed to the file system, such as `{"endpoint_url": "http://..."}`.

    Example:

    ```python
    >>> from fed_trainer import Store

    >>> trainer.serve(Store("s3://federation/run-1"), clients=["ward-1", "ward-2"])  # at the coordinator
    >>> trainer.join(Store("s3://federation/run-1"), "ward-1")  # at a site
    ```
    """

    def __init__(
        self,
        address: str,
        patience: float = 600.0,
        lease: float = 20.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("patience", patience), ("lease", lease)):
            check_number(name, value, lambda number: number > 0, "a positive number of seconds")
        self.address, self._patience, self._lease, self._options = address, patience, lease, storage_options

    def server_end(self) -> StoreServerEnd:
        objects = self.objects()
        return StoreServerEnd(objects, Lease(objects, self._lease))

    def client_end(self, client: str) -> StoreClientEnd:
        return StoreClientEnd(self.objects(), client, self._patience)

    def objects(self) -> Objects:
        """What is there."""
        return Objects(self.address, self._patience, self._options)
