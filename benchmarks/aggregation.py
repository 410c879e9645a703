# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Speed and memory of averaging many client updates, read from safetensors files one at a time.

- `throughput_ratio`: a plain loop that reads the same files and adds them up, over reading, validating and aggregating
  them, in seconds. Both take turns, a block of clients each, so that other load on the machine falls on both.
- `memory_in_adapters`: peak resident memory of a process that aggregates the updates and steps, beyond what it holds
  with the global adapter, in adapters; the largest of several numbers of clients, each in a process of its own.
- `speedup_over_flower`: reading the files and averaging them with the function that Flower's strategies call
  (`aggregate_arrayrecords`), over the same with `FedAvg`, validation included, in seconds. The function takes
  Flower's own records, so the arrays are put into those in between; `speedup_over_flower_without_wrapping` leaves
  that out. `speedup_over_flower_in_memory` starts, on both sides, from updates that are in memory already, and does
  not validate. Flower runs in an environment of its own, `.venv/flower`, made if it is not there.

The clients cycle through a few files; after the first pass they come from the page cache, on all sides.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --num_clients 100 --skip_flower --json

With `--json` the last line is one JSON object.
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

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fed_trainer.federation.validation import validated
from fed_trainer.methods.aggregation import ClientUpdate, FedAvg
from fed_trainer.methods.server_optimizers import ServerOptimizer
from fed_trainer.state.adapter_state import AdapterState, state_bytes


FLOWER = "flwr==1.41.0"
BLOCK = 25  # clients per turn
RANK, WIDTH = 16, 2048

