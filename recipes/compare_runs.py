# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Held-out loss, or another metric, over rounds of several runs as a Markdown table: mean and standard deviation over
the seeds of each method.

    python recipes/compare_runs.py SCL=out/scl-0,out/scl-1,out/scl-2 LoRA=out/lora-0,out/lora-1,out/lora-2
    python recipes/compare_runs.py --metric eval_accuracy LoRA=out/lora-0 BitFit=out/bitfit-0
"""

import argparse
import statistics
from typing import Any

from fed_trainer import read_record
from fed_trainer.output.figures import held_out_metrics


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ({statistics.stdev(values):.3f})" if len(values) > 1 else "")


def curve(record: dict[str, Any], metric: str) -> dict[int, float]:
    """The metric by round, of the rounds in which it was measured."""
    return {round: metrics[metric] for round, metrics in held_out_metrics(record).items() if metric in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="NAME=FOLDER,FOLDER,...")
    parser.add_argument("--metric", default="eval_loss")
    arguments = parser.parse_args()
    columns: dict[str, list[dict[str, Any]]] = {}
    for method in arguments.methods:
        name, _, folders = method.partition("=")
        columns[name] = [read_record(folder) for folder in folders.split(",")]
        if not all(columns[name]):
            parser.error(f"not every folder of {name} holds a federation.json: {folders}")

    curves = {name: [curve(record, arguments.metric) for record in records] for name, records in columns.items()}
    for name, runs in curves.items():
        if not all(runs):
            known = sorted({key for record in columns[name] for m in held_out_metrics(record).values() for key in m})
            parser.error(f"not every run of {name} measured {arguments.metric!r}. They measured {known}")
    rounds = sorted(set.intersection(*(set(run) for runs in curves.values() for run in runs)))
    print("| round | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for round in rounds:
        print(f"| {round} | " + " | ".join(cell([run[round] for run in runs]) for runs in curves.values()) + " |")
    parameters = [f"{records[0]['num_trainable_parameters']:,}" for records in columns.values()]
    print("| trainable parameters | " + " | ".join(parameters) + " |")
    print("| seeds | " + " | ".join(str(len(records)) for records in columns.values()) + " |")


if __name__ == "__main__":
    main()
