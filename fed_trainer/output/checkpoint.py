# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Round checkpoints: `checkpoint-<round>` folders in PEFT's format plus the state of the run, complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_scl.foreign_files import read_tensors

from ..state.adapter_state import AdapterState
from .digests import DIGESTS_NAME, TRAINER_STATE_NAME, find_damage, read_digests, write_digests
from .disk import DamagedFileError, replace_durably, writing
from .owned import MARKER, make_own, remove_own_files, remove_own_folder, unmark
from .record import RECORD_NAME, ROUNDS_NAME, is_foreign_rounds_file, read_record
from .saved_files import MODEL_WEIGHTS


__all__ = [
    "ADAPTER_WEIGHTS",
    "find_checkpoint",
    "has_nothing_to_resume",
    "load_adapter",
    "refuse_another_run",
    "refuse_foreign_checkpoints",
    "refuse_later_rounds",
    "remove_leftovers",
    "rotate_checkpoints",
    "write_checkpoint",
]

T = TypeVar("T")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# beside the weights, by adapters, models, tokenizers and processors
WRITTEN_IN_THE_END = (
    "README.md", "adapter_config.json", "config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
    TRAINER_STATE_NAME, DIGESTS_NAME,
)  # fmt: skip

logger = logging.get_logger(__name__)


