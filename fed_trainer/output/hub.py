# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Fetching an adapter to start from, the model card, and publishing."""

from __future__ import annotations

import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from transformers.utils import logging

from .owned import MARKER, make_own, remove_own_folder


__all__ = ["discard_stages", "fetch_adapter", "publish"]


# pickles, and what else runs when it is read; safetensors, JSON and text do not
_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.so", "*.dll", "*.exe", "*.pyc")
_STAGES = ".publishing"  # in the folder of the run

logger = logging.get_logger(__name__)


def fetch_adapter(source: str, revision: str | None = None, token: str | None = None) -> Path:
    """
    Local folder of an adapter that is either a folder already or a repository on the Hub.

    Args:
        source (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        token (`str`, *optional*):
            Hub token; the one logged in with if not given.

    Raises:
        ValueError: If a revision is asked of a local folder.
    """
    if not os.path.isdir(source) and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise ValueError(
            f"The adapter {source!r} is neither a folder here nor a Hub id (`user/name`). Check the path."
        )
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(
                f"The adapter {source!r} is a local folder, which has no revision {revision!r}. Give a Hub id, or "
                "leave the revision out."
            )
        return Path(source)
    return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=["*.safetensors", "*.json"]))


def publish(
    folder: str | os.PathLike,
    names: Collection[str],
    documents: Mapping[str, str],
    repo_id: str,
    commit_message: str | None,
    token: str | None,
    revision: str | None,
    blocking: bool = True,
    run_folder: Path | None = None,
) -> CommitInfo | Future[CommitInfo]:
    """
    Upload files of `folder` as one commit.

    They are linked into a folder of their own first, so that a run may go on while they are uploaded.

    Args:
        folder (`str`):
            Where the files are.
        names (`Collection[str]`):
            Their paths within it: what the run has written. Pickles are left out, with a warning.
        documents (`Mapping[str, str]`):
            Text files of the commit that are not in the folder, or say more there than is published, by name.
        repo_id (`str`):
            The repository.
        commit_message, token, revision (`str`, *optional*):
            As in [`~huggingface_hub.HfApi.upload_folder`].
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the upload. If not, a future is returned.
        run_folder (`Path`, *optional*):
            Where the folder of links is made, on the same file system; in `folder` if not given.
    """
    stage = _staged(Path(folder), names, documents, (run_folder or Path(folder)) / _STAGES)
    api = HfApi(token=token)

    def upload() -> CommitInfo:
        try:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=stage,
                commit_message=commit_message,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in _files_of(stage)],
                ignore_patterns=list(_NEVER),
            )
        finally:
            _discard(stage)

    return upload() if blocking else api.run_as_future(upload)


def discard_stages(folder: Path) -> None:
    """Remove what uploads of processes that are no more have left in the folder of a run."""
    for stage in (folder / _STAGES).glob("*-*"):
        if not stage.name.startswith(f"{os.getpid()}-"):
            _discard(stage)


def _discard(stage: Path) -> None:
    remove_own_folder(stage)
    if {path.name for path in stage.parent.iterdir()} == {MARKER}:
        remove_own_folder(stage.parent)


def _staged(folder: Path, names: Collection[str], documents: Mapping[str, str], stages: Path) -> Path:
    """A folder with hard links to the files `names`, which their successors do not change, and with the documents."""
    make_own(stages)
    stage = Path(tempfile.mkdtemp(dir=stages, prefix=f"{os.getpid()}-"))
    make_own(stage)
    for name in sorted(set(names) - documents.keys()):
        if _is_pickle(folder / name):
            logger.warning(
                f"{name} is not published: it is a pickle or a program, which whoever loads the model would run."
            )
            continue
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, stage / name)
        except OSError:  # a file system without hard links
            shutil.copy2(folder / name, stage / name)
    for name, text in documents.items():
        (stage / name).write_text(text, encoding="utf-8")
    return stage


def _files_of(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MARKER)


def _is_pickle(path: Path) -> bool:
    """By its name, or by how pickles and the archives of `torch.save` begin."""
    with path.open("rb") as file:
        begin = file.read(4)
    return (
        any(fnmatch.fnmatch(path.name, pattern) for pattern in _NEVER)
        or begin[:1] == b"\x80"
        or begin == b"PK\x03\x04"
    )
