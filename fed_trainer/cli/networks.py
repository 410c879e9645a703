# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands behind an address."""

from __future__ import annotations

from dataclasses import dataclass

from ..federation.transport.ends import Network
from ..federation.transport.keys import Identity
from ..federation.transport.known_keys import KnownKeys
from ..federation.transport.nvflare import NVFlare
from ..federation.transport.sealed import Sealed
from ..federation.transport.store import Store


__all__ = ["KeyOptions", "network_at", "with_keys"]

NVFLARE = "nvflare:"


@dataclass(frozen=True)
class KeyOptions:
    """
    Who may speak.

    Args:
        key (`str`, *optional*):
            File with the keys of this process; without them nothing is signed.
        known (`str`, *optional*):
            File with the public lines of the others.
        accept_first (`bool`, *optional*, defaults to `False`):
            Whether the first key that comes under a name is added to it.
        encrypts (`bool`, *optional*, defaults to `False`):
            Whether messages are encrypted.

    Raises:
        ValueError: For one without the others.
    """

    key: str | None = None
    known: str | None = None
    accept_first: bool = False
    encrypts: bool = False

    def __post_init__(self) -> None:
        if self.key is None and (self.known is not None or self.accept_first or self.encrypts):
            raise ValueError(
                "`--known`, `--accept-first` and `--encrypt` need the keys of this process (`--key FILE`). "
                "`fed-trainer keys FILE --name NAME` makes some."
            )
        if self.key is not None and self.known is None:
            raise ValueError("`--key` needs the list of those who are known here (`--known FILE`).")


def network_at(
    address: str, patience: float, endpoint_url: str | None = None, keys: KeyOptions | None = None
) -> Network:
    """
    The network at an address of the command line.

    Args:
        address (`str`):
            Whatever a [`Store`] takes, or `nvflare:` and the profile of a site, see [`NVFlare`].
        patience (`float`):
            Seconds without a sign of the other side.
        endpoint_url (`str`, *optional*):
            Of a server that speaks S3.
        keys ([`KeyOptions`], *optional*):
            Who may speak.

    Raises:
        ValueError: For an address that is empty.
    """
    if not address.strip():
        raise ValueError("The address (`--at`) is empty. Give a folder, or an address such as 's3://bucket/run'.")
    if address.startswith(NVFLARE):
        return with_keys(NVFlare(address.removeprefix(NVFLARE), patience=patience), keys)
    options = None if endpoint_url is None else {"endpoint_url": endpoint_url}
    return with_keys(Store(address, patience=patience, storage_options=options), keys)


def with_keys(network: Network, keys: KeyOptions | None) -> Network:
    """
    The network, on which only those speak who may.

    Args:
        network ([`Network`]):
            What carries the messages.
        keys ([`KeyOptions`], *optional*):
            Who may speak; without them, whoever is there.
    """
    if keys is None or keys.key is None or keys.known is None:
        return network
    known = KnownKeys(keys.known, keys.accept_first)
    return Sealed(network, Identity.load(keys.key), known, keys.encrypts)