def write_checkpoint(
    output_dir: str | os.PathLike, round: int, write: Callable[[Path], Mapping[str, str] | None]
) -> Path:
    """
    Create `checkpoint-<round>`: `write` fills a folder beside it, which is renamed when it is complete and on the
    disk, and then read again.

    Args:
        output_dir (`str`):
            Folder of the run.
        round (`int`):
            Round that has just ended.
        write (`Callable`):
            Called with the folder to fill. It may return digests of files in it that were computed when they were
            written.

    Returns:
        `Path`: The checkpoint.

    Raises:
        FileExistsError: If there is something of its name, or in the place of the folder beside it.
        OSError: If it could not be written, or is not what was written.
    """
    final = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{round}"
    if os.path.lexists(final):
        raise FileExistsError(
            f"{str(final)!r} is there already, and a run writes over nothing. Move it away, and continue with "
            "`train(resume_from_checkpoint=True)`."
        )
    beside = final.with_name(f".{final.name}.tmp")
    remove_own_folder(beside)  # of a run that died here before
    try:
        with writing(final.name):
            make_own(beside)
            known = write(beside) or {}
            written = [path.relative_to(beside).as_posix() for path in sorted(beside.rglob("*")) if path.is_file()]
            write_digests(beside, [name for name in written if name not in known and name != MARKER], known)
            replace_durably(beside, final)
            unmark(final)
    except BaseException:
        with suppress(OSError):
            remove_own_folder(beside)  # a full disk needs the room
        raise
    if (damage := find_damage(final, clients=False)) is not None:
        raise OSError(
            f"{final.name} is not what was written a moment ago: {damage}. The checkpoints before it stay. See to the "
            "disk, and continue with `train(resume_from_checkpoint=True)`."
        )
    return final


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Delete what runs that died while they wrote a checkpoint have left."""
    for folder in sorted(Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.tmp")):
        remove_own_folder(folder)


def rotate_checkpoints(output_dir: str | os.PathLike, save_total_limit: int | None) -> None:
    """
    Delete the oldest checkpoints beyond `save_total_limit`; the newest always stays. Only what is in their
    `digests.json` is deleted: other files stay, and so does the folder that holds them, with a warning.
    """
    if save_total_limit is None or save_total_limit <= 0:
        return
    for folder in _checkpoints(output_dir)[:-save_total_limit]:
        try:
            remove_own_files(folder, [*read_digests(folder), MARKER])
            # last: until then it is a checkpoint, to be deleted another time
            left = remove_own_files(folder, [DIGESTS_NAME])
        except (DamagedFileError, OSError) as error:
            logger.warning(f"{folder.name} is beyond `save_total_limit`, but stays: {error}.")
            continue
        if left:
            logger.warning(
                f"{folder.name} is beyond `save_total_limit`; of it stays what this run has not written: "
                f"{', '.join(left)}."
            )


def find_checkpoint(
    output_dir: str | os.PathLike,
    resume_from_checkpoint: str | bool,
    read: Callable[[Path], T],
    weights: str = ADAPTER_WEIGHTS,
) -> tuple[Path, T]:
    """
    The folder that `train(resume_from_checkpoint=...)` means, and what it holds; one that is given has to hold the
    file `weights`.

    With `True` it is the last one that is undamaged. Those behind it are put aside as `damaged-checkpoint-<round>`,
    with a warning.

    Args:
        output_dir (`str`):
            Folder of the run.
        resume_from_checkpoint (`str` or `bool`):
            As in `train`.
        read (`Callable`):
            Reads a checkpoint. It raises a [`DamagedFileError`] for what cannot be read.
        weights (`str`, *optional*, defaults to `"adapter_model.safetensors"`):
            Name of the file with the weights.

    Raises:
        ValueError: If there is no undamaged checkpoint in `output_dir` (`True`), or the given folder is not one.
    """
    if resume_from_checkpoint is not True:
        return _given_checkpoint(Path(str(resume_from_checkpoint)), read, weights)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_checkpoints(output_dir)):
        try:
            content = _read_undamaged(folder, read)
        except DamagedFileError as damage:
            damaged.append((folder, str(damage)))
            continue
        for broken, why in damaged:
            name = _put_aside(broken).name
            logger.warning(f"{broken.name} is damaged ({why}): it is put aside as {name}, {folder.name} is used.")
        return folder, content
    raise _no_checkpoint(output_dir, damaged)


def _given_checkpoint(folder: Path, read: Callable[[Path], T], weights: str) -> tuple[Path, T]:
    if not os.path.lexists(folder / weights) and not os.path.lexists(folder / DIGESTS_NAME):
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which holds no {weights}. Pass a `checkpoint-<round>` "
            "folder of a federation, or `True` for the last one in `output_dir`."
        )
    try:
        return folder, _read_undamaged(folder, read)
    except DamagedFileError as damage:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is damaged: {damage}. Pass an earlier one, or `True` for the last one in "
            "`output_dir` that is not."
        ) from damage


def _no_checkpoint(output_dir: str | os.PathLike, damaged: list[tuple[Path, str]]) -> ValueError:
    """Why there is nothing in `output_dir` to go on from."""
    if damaged or (aside := _damaged_before(output_dir)):
        last = damaged[0][1] if damaged else f"{aside[-1]} was put aside"
        return ValueError(
            f"`resume_from_checkpoint=True`, but every checkpoint in {str(output_dir)!r} is damaged (the last: "
            f"{last}). Restore one from a backup, or start the run again in another `output_dir`."
        )
    if saved := _saved_weights(Path(output_dir)):  # with which `train()` would refuse to start
        return ValueError(
            f"`resume_from_checkpoint=True`, but there is no checkpoint in {str(output_dir)!r}, only a saved model "
            f"({saved[0]}). Start a run in another `output_dir`, with this one as `initial_adapter`, or as `model` if "
            "it is a whole model."
        )
    return ValueError(
        f"`resume_from_checkpoint=True`, but there is no checkpoint in {str(output_dir)!r}. Start the run with "
        "`trainer.train()`."
    )


def _read_undamaged(folder: Path, read: Callable[[Path], T]) -> T:
    if (damage := find_damage(folder)) is not None:
        raise DamagedFileError(damage)
    return read(folder)


def _put_aside(folder: Path) -> Path:
    """Under a name that is free: what is damaged may be all that somebody has."""
    aside, number = folder.with_name(f"damaged-{folder.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    os.replace(folder, aside)
    return aside


def _damaged_before(output_dir: str | os.PathLike) -> list[str]:
    return sorted(path.name for path in Path(output_dir).glob(f"damaged-{PREFIX_CHECKPOINT_DIR}-*"))


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
            f"There is no {ADAPTER_WEIGHTS} in {str(folder)!r}. Give the folder of an adapter saved by "
            "`save_pretrained` with safetensors; a pickled `adapter_model.bin` is not read."
        )
    return read_tensors(path, expected=expected)


def has_nothing_to_resume(output_dir: str | os.PathLike) -> bool:
    """
    Whether `output_dir` holds nothing that was trained: at most the record of a run that died before its first
    checkpoint.
    """
    return not (_damaged_before(output_dir) or _checkpoints(output_dir) or _saved_weights(Path(output_dir)))


def refuse_another_run(output_dir: str | os.PathLike, starts_again: bool = False) -> None:
    """
    Raise if `output_dir` holds a run already, or what this run would write over.

    Args:
        output_dir (`str`):
            Folder of the run.
        starts_again (`bool`, *optional*, defaults to `False`):
            Whether the run that left nothing but its record is to be started again.

    Raises:
        FileExistsError: Naming what was found.
    """
    record = _record_or_refusal(output_dir)
    if foreign := _foreign_checkpoints(output_dir):
        raise FileExistsError(
            f"`output_dir` {str(output_dir)!r} holds {foreign[-1].name}, which is no checkpoint of a federation (it "
            f"has neither {DIGESTS_NAME} nor {RECORD_NAME}). Move it away, or choose another `output_dir`."
        )
    found = [path.name for path in _checkpoints(output_dir)]
    way_on = "Continue it with `train(resume_from_checkpoint=True)`, choose"
    weights = _saved_weights(Path(output_dir))
    if not found and not weights and record["rounds"] and not starts_again:
        found = [RECORD_NAME]
    if not found:  # an adapter saved without a run
        way_on = "Choose"
        found = weights
    if found:
        raise FileExistsError(
            f"`output_dir` {str(output_dir)!r} already holds a run ({found[-1]}), which starting afresh would mix "
            f"with this one. {way_on} another `output_dir`, or delete it."
        )
    foreign_files = [name for name in WRITTEN_IN_THE_END if os.path.lexists(Path(output_dir) / name)]
    foreign_files += [ROUNDS_NAME] if is_foreign_rounds_file(output_dir) else []
    if foreign_files:
        raise FileExistsError(
            f"`output_dir` {str(output_dir)!r} holds {foreign_files[0]}, which this run has not written, and would "
            "write over. Move it away, or choose another `output_dir`."
        )


def _record_or_refusal(output_dir: str | os.PathLike) -> dict[str, Any]:
    """The record of a run in `output_dir`, without rounds if there is none; what is no record is refused."""
    try:
        record = read_record(output_dir) if os.path.lexists(Path(output_dir) / RECORD_NAME) else {"rounds": []}
    except (OSError, ValueError):
        record = {}
    if "rounds" not in record:
        raise FileExistsError(
            f"`output_dir` {str(output_dir)!r} holds a {RECORD_NAME} that is not the record of a run, which a run "
            "would write over. Move it away, or choose another `output_dir`."
        )
    return record


def refuse_foreign_checkpoints(output_dir: str | os.PathLike, rounds: range) -> None:
    """
    Raise if something that is no checkpoint of a federation has the name of one that is to be written.

    Raises:
        FileExistsError: Naming it.
    """
    for path in _foreign_checkpoints(output_dir):
        if _round_of(path) in rounds:
            raise FileExistsError(
                f"{str(output_dir)!r} holds {path.name}, which is no checkpoint of a federation (it has neither "
                f"{DIGESTS_NAME} nor {RECORD_NAME}), and this run would write one of that name. Move it away."
            )


def refuse_later_rounds(output_dir: str | os.PathLike, round: int) -> None:
    """
    Raise if `output_dir` holds checkpoints of rounds after `round`.

    Raises:
        ValueError: Naming them.
    """
    later = [path.name for path in _checkpoints(output_dir) if _round_of(path) > round]
    if later:
        raise ValueError(
            f"The run is to be resumed after round {round}, but {str(output_dir)!r} holds later rounds too "
            f"({', '.join(later)}), which would be mixed with the new ones. Delete them, or start a run in another "
            "`output_dir` with this checkpoint as `initial_adapter`."
        )


def _saved_weights(folder: Path) -> list[str]:
    """Files of weights, or the index of those into which transformers splits large ones."""
    names = (ADAPTER_WEIGHTS, MODEL_WEIGHTS, f"{MODEL_WEIGHTS}.index.json")
    return [name for name in names if os.path.lexists(folder / name)]


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of federations, by round: of other trainers, they have neither digests nor a record."""
    return [path for path in _by_round(output_dir) if _is_of_a_federation(path)]


def _foreign_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    return [path for path in _by_round(output_dir) if not _is_of_a_federation(path)]


def _by_round(output_dir: str | os.PathLike) -> list[Path]:
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.name.rsplit("-", 1)[1].isdecimal()), key=_round_of)


def _is_of_a_federation(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (DIGESTS_NAME, RECORD_NAME))


def _round_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
