# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Held-out loss, or another metric, over rounds of several runs as a Markdown table: mean and standard deviation over the seeds of each method.

    python recipes/compare_runs.py SCL=out/scl-0,out/scl-1,out/scl-2 LoRA=out/lora-0,out/lora-1,out/lora-2
    python recipes/compare_runs.py --metric eval_accuracy LoRA=out/lora-0 BitFit=out/bitfit-0
"""

import argparse
import statistics
from typing import Any

from fed_trainer.record import held_out_metrics, read_record


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ({statistics.stdev(values):.3f})" if len(values) > 1 else "")


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

    curves = {
        name: [
            {round: metrics[arguments.metric] for round, metrics in held_out_metrics(record).items()}
            for record in records
        ]
        for name, records in columns.items()
    }
    rounds = sorted(set.intersection(*(set(curve) for runs in curves.values() for curve in runs)))
    print("| round | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for round in rounds:
        print(f"| {round} | " + " | ".join(cell([curve[round] for curve in runs]) for runs in curves.values()) + " |")
    parameters = [f"{records[0]['num_trainable_parameters']:,}" for records in columns.values()]
    print("| trainable parameters | " + " | ".join(parameters) + " |")
    print("| seeds | " + " | ".join(str(len(records)) for records in columns.values()) + " |")


if __name__ == "__main__":
    main()
