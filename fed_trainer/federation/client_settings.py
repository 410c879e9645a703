# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What single clients do differently: a rank, a subset of the layers, a number of steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..state.checks import check_integer


__all__ = ["ClientSettings", "layer_of", "parse_client_settings"]

LAYERS = ("layers", "layer", "h", "blocks", "block")  # what lists of layers are called in transformers


@dataclass(frozen=True)
class ClientSettings:
    """
    What one client does differently.

    Args:
        r (`int`, *optional*):
            Rank of its adapter, at most that of the PEFT config, with the scaling of that config.
        layers_to_transform (`tuple[int, ...]`, *optional*):
            Layers it trains. Tensors that belong to no layer, such as a head, are always trained.
        max_steps (`int`, *optional*):
            Its local budget per round.
    """

    r: int | None = None
    layers_to_transform: tuple[int, ...] | None = None
    max_steps: int | None = None

    def trains(self, key: str) -> bool:
        """Whether the client trains the tensor `key`."""
        layer = layer_of(key)
        return self.layers_to_transform is None or layer is None or layer in self.layers_to_transform


def layer_of(key: str) -> int | None:
    """Number of the layer that a tensor belongs to, `None` outside of layers."""
    found = re.search(rf"\.(?:{'|'.join(LAYERS)})\.(\d+)\.", key)
    return int(found[1]) if found else None


def parse_client_settings(
    settings: Mapping[str, Any] | None, clients: Iterable[str], keys: Iterable[str]
) -> dict[str, ClientSettings]:
    """
    The settings by client.

    Args:
        settings (`dict`, *optional*):
            `FederationArguments.client_settings`.
        clients (`Iterable[str]`):
            Names of all clients.
        keys (`Iterable[str]`):
            Names of the tensors of the adapter.

    Raises:
        ValueError: For a client or a layer that does not exist, an unknown setting, or a value that is no
            positive integer.
    """
    known, names = set(clients), [field.name for field in fields(ClientSettings)]
    layers = {layer_of(key) for key in keys} - {None}
    parsed = {}
    for client, values in (settings or {}).items():
        if client not in known:
            raise ValueError(
                f"`client_settings` names the client {client!r}, which is not among the {len(known)} clients (the "
                f"first: {min(known)!r})."
            )
        if not isinstance(values, Mapping) or not set(values) <= set(names):
            raise ValueError(f"`client_settings[{client!r}]` is {values!r}. Give a dictionary with some of {names}.")
        for name in ("r", "max_steps"):
            check_integer(f"{name}` of client `{client}", values.get(name), 1, optional=True)
        chosen = values.get("layers_to_transform")
        if chosen is not None:
            chosen = tuple(chosen) if isinstance(chosen, (list, tuple)) else (chosen,)
            if not chosen or not all(isinstance(layer, int) and layer in layers for layer in chosen):
                raise ValueError(
                    f"`layers_to_transform` of client {client!r} is {list(chosen)}, but the adapter has the layers "
                    f"{sorted(layers, key=str)}. Name some of them."
                )
        parsed[client] = ClientSettings(values.get("r"), chosen, values.get("max_steps"))
    return parsed
