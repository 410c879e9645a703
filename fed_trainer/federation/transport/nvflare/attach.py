# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""NVFlare's Client API in a process that somebody else has started."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ..ends import NetworkError
from .messages import CONTENT, FIELDS, LostError, Message, message_of
from .needed import nvflare_module


__all__ = ["ClientAPI", "read_profile"]


def read_profile(path: str | os.PathLike) -> dict[str, Any]:
    """
    The profile of a site, which NVFlare attaches a process by.

    Raises:
        NetworkError: If it is none.
    """
    advice = "`fed-trainer nvflare-kit` writes one into the start-up kit of a site"
    try:
        profile = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise NetworkError(f"The NVFlare profile {os.fspath(path)!r} cannot be read ({error}); {advice}.") from error
    if not isinstance(profile, dict) or not isinstance(profile.get("site_name"), str):
        raise NetworkError(f"The NVFlare profile {os.fspath(path)!r} names no site (`site_name`); {advice}.")
    return profile


class ClientAPI:
    """
    An [`Attachment`] to the job of a site.

    Args:
        path (`str` or `os.PathLike`):
            The profile.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._profile = read_profile(path)
        self._flare = nvflare_module("nvflare.client")
        self._context: Any = None

    def open(self, wait: float) -> None:
        site = self._profile["site_name"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "profile.json")
            path.write_text(json.dumps({**self._profile, "job_wait_timeout": wait}))
            try:
                self._context = self._flare.init(rank="0", config_file=str(path))
            except (TimeoutError, RuntimeError) as error:
                raise LostError(f"no job has attached this process ({error})") from error
            except (OSError, ValueError, KeyError) as error:
                raise NetworkError(f"NVFlare cannot attach to site {site!r}: {error}. Look at its profile.") from error

    def receive(self, wait: float) -> Message | None:
        began = time.monotonic()
        try:
            model = self._flare.receive(timeout=wait, ctx=self._context)
        except RuntimeError as error:
            raise LostError(str(error)) from error
        if model is None:
            if time.monotonic() - began < wait / 2:  # it does not wait where nothing can come any more
                raise LostError("its job is over")
            return None
        try:
            return message_of(model.meta, model.params)
        except ValueError as error:
            raise LostError(str(error)) from error

    def answer(self, message: Message) -> None:
        told = {FIELDS: {**message.fields, "kind": message.kind}}
        try:
            self._flare.send(
                self._flare.FLModel(
                    params_type=self._flare.ParamsType.FULL, params={CONTENT: message.content}, meta=told
                ),
                ctx=self._context,
            )
        except RuntimeError as error:
            raise LostError(str(error)) from error

    def close(self) -> None:
        if self._context is not None:
            self._flare.shutdown(ctx=self._context)
            self._context = None