FLOWER_PROGRAM = """
import json, sys, time
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from safetensors.numpy import load_file, save_file

files, num_clients, output = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
load_file(files[0])
start = time.perf_counter()
updates = [load_file(files[client % len(files)]) for client in range(num_clients)]
read = time.perf_counter()
records = []
for client, update in enumerate(updates):
    arrays = ArrayRecord({key: Array(value) for key, value in update.items()})
    records.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": client + 1})}))
del updates, update
in_memory = time.perf_counter()
mean = aggregate_arrayrecords(records, "num-examples")
end = time.perf_counter()
save_file({key: array.numpy().astype(np.float32) for key, array in mean.items()}, output)
in_memory_only = end - in_memory
print(json.dumps({"all": end - start, "without_wrapping": in_memory_only + read - start, "in_memory": in_memory_only}))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_clients", type=int, default=1000)
    parser.add_argument("--num_flower_clients", type=int, default=100)
    parser.add_argument("--num_parameters", type=int, default=10_000_000)
    parser.add_argument("--num_files", type=int, default=16, help="distinct updates that the clients cycle through")
    parser.add_argument("--repetitions", type=int, default=3, help="of the comparison with Flower; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip_flower", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure_memory", nargs=2, metavar=("FOLDER", "NUM_CLIENTS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_files(folder: Path, args: argparse.Namespace) -> list[str]:
    """A few updates of a LoRA of rank 16 on layers of width 2048."""
    generator = torch.Generator().manual_seed(0)
    num_layers = max(1, round(args.num_parameters / (2 * RANK * WIDTH)))
    files = []
    for index in range(args.num_files):
        delta = {}
        for layer in range(num_layers):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            delta[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
            delta[f"{name}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
        files.append(str(folder / f"update-{index:02}.safetensors"))
        save_file(delta, files[-1])
    return files


def read(file: str) -> AdapterState:
    """Into memory of its own: the default, a memory map, keeps some bytes per tensor for good (safetensors 0.8.0)."""
    return load_file(file, backend="pread")


def update_of(files: list[str], client: int) -> ClientUpdate:
    return ClientUpdate(f"client-{client}", client + 1, read(files[client % len(files)]))


def zeros_like(file: str) -> AdapterState:
    """
    Without reading it: what is read once stays with the allocator, and would hide in the memory the process
    begins with.
    """
    with safe_open(file, "pt") as tensors:
        state = {key: torch.empty(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return {key: tensor.fill_(0.0) for key, tensor in state.items()}


def measure_throughput(files: list[str], num_clients: int) -> tuple[float, float]:
    """Seconds of the plain loop and of ours, for all clients."""
    state = zeros_like(files[0])
    plain_sum = zeros_like(files[0])
    rule = FedAvg()
    rule.begin(state)
    plain = ours = 0.0
    seen: set[str] = set()
    for first in range(0, num_clients, BLOCK):
        clients = range(first, min(first + BLOCK, num_clients))
        start = time.perf_counter()
        for client in clients:
            for key, tensor in read(files[client % len(files)]).items():
                plain_sum[key].add_(tensor)
        middle = time.perf_counter()
        for client in clients:
            rule.add(validated(update_of(files, client), state, seen))
            seen.add(f"client-{client}")
        end = time.perf_counter()
        plain, ours = plain + middle - start, ours + end - middle
    start = time.perf_counter()
    rule.finish()
    return plain, ours + time.perf_counter() - start


def measure_memory(files: list[str], num_clients: int) -> float:
    """Peak of this process while it aggregates and steps, beyond what it holds before, in adapters."""
    state = zeros_like(files[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    rule = FedAvg()
    rule.begin(state)
    for client in range(num_clients):
        rule.add(validated(update_of(files, client), state))
    state = ServerOptimizer().step(state, rule.finish())
    return (resident("VmHWM") - before) / state_bytes(state)


def resident(field: str) -> int:
    """Bytes of a field of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory_in_process(files: list[str], num_clients: int) -> float:
    command = [sys.executable, __file__, "--measure_memory", str(Path(files[0]).parent), str(num_clients)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def flower_python() -> str:
    """The interpreter of an environment with Flower."""
    folder = Path(__file__).parent.parent / ".venv" / "flower"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = [FLOWER, "numpy", "safetensors"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def compare_with_flower(files: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of both sides, taken in turns."""
    seconds: dict[str, list[float]] = {
        "flower": [],
        "flower_without_wrapping": [],
        "flower_in_memory": [],
        "ours": [],
        "ours_in_memory": [],
    }
    state = zeros_like(files[0])
    python = flower_python()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads)}
    output = str(Path(files[0]).parent / "flower.safetensors")
    command = [python, "-c", FLOWER_PROGRAM, json.dumps(files), str(args.num_flower_clients), output]
    for _ in range(args.repetitions):
        flower = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        theirs = json.loads(flower.stdout.splitlines()[-1])
        seconds["flower"].append(theirs["all"])
        seconds["flower_without_wrapping"].append(theirs["without_wrapping"])
        seconds["flower_in_memory"].append(theirs["in_memory"])

        start = time.perf_counter()
        rule = FedAvg()
        rule.begin(state)
        for client in range(args.num_flower_clients):
            rule.add(validated(update_of(files, client), state))
        mean = rule.finish()
        seconds["ours"].append(time.perf_counter() - start)
        for key, tensor in read(output).items():
            torch.testing.assert_close(mean[key], tensor, rtol=0, atol=1e-5)

        updates = [update_of(files, client) for client in range(args.num_flower_clients)]
        start = time.perf_counter()
        rule = FedAvg()
        rule.begin(state)
        for update in updates:
            rule.add(update)
        rule.finish()
        seconds["ours_in_memory"].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.measure_memory:
        folder, num_clients = args.measure_memory
        print(measure_memory(sorted(str(file) for file in Path(folder).glob("update-*")), int(num_clients)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), args)
        adapter_bytes = state_bytes(read(files[0]))
        counts = sorted({min(count, args.num_clients) for count in (10, 100, 1000, args.num_clients)})
        memory = {count: measure_memory_in_process(files, count) for count in counts}
        plain, ours = measure_throughput(files, args.num_clients)
        result: dict[str, Any] = {
            "throughput_ratio": plain / ours,
            "memory_in_adapters": max(memory.values()),
            "memory_by_num_clients": memory,
            "seconds": ours,
            "seconds_plain": plain,
            "num_clients": args.num_clients,
            "adapter_bytes": adapter_bytes,
            "gigabytes_per_second": args.num_clients * adapter_bytes / ours / 1e9,
        }
        if not args.skip_flower:
            flower = compare_with_flower(files, args)
            result["speedup_over_flower"] = flower["flower"] / flower["ours"]
            result["speedup_over_flower_without_wrapping"] = flower["flower_without_wrapping"] / flower["ours"]
            result["speedup_over_flower_in_memory"] = flower["flower_in_memory"] / flower["ours_in_memory"]
            result["seconds_flower"] = flower
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
