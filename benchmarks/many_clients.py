# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the number of clients costs, with the number of clients per round kept: start-up, memory, and seconds per round.

For each number of clients a process of its own splits rows on disk (the same number per client) by Dirichlet over
their labels, makes a `FederatedTrainer` whose clients keep tensors of their own between rounds (`fedsa_lora`), and
runs some rounds with a checkpoint each. Start-up is from the split to the trainer that is ready to train, the base
model's loading included, imports excluded. Memory is that which no file stands behind (`RssAnon`), since pages of
memory-mapped data are given back whenever somebody needs them; it is read after start-up and after every round.

    python benchmarks/many_clients.py
    python benchmarks/many_clients.py --num_clients 100 1000 10000 --clients_per_round 50 --json

With `--json` the last line is one JSON object: `startup_seconds` of the largest federation, `memory_growth_mib` and
`round_ratio` of the largest over the smallest (0 and 1 are best; `round_ratio_without_preparing` leaves out
tokenising, which clients that come back save), and the figures by number of clients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fed_trainer import read_record


ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "recipes/offline/model"))
    parser.add_argument("--num_clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--clients_per_round", type=int, default=50)
    parser.add_argument("--num_rounds", type=int, default=8)
    parser.add_argument("--rows_per_client", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=2)
    parser.add_argument("--aggregation", default="fedsa_lora")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.num_rounds < 2:
        parser.error("--num_rounds should be 2 or more: the first builds the engine and is not timed")
    return args


def write_rows(count: int, folder: str) -> None:
    """
    The offline demo's rows, repeated, as an Arrow file; in a process that ends, so that none of it stays in memory.
    """
    from datasets import Dataset

    sys.path.insert(0, str(ROOT / "recipes/offline"))
    from client_data import build_clients

    columns: dict[str, list[str]] = {"prompt": [], "completion": [], "client": []}
    for client, rows in build_clients()[0].items():
        columns["prompt"] += rows["prompt"]
        columns["completion"] += rows["completion"]
        columns["client"] += [client] * len(rows)
    times = -(-count // len(columns["prompt"]))
    Dataset.from_dict({name: (values * times)[:count] for name, values in columns.items()}).save_to_disk(folder)


def anonymous_mib() -> float:
    """Resident memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("This kernel does not report `RssAnon` in /proc/self/status.")


def write_rows_elsewhere(count: int, folder: str) -> None:
    """`write_rows` in a process of its own."""
    program = f"import many_clients; many_clients.write_rows({count}, {folder!r})"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, capture_output=True)


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/run",
        "num_rounds": args.num_rounds,
        "clients_per_round": args.clients_per_round,
        "aggregation": args.aggregation,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "label_column": "client",
        "save_total_limit": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }


def measure(args: argparse.Namespace, num_clients: int) -> dict[str, Any]:
    """Figures of one federation, in this process."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import TrainerCallback

    from fed_trainer import FederatedConfig, FederatedTrainer, dirichlet_partition

    torch.set_num_threads(1)

    class Memory(TrainerCallback):
        def __init__(self) -> None:
            self.mib: list[float] = []

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            self.mib.append(anonymous_mib())

    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        write_rows_elsewhere(num_clients * args.rows_per_client, folder)
        rows = load_from_disk(folder)
        before, start = anonymous_mib(), time.perf_counter()
        clients = dirichlet_partition(rows, num_clients, alpha=100.0, column="client", min_examples=4)
        trainer = FederatedTrainer(
            model=args.model,
            args=FederatedConfig(**settings(args, folder)),
            train_dataset=clients,
            peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
            callbacks=[memory],
        )
        startup, started = time.perf_counter() - start, anonymous_mib()
        trainer.train()
        record = read_record(f"{folder}/run")
        phases = [entry["seconds"] for entry in record["rounds"][1:]]  # the first round builds the engine
    return {
        "startup_seconds": startup,
        "memory_before_mib": before,
        "memory_after_startup_mib": started,
        "memory_after_rounds_mib": memory.mib,
        "round_seconds": statistics.median(sum(phase.values()) for phase in phases),
        "phase_seconds": {name: statistics.median(phase[name] for phase in phases) for name in phases[0]},
    }


def main() -> None:
    args = parse()
    if args.only is not None:
        print(json.dumps(measure(args, args.only)))
        return
    figures: dict[int, dict[str, Any]] = {}
    for number in sorted(args.num_clients):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(number)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[number] = json.loads(output.splitlines()[-1])
        figure = figures[number]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in figure["phase_seconds"].items())
        print(
            f"{number} clients: start-up {figure['startup_seconds']:.1f} s, round {figure['round_seconds']:.2f} s "
            f"({phases}), memory {figure['memory_before_mib']:.0f} MiB before, "
            f"{figure['memory_after_startup_mib']:.0f} after start-up, "
            f"{', '.join(f'{mib:.0f}' for mib in figure['memory_after_rounds_mib'])} after the rounds",
            flush=True,
        )
    fewest, most = figures[min(figures)], figures[max(figures)]

    def grown(figure: dict[str, Any]) -> float:
        return figure["memory_after_rounds_mib"][-1] - figure["memory_before_mib"]

    def without_preparing(figure: dict[str, Any]) -> float:
        return figure["round_seconds"] - figure["phase_seconds"]["prepare"]

    result = {
        "startup_seconds": most["startup_seconds"],
        "memory_growth_mib": grown(most) - grown(fewest),
        "round_ratio": most["round_seconds"] / fewest["round_seconds"],
        "round_ratio_without_preparing": without_preparing(most) / without_preparing(fewest),
        "by_num_clients": figures,
    }
    shown = (
        f"start-up {result['startup_seconds']:.1f} s, memory +{result['memory_growth_mib']:.0f} MiB, "
        f"round x{result['round_ratio']:.2f} (most over fewest clients)"
    )
    print(json.dumps(result) if args.json else shown)


if __name__ == "__main__":
    main()
