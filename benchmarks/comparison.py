# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Methods compared on federated tasks: a learning rate per method from a validation split, several seeds, one table.

Finished runs are kept in a file of JSON lines and not repeated, so a comparison that was cut off goes on where it was.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
import transformers
from federated_tasks import Task, federate
from torch import nn
from transformers import PreTrainedModel


__all__ = ["Member", "Method", "Runs", "Setting", "compare", "make_parser", "set_up", "summarise", "table"]


@dataclass(frozen=True)
class Member:
    """One method at one budget."""

    adapt: Callable[[PreTrainedModel], nn.Module]  # from the pretrained model to the one that is trained
    parameters: int  # trained ones, without a new head
    rank: int | None = None
    layers: list[int] | None = None  # indices of the adapted layers; None for all


class Method(Protocol):
    """A family of adapters, with a member per budget of trainable parameters."""

    @property
    def name(self) -> str: ...

    @property
    def every_budget(self) -> bool:
        """Whether it is run at every budget, or at the middle one only."""

    @property
    def learning_rate(self) -> float | None:
        """Where the search starts, if not where the setting says."""

    def member(self, task: Task, budget: int) -> Member | None:
        """The member that comes closest to the budget; None if there is none near it."""


@dataclass(frozen=True)
class Setting:
    """
    What is run on one task: budgets of trainable parameters, the first guess of the learning rate, and when to look.
    """

    tasks: list[Task]  # variants of the data; the learning rate is chosen on the first
    budgets: list[int]  # [0] if the methods have none
    learning_rate: float
    factor: float
    eval_rounds: int
    metric: str
    sign: int  # 1 if small is good, -1 if large is

    @property
    def middle(self) -> int:
        return self.budgets[len(self.budgets) // 2]


class Runs:
    """Finished runs by their key, in a file that grows by a line per run."""

    def __init__(self, path: Path, num_rounds: int | None) -> None:
        self.path, self.num_rounds = path, num_rounds
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.finished: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}

    def __call__(
        self, setting: Setting, task: Task, method: Method, budget: int, learning_rate: float, seed: int
    ) -> dict[str, Any] | None:
        """The figures of a run; None if the method has no member at this budget."""
        key = (
            f"{task.name} | {method.name} | {budget} | {learning_rate:.3g} | {seed} | "
            f"{self.num_rounds or task.num_rounds}"
        )
        if key not in self.finished:
            member = method.member(task, budget)
            if member is None:
                return None
            start = time.perf_counter()
            run = federate(
                task,
                member.adapt,
                learning_rate,
                seed,
                eval_rounds=setting.eval_rounds,
                num_rounds=self.num_rounds,
            )
            record = {
                "key": key,
                "task": task.name,
                "method": method.name,
                "budget": budget,
                "rank": member.rank,
                "layers": member.layers,
                "learning_rate": learning_rate,
                "seed": seed,
                "adapter_parameters": member.parameters,
                "seconds": round(time.perf_counter() - start, 1),
                **asdict(run),
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.finished[key] = json.loads(json.dumps(record))
            last = run.curve[max(run.curve)]
            print(f"{record['seconds']:>6.1f} s  {key}  {setting.metric} {last[setting.metric]:.4f}", flush=True)
        return self.finished[key]


def choose_learning_rate(
    runs: Runs, setting: Setting, method: Method, budget: int, first: float, search: bool
) -> float | None:
    """
    The best learning rate on the validation split with seed 0; climbs from `first` until both neighbours are worse.
    """

    def score(step: int) -> float:
        run = runs(setting, setting.tasks[0], method, budget, first * setting.factor**step, 0)
        assert run is not None
        value = setting.sign * run["validation"][setting.metric]
        return value if value == value else float("inf")  # a run that diverged

    if method.member(setting.tasks[0], budget) is None:
        return None
    best = 0
    while search and (step := min((best - 1, best, best + 1), key=score)) != best:
        best = step
    return first * setting.factor**best


def compare(
    runs: Runs, setting: Setting, compared: Sequence[Method], seeds: Iterable[int], search: bool
) -> list[dict[str, Any]]:
    """All runs of a setting; one row per task, budget and method with a figure per seed."""
    rows = []
    first: dict[str, float] = {}
    for budget in sorted(setting.budgets, key=lambda budget: budget != setting.middle):
        for method in compared:
            if budget != setting.middle and not method.every_budget:
                continue
            guess = first.get(method.name, method.learning_rate or setting.learning_rate)
            rate = choose_learning_rate(runs, setting, method, budget, guess, search)
            if rate is None:
                continue
            first.setdefault(method.name, rate)
            for task in setting.tasks:
                records = [runs(setting, task, method, budget, rate, seed) for seed in seeds]
                if all(records):
                    rows.append(summarise(setting, task, method, budget, [record for record in records if record]))
    return rows


def summarise(
    setting: Setting, task: Task, method: Method, budget: int, records: list[dict[str, Any]]
) -> dict[str, Any]:
    first = records[0]
    rounds = sorted(first["curve"], key=int)
    curve = {
        index: [record["curve"][index][setting.metric] for record in records if index in record["curve"]]
        for index in rounds
    }
    return {
        "keys": [record["key"] for record in records],
        "task": task.name,
        "method": method.name,
        "budget": budget,
        "rank": first["rank"],
        "layers": first["layers"],
        "adapter_parameters": first["adapter_parameters"],
        "learning_rate": first["learning_rate"],
        "curve": {index: statistics.mean(values) for index, values in curve.items()},
        "sd": statistics.stdev(curve[rounds[-1]]) if len(records) > 1 else None,
        "last": {
            name: statistics.mean(r["curve"][rounds[-1]][name] for r in records) for name in first["curve"][rounds[-1]]
        },
        "cross_term": {
            label: statistics.mean(record["cross_terms"][index] for record in records)
            for label, index in (("first", 0), ("last", -1))
            if first["cross_terms"]
        },
        "seconds": statistics.median(record["seconds"] for record in records),
    }


def table(rows: list[dict[str, Any]], metric: str, sign: int) -> str:
    """A Markdown table per task and budget, best first."""
    lines = []
    for task, budget in dict.fromkeys((row["task"], row["budget"]) for row in rows):
        group = [row for row in rows if (row["task"], row["budget"]) == (task, budget)]
        rounds = list(group[0]["curve"])
        about = f", about {budget} trainable parameters" if budget else ""
        lines += [f"\n{task}{about}; {metric}\n"]
        lines += [
            "| method | r | layers | parameters | lr | "
            + " | ".join(f"round {i}" for i in rounds)
            + " | sd | cross term |"
        ]
        lines += ["|" + "---|" * (7 + len(rounds))]
        for row in sorted(group, key=lambda row: sign * row["curve"][rounds[-1]]):
            layers = "all" if row["layers"] is None else ", ".join(map(str, row["layers"]))
            curve = " | ".join(f"{row['curve'][index]:.3f}" if index in row["curve"] else "-" for index in rounds)
            cross = row["cross_term"]
            lines += [
                f"| {row['method']} | {row['rank'] or '-'} | {layers} | {row['adapter_parameters']} | "
                f"{row['learning_rate']:.2g} | {curve} | "
                + ("-" if row["sd"] is None else f"{row['sd']:.3f}")
                + (f" | {cross['first']:.3f} to {cross['last']:.3f} |" if cross else " | - |")
            ]
    return "\n".join(lines)


def make_parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """The options that all comparisons have; `results` is where finished runs are kept."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="regular expression; only the methods whose names it finds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def set_up(threads: int) -> None:
    """Threads, and no bars and warnings between the lines of a comparison."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
