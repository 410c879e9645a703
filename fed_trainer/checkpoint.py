# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Round checkpoints: `checkpoint-<round>` folders in PEFT's format plus the state of the run, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_scl.foreign_files import read_tensors

from .adapter_state import AdapterState
from .live_model import MODEL_WEIGHTS
from .record import RECORD_NAME, read_record, write_json


__all__ = [
    "ADAPTER_WEIGHTS",
    "DIGESTS_NAME",
    "died_before_its_first_checkpoint",
    "find_checkpoint",
    "find_damage",
    "load_adapter",
    "refuse_another_run",
    "refuse_later_rounds",
    "rotate_checkpoints",
    "write_checkpoint",
]


ADAPTER_WEIGHTS = "adapter_model.safetensors"
DIGESTS_NAME = "digests.json"

logger = logging.get_logger(__name__)


def write_checkpoint(output_dir: str | os.PathLike, round: int, write: Callable[[Path], None]) -> Path:
    """
    Create `checkpoint-<round>`: `write` fills a folder beside it, which is renamed when it is complete.

    Args:
        output_dir (`str`):
            Folder of the run.
        round (`int`):
            Round that has just ended.
        write (`Callable`):
            Called with the folder to fill.

    Returns:
        `Path`: The checkpoint.
    """
    final = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{round}"
    beside, aside = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    for leftover in (beside, aside):  # of a run that died here before
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    write_json(beside / DIGESTS_NAME, _digests(beside))
    if final.exists():
        os.replace(final, aside)
    os.replace(beside, final)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def rotate_checkpoints(output_dir: str | os.PathLike, save_total_limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`; the newest always stays."""
    if save_total_limit is None or save_total_limit <= 0:
        return
    folders = sorted(_checkpoints(output_dir), key=_round_of)
    for folder in folders[:-save_total_limit]:
        shutil.rmtree(folder)


def find_checkpoint(
    output_dir: str | os.PathLike, resume_from_checkpoint: str | bool, weights: str = ADAPTER_WEIGHTS
) -> Path:
    """
    The folder that `train(resume_from_checkpoint=...)` means; one that is given has to hold the file `weights`.

    With `True` it is the last one that is undamaged. Those behind it are put aside as `damaged-checkpoint-<round>`, with a warning.

    Raises:
        ValueError: If there is no undamaged checkpoint in `output_dir` (`True`), or the given folder is not one.
    """
    if resume_from_checkpoint is not True:
        folder = Path(str(resume_from_checkpoint))
        if not (folder / weights).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` is {str(folder)!r}, which holds no {weights}. Pass a `checkpoint-<round>` "
                "folder of a federation, or `True` for the last one in `output_dir`."
            )
        if (damage := find_damage(folder)) is not None:
            raise ValueError(
                f"The checkpoint {str(folder)!r} is damaged: {damage}. Pass an earlier one, or `True` for the last one in "
                "`output_dir` that is not."
            )
        return folder
    damaged: list[tuple[Path, str]] = []
    for folder in sorted(_checkpoints(output_dir), key=_round_of, reverse=True):
        damage = find_damage(folder)
        if damage is None:
            for broken, why in damaged:
                aside = broken.with_name(f"damaged-{broken.name}")
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                os.replace(broken, aside)
                logger.warning(
                    f"{broken.name} is damaged ({why}): it is put aside as {aside.name}, {folder.name} is used."
                )
            return folder
        damaged.append((folder, damage))
    if damaged:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but every checkpoint in {str(output_dir)!r} is damaged (the last: {damaged[0][1]}). "
            "Restore one from a backup, or start the run again in another `output_dir`."
        )
    raise ValueError(
        f"`resume_from_checkpoint=True`, but there is no checkpoint in {str(output_dir)!r}. Start the run with "
        "`trainer.train()`."
    )


def find_damage(folder: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, if something is: a file that is missing, or is not the one that was written.

    Files of clients, of which there may be very many, are compared by their sizes, all others by SHA-256.
    """
    path = Path(folder) / DIGESTS_NAME
    if not path.is_file():
        return f"it has no {DIGESTS_NAME} (as a folder from the Hub, which can be an `initial_adapter`)"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"{DIGESTS_NAME} is not JSON"
    found = _digests(Path(folder))
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """By path within `folder`: SHA-256 of what lies in it, sizes of what lies deeper."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == DIGESTS_NAME:
            continue
        if path.parent == folder:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            digests[path.name] = digest.hexdigest()
        else:
            digests[path.relative_to(folder).as_posix()] = f"{path.stat().st_size} bytes"
    return digests


def load_adapter(folder: str | os.PathLike, expected: Mapping[str, tuple[int, ...]] | None = None) -> AdapterState:
    """
    The tensors of an adapter saved by PEFT, on CPU. Only safetensors are read: nothing is unpickled.

    Args:
        folder (`str` or `os.PathLike`):
            Where `save_pretrained` has written it.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*):
            The shapes that the model has room for ([`LiveState.saved_shapes`]), compared before anything is read.

    Raises:
        FileNotFoundError: If `folder` has no `adapter_model.safetensors`.
        ValueError: If the file is damaged, or does not fit.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {ADAPTER_WEIGHTS} in {str(folder)!r}. Give the folder of an adapter saved by `save_pretrained` with "
            "safetensors; a pickled `adapter_model.bin` is not read."
        )
    return read_tensors(path, expected=expected)


def died_before_its_first_checkpoint(output_dir: str | os.PathLike) -> bool:
    """Whether `output_dir` holds the record of a run, and nothing that was trained."""
    trained = [
        *Path(output_dir).glob(f"*{PREFIX_CHECKPOINT_DIR}-*"),
        *(Path(output_dir) / n for n in (ADAPTER_WEIGHTS, MODEL_WEIGHTS)),
    ]
    return (Path(output_dir) / RECORD_NAME).is_file() and not any(
        path.exists() and not path.name.startswith(".") for path in trained
    )


def refuse_another_run(output_dir: str | os.PathLike) -> None:
    """
    Raise if `output_dir` holds a run already.

    Raises:
        FileExistsError: Naming what was found.
    """
    found = [path.name for path in sorted(_checkpoints(output_dir), key=_round_of)]
    way_on = "Continue it with `train(resume_from_checkpoint=True)`, choose"
    if not found and died_before_its_first_checkpoint(output_dir) and read_record(output_dir).get("rounds"):
        found = [RECORD_NAME]
    if not found:  # an adapter saved without a run
        way_on = "Choose"
        found = [name for name in (ADAPTER_WEIGHTS, MODEL_WEIGHTS) if (Path(output_dir) / name).is_file()]
    if found:
        raise FileExistsError(
            f"`output_dir` {str(output_dir)!r} already holds a run ({found[-1]}), which starting afresh would mix with this "
            f"one. {way_on} another `output_dir`, or delete it."
        )


def refuse_later_rounds(output_dir: str | os.PathLike, round: int) -> None:
    """
    Raise if `output_dir` holds checkpoints of rounds after `round`.

    Raises:
        ValueError: Naming them.
    """
    later = [path.name for path in sorted(_checkpoints(output_dir), key=_round_of) if _round_of(path) > round]
    if later:
        raise ValueError(
            f"The run is to be resumed after round {round}, but {str(output_dir)!r} holds later rounds too "
            f"({', '.join(later)}), which would be mixed with the new ones. Delete them, or start a run in another "
            "`output_dir` with this checkpoint as `initial_adapter`."
        )


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    return [
        path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rsplit("-", 1)[1].isdigit()
    ]


def _round_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
