# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run asks of a client, as its coordinator describes it: which may be anything."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..methods.objectives import LOCAL_OBJECTIVES


__all__ = ["KNOWN_LATER", "RunRequest", "is_digest"]

KNOWN_LATER = ("base_digest", "encrypted", "signed", "upload_bytes")
"""What a run says of itself only once there are a model and a network."""

_MOST = 2**53  # of what is taken as a number
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_NUMBER = "the run does not say its local budget (`max_steps` or `num_train_epochs`) in numbers."


class RunRequest:
    """
    A run as a client is asked to take part in it.

    Args:
        run (`Mapping[str, Any]`):
            What the coordinator says, see [`Policy.violations`].
        num_examples (`int`, *optional*):
            Training examples of the client.
        client (`str`, *optional*):
            Its name. If not given, the largest of all local budgets counts.
        world_size (`int`, *optional*, defaults to `1`):
            Processes of the client.
        is_plan (`bool`, *optional*, defaults to `False`):
            Whether the run has not begun, so that it does not have to say what is `KNOWN_LATER`.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        num_examples: int | None = None,
        client: str | None = None,
        world_size: int = 1,
        is_plan: bool = False,
    ) -> None:
        self.run, self.num_examples, self.client, self.world_size = run, num_examples, client, world_size
        self._is_plan = is_plan
        self.settings: Mapping[str, Any] = _mapping(run.get("settings"))

    def is_known_later(self, name: str) -> bool:
        """Whether this is a plan that does not say yet what it will say when the client joins."""
        return self._is_plan and name in KNOWN_LATER and name not in self.run

    def count(self, name: str) -> int | None:
        """A number of the run, if it says one."""
        return _count(self.run.get(name))

    def is_set(self, name: str) -> bool:
        """Whether a flag of the settings is not off."""
        return self.settings.get(name) not in (None, False)

    @property
    def min_clients(self) -> int | None:
        """Usable updates that a round needs: one, if the run does not say."""
        return _count(self.settings.get("min_clients", 1))

    @property
    def runs_remote_code(self) -> bool:
        """Whether the base model is loaded with code that comes with it."""
        arguments = _mapping(self.settings.get("model_init_kwargs"))
        return self.is_set("trust_remote_code") or arguments.get("trust_remote_code") not in (None, False)

    def has_base(self, allowed: Collection[str]) -> bool:
        """Whether the base model is one of `allowed`: patterns of ids, and digests."""
        name, digest = self.run.get("base_model"), self.run.get("base_digest")
        if is_digest(digest) and digest in allowed:
            return True
        if not isinstance(name, str) or ".." in re.split(r"[/\\]", name):  # `org/*` does not mean `org/../elsewhere`
            return False
        return any(fnmatchcase(name, pattern) for pattern in allowed if not is_digest(pattern))

    @property
    def has_epochs(self) -> bool:
        """Whether a local budget of this client is not a number of steps."""
        return any(_count(steps) is None for steps in self._budgets())

    def local_steps(self) -> tuple[int | None, str]:
        """
        The optimiser steps of the client in a round, and how they follow from the settings; or `None`, and why they
        are not known.
        """
        steps, how = 0, ""
        for budget in self._budgets():
            number, why = self._steps_of(budget)
            if number is None:
                return None, why
            if number > steps:
                steps, how = number, why
        kind = LOCAL_OBJECTIVES.get(str(self.settings.get("local_objective")))
        if kind is not None and kind.is_personal:
            return 2 * steps, f"{how}, twice, since `local_objective` trains a model of the client's own too"
        return steps, how

    def _budgets(self) -> list[Any]:
        """`max_steps` of the client; without its name those of all."""
        common, own = self.settings.get("max_steps", -1), _mapping(self.settings.get("client_settings"))
        names = list(own) if self.client is None else [self.client]
        told = [_mapping(own.get(name)).get("max_steps") for name in names]
        budgets = [common if steps is None else steps for steps in told]
        return budgets if self.client is not None else [common, *budgets]

    def _steps_of(self, max_steps: Any) -> tuple[int | None, str]:
        if (steps := _count(max_steps)) is not None:
            return steps, f"`max_steps={steps}`"
        epochs = _positive(self.settings.get("num_train_epochs"))
        per_device = _count(self.settings.get("per_device_train_batch_size"))
        accumulated = _count(self.settings.get("gradient_accumulation_steps"))
        if max_steps != -1 or epochs is None or not per_device or not accumulated:
            return None, _NO_NUMBER
        budget = f"{epochs:g} epoch{'' if epochs == 1 else 's'} (`num_train_epochs`)"
        if self.is_set("packing"):
            return None, (
                f"the run trains {budget} over sequences that hold several examples each (`packing=True`), of which "
                "nobody knows the number before. Ask the coordinator for `max_steps`."
            )
        if self.num_examples is None:
            return None, (
                f"the run trains {budget}, whose steps depend on the number of examples. Say how many there are, or "
                "ask the coordinator for `max_steps`."
            )
        batch = per_device * accumulated * self.world_size
        steps = math.ceil(epochs * math.ceil(self.num_examples / batch))
        return steps, (
            f"{budget} over {self.num_examples:,} examples in batches of {batch}: `per_device_train_batch_size` "
            f"{per_device} x `gradient_accumulation_steps` {accumulated} x {self.world_size} processes"
        )


def is_digest(value: Any) -> bool:
    """Whether it is the digest of a base model, and no name."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST else None


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 < value <= _MOST else None
