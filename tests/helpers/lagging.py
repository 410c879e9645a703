# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A store in which what was written comes to be seen late, as a file system of fsspec, with a clock of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec import AbstractFileSystem


@dataclass
class World:
    """
    What is in the store, and what time it is.

    Args:
        lag: Seconds after which everybody sees what was written; before that, each look may show what was there
            before, or a part of it.
        draw: Decides what a look shows.
        failure: How often there is no answer, from 0 to 1; three times one after the other at most.
    """

    lag: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    failure: float = 0.0
    now: float = 0.0
    slept: list[float] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    error: Exception | None = None
    failures: int = 0
    versions: dict[str, list[tuple[float, bytes | None]]] = field(default_factory=dict)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now

    def settle(self) -> None:
        """From now on everything is seen as it is, at once."""
        self.now += self.lag
        self.lag = self.failure = 0.0

    def options(self) -> dict[str, Any]:
        """For `Objects`."""
        return {"storage_options": {"world": self}, "sleep": self.sleep, "clock": self.clock}

    @property
    def files(self) -> dict[str, bytes]:
        """What is there in truth."""
        return {path: content for path, [*_, (_, content)] in self.versions.items() if content is not None}

    def answer(self) -> None:
        if self.error is not None:
            raise self.error
        if self.failures < 3 and self.failure and self.draw.random() < self.failure:
            self.failures += 1
            raise ConnectionError("no answer")
        self.failures = 0

    def put(self, path: str, content: bytes | None) -> None:
        self.versions.setdefault(path, [(float("-inf"), None)]).append((self.now, content))

    def seen(self, path: str) -> bytes | None:
        """One of those that somebody may see at this moment."""
        versions = self.versions.get(path, [(float("-inf"), None)])
        settled = max(i for i, (written, _) in enumerate(versions) if written <= self.now - self.lag)
        index = self.draw.randint(settled, len(versions) - 1)
        content = versions[index][1]
        if index > settled and content and self.draw.random() < 0.25:
            return content[: self.draw.randrange(len(content))]
        return content


class LaggingFileSystem(AbstractFileSystem):
    """`lagging://...` of a [`World`]; its `ls` is the one thing that nothing may rest on."""

    protocol = "lagging"
    cachable = False

    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(**options)
        self.world = world

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self.world.answer()
        self.world.looked_at.append(path)
        content = self.world.seen(self._strip_protocol(path))
        if content is None:
            raise FileNotFoundError(path)
        return content

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self.world.answer()
        self.world.put(self._strip_protocol(path), bytes(value))

    def rm_file(self, path: str) -> None:
        self.world.answer()
        path = self._strip_protocol(path)
        if path not in self.world.files:
            raise FileNotFoundError(path)
        self.world.put(path, None)

    def rm(self, path: str, recursive: bool = False, **kwargs: Any) -> None:
        for each in [each for each in self.world.files if each.startswith(f"{self._strip_protocol(path)}/")]:
            self.rm_file(each)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[str]:
        self.world.answer()
        path = self._strip_protocol(path)
        shown = [each for each in self.world.versions if each.startswith(f"{path}/") and self.world.seen(each)]
        return sorted({f"{path}/{each[len(path) + 1 :].split('/')[0]}" for each in shown})


fsspec.register_implementation("lagging", LaggingFileSystem, clobber=True)
