# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of all tests: no network, one thread, a tiny model and clients made on the spot."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


# before anything imports the libraries that read them
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import datasets
import hypothesis
import pytest
import torch
from datasets import Dataset

from helpers.data import clients_of
from helpers.hub import hub  # noqa: F401
from helpers.models import save_tiny_llama
from helpers.s3 import s3_endpoint  # noqa: F401


torch.set_num_threads(1)
datasets.disable_progress_bars()
# the same examples in every run, and no time limit for the first, which waits for imports
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("deterministic")


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked with `fast`, all parametrisations but those named there are slow."""
    unseen: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("fast")
        if mark is None:
            continue
        function, given = item.nodeid.split("[")[0], item.callspec.params
        unseen.setdefault(function, set(mark.args)).discard(item.callspec.id)
        is_fast = item.callspec.id in mark.args or any(given[name] in values for name, values in mark.kwargs.items())
        if not is_fast:
            item.add_marker(pytest.mark.slow)
    wrong = {function: ids for function, ids in unseen.items() if ids}
    if wrong and not any("[" in argument for argument in config.args):
        raise pytest.UsageError(f"`pytest.mark.fast` names parametrisations that do not exist: {wrong}")


@pytest.fixture(scope="session")
def make_clients() -> Callable[..., dict[str, Dataset]]:
    """
    `make_clients(num_clients=3, rows=16) -> dict[str, Dataset]`: clients `client_0`, `client_1`, ... with the columns
    `prompt`, `completion` (with its leading space) and `topic` ("sums", "order", "words"; a label to count). The same
    numbers always give the same text; clients differ in text and in their topics. Take `.select(range(n))` of one for
    clients of different sizes.
    """
    return clients_of


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Folder `tiny-llama` with a random Llama (float32, hidden size 32, intermediate size 64, 2 layers, 4 heads, untied
    embeddings, about 40,000 parameters) and its tokenizer: byte-level BPE trained on the text of `make_clients`, with
    `<bos>`, `<eos>`, `<pad>` and a chat template. The same weights in every session. Tests must not write to it.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def make_trainer(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """
    `make_trainer(output="out", peft_config=..., **others)`: a trainer that writes to `tmp_path / output`, see
    [`helpers.trainers.make`]. A file or a test says what its trainers have in common with `pytest.mark.trainer(...)`.
    """
    from helpers.trainers import make  # imports TRL, which takes seconds and not all tests need

    common: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("trainer"))):  # that of the test comes last
        common |= mark.kwargs
    return functools.partial(make, tmp_path, tiny_model_dir, **common)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """For files in which garbage is collected again and again."""
    gc.freeze()
    yield
    gc.unfreeze()
