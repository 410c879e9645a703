# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of `same_bits_cases.py` has left, in a few numbers (`golden_values`) or compared bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file


TIMES = ("runtime", "seconds", "per_second")


class Outcome(NamedTuple):
    """
    What is compared: `tensors` by role (names may repeat, with one file per client), and `figures` by their path. Of a
    run that ended with an error there is nothing but the error.
    """

    tensors: dict[str, list[tuple[str, torch.Tensor]]]
    figures: dict[str, Any]
    error: str = ""


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The rounds in the record: under `rounds`, or a line each in a file beside it."""
    record = json.loads((folder / "federation.json").read_text(encoding="utf-8"))
    if "rounds" in record:
        return record["rounds"]
    (lines,) = folder.glob("federation*.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested figures by path, without times."""
    if any(word in path for word in TIMES):
        return {}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    inner = (flat(entry, f"{path}.{key}" if path else str(key)) for key, entry in value.items())
    return {key: entry for part in inner for key, entry in part.items()}


def read_outcome(folder: Path) -> Outcome:
    """What the case has left that ran in `folder`."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    if "error" in figures:
        return Outcome({}, {}, figures["error"])
    out = folder / "out"
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    weights = {path for path in checkpoint.glob("*.safetensors") if path.stem in ("adapter_model", "model")}
    files = {
        "final": out.glob("*.safetensors"),
        "checkpoint": weights,
        "server": set(checkpoint.glob("*.safetensors")) - weights,
        "clients": checkpoint.glob("*/**/*.safetensors"),
        "client models": (folder / "client_models").glob("**/*.safetensors"),
    }
    tensors = {
        role: [entry for path in sorted(paths) for entry in load_file(path).items()] for role, paths in files.items()
    }
    return Outcome(tensors, flat({"rounds": rounds_of(out), **figures}))


def golden_values(outcome: Outcome) -> dict[str, Any]:
    """In a few numbers: of each tensor of the final model its norm, its mean, and its first and last entry."""

    def digest(tensor: torch.Tensor) -> list[float]:
        entries = tensor.double().flatten()
        return [float(f"{value:.9g}") for value in (entries.norm(), entries.mean(), entries[0], entries[-1])]

    values: dict[str, Any] = {name: digest(tensor) for name, tensor in outcome.tensors["final"]}
    for role in ("server", "clients", "client models"):
        if tensors := [
            tensor.double().flatten() for _, tensor in sorted(outcome.tensors[role], key=lambda entry: entry[0])
        ]:
            values[role] = [float(f"{torch.cat(tensors).norm():.9g}"), sum(map(len, tensors))]
    for path, figure in outcome.figures.items():
        name = path.rpartition(".")[2]
        if (
            path.startswith("rounds.")
            and path.count(".") <= 3
            and name in ("train_loss", "eval_loss", "bytes_up", "bytes_down")
        ):
            values[path] = float(f"{figure:.9g}") if isinstance(figure, float) else figure
    return values


# Comparing


class Difference(NamedTuple):
    kind: str
    text: str


def digest_of(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + content).hexdigest()


def distance(left: torch.Tensor, right: torch.Tensor) -> str:
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"is {right.dtype} {list(right.shape)} instead of {left.dtype} {list(left.shape)}"
    return f"differs by at most {float((left.double() - right.double()).abs().max()):.1e}"


def tensor_differences(
    role: str, base: list[tuple[str, torch.Tensor]], head: list[tuple[str, torch.Tensor]]
) -> Iterator[Difference]:
    """Between two collections of tensors with names, in no order."""
    counts = [Counter((name, digest_of(tensor)) for name, tensor in side) for side in (base, head)]
    gone, new = list((counts[0] - counts[1]).elements()), list((counts[1] - counts[0]).elements())
    of_base, of_head = ({(name, digest_of(tensor)): tensor for name, tensor in side} for side in (base, head))
    for left in gone:
        if right := next((entry for entry in new if entry[0] == left[0]), None):
            yield Difference("values", f"{role}: {left[0]} {distance(of_base[left], of_head[right])}")
        elif right := next((entry for entry in new if entry[1] == left[1]), None):
            yield Difference("names", f"{role}: {left[0]} is called {right[0]}")
        else:
            yield Difference("values", f"{role}: {left[0]} is missing")
            continue
        new.remove(right)
    for name, _ in new:
        yield Difference("additions", f"{role}: {name} is new")


def figure_differences(base: dict[str, Any], head: dict[str, Any]) -> Iterator[Difference]:
    for path in [*base, *(path for path in head if path not in base)]:
        if path in base and path in head and repr(base[path]) == repr(head[path]):
            continue
        kind = "bytes" if "bytes" in path else "values" if path in base else "additions"
        yield Difference(kind, f"{path}: {base.get(path, 'nothing')} -> {head.get(path, 'nothing')}")


def differences(base: Outcome, head: Outcome, state_alone: bool = False) -> list[Difference]:
    """All that is not the same; with `state_alone` of the models, of the states and of the rounds."""
    for name, outcome in (("the base", base), ("this tree", head)):
        if outcome.error:
            return [Difference("values", f"{name} ended with {outcome.error}")]
    figures = [
        {path: value for path, value in side.figures.items() if path.startswith("rounds.") or not state_alone}
        for side in (base, head)
    ]
    found = list(figure_differences(*figures))
    for role, tensors in base.tensors.items():
        found += tensor_differences(role, tensors, head.tensors[role])
    return found


def told(found: list[Difference], ignored: list[str]) -> tuple[str, bool]:
    """The line about a comparison, and whether it counts as a difference."""
    counted = [difference for difference in found if difference.kind not in ignored]
    others = [difference for difference in found if difference.kind in ignored]
    more = f" (and {len(counted) - 1} more)" if len(counted) > 1 else ""
    line = f"differs: {counted[0].text}{more}" if counted else "same"
    for kind in ignored:
        if texts := [difference.text for difference in others if difference.kind == kind]:
            line += f"; {len(texts)} ignored ({kind}): {texts[0]}"
    return line, bool(counted)
