# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Points the Hugging Face client, in this process or in a subprocess, to a [`HubServer`]."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_api

from helpers.hub_server import USER, HubServer


REPO = f"{USER}/adapter"


def hub_environment(endpoint: str, cache_dir: str | Path) -> dict[str, str]:
    """
    What a process needs in its environment, on top of `os.environ`, to use the Hub at `endpoint` and nothing else.

    Args:
        endpoint (`str`): URL of the Hub.
        cache_dir (`str` or `Path`): Stands in for `~/.cache/huggingface`.
    """
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache_dir),
        # set although they follow from HF_HOME: the developer's own environment may have them, and they win over it
        "HF_HUB_CACHE": str(Path(cache_dir, "hub")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # seconds, in place of 10: the server is as slow as the machine
        "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        "HF_HUB_ETAG_TIMEOUT": "120",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_loopback",
        "no_proxy": "127.0.0.1",
    }


def redirect_client(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache_dir: str | Path) -> None:
    """
    Makes the libraries that this process has imported use the Hub at `endpoint`, until `monkeypatch` undoes it.

    `huggingface_hub` reads the environment once, at import, into `huggingface_hub.constants`, and looks everything up
    there when it is used. So that module is run once more, in the new environment, and each constant that comes out
    different is patched. Only instances of `HfApi` keep the endpoint for themselves.
    """
    for name, value in hub_environment(endpoint, cache_dir).items():
        monkeypatch.setenv(name, value)
    for name, value in runpy.run_path(constants.__file__).items():
        if name.isupper() and getattr(constants, name) != value:
            monkeypatch.setattr(constants, name, value)
    # `huggingface_hub.create_repo` and the other functions are methods of this instance
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    # made when first used; after the test, the one made in it has to go
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    close_session()  # the next one is opened with the new `no_proxy`


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub that `huggingface_hub`, `transformers` and `peft` use for the length of a test."""
    with HubServer() as server:
        redirect_client(monkeypatch, server.endpoint, tmp_path / "huggingface")
        yield server
        close_session()
