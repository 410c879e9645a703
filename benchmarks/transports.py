# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a transport adds to a round, by size of the adapter, and what it needs of the coordinator's memory.

Coordinator and clients are processes of their own, with the ends that `serve` and `join` use. The clients do not
train: they sleep for a while, the last one for the longest (`--seconds`), and answer with tensors of the size that
they were sent. A round is an `exchange`, with each answer added to a sum; what counts is its time without that of the
slowest client, from having the packet to having its answer (in one process, where clients take turns: without that of
all of them). Serialising, writing, looking and reading count, on both sides. S3 is moto's server, which is Python on
the same machine.

    python benchmarks/transports.py --json
    python benchmarks/transports.py --transports folder --sizes 0.25 --seconds 10
    python benchmarks/transports.py --memory --json    # of the coordinator, with 4 and with 32 clients
    python benchmarks/transports.py --many --json      # 50 clients in 8 processes, 20 rounds

With `--json` the last line is one JSON object: `<transport>_seconds_at_<MiB>` (such as `folder_seconds_at_0_25`;
medians over rounds) and `spread` (fewest and most); with `--memory` `coordinator_mib_beyond_3_adapters` (the largest)
and by number of clients; with `--many` `many_lost` (answers that did not come), `many_memory_growth_mib` of the
coordinator and `many_file_growth` of the store from the 2nd round to the last, and `many_seconds` per round, in which
clients do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

MIB = 2**20
NUM_TENSORS = 16
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "loopback", "AWS_DEFAULT_REGION": "us-east-1"}
PLACES = ("in_process", "folder", "s3")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 16, 64], help="MiB of the adapter")
    parser.add_argument("--num_clients", type=int, default=3)
    parser.add_argument("--num_rounds", type=int, default=7, help="the first of each size is not counted")
    parser.add_argument("--seconds", type=float, default=2.0, help="what the slowest client takes")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", choices=["coordinator", "clients"], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.num_rounds < 2:
        parser.error("--num_rounds should be 2 or more: the first is not counted")
    return args


# Where they meet


@contextlib.contextmanager
def place(transport: str, folder: str) -> Iterator[dict[str, Any]]:
    """Start what a transport needs; yields what the processes have to know of it."""
    if transport == "folder":
        yield {"address": f"{folder}/store"}
        return
    import boto3
    from moto.server import ThreadedMotoServer

    os.environ |= CREDENTIALS
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="federation")
        yield {"address": "s3://federation/run", "storage_options": {"endpoint_url": url}}
    finally:
        server.stop()


def network_at(where: dict[str, Any]) -> Any:
    """The network of a place."""
    from fed_trainer import Store

    return Store(**where, lease=2.0, patience=120.0)


# The clients


class Sleeper:
    """The clients' side: sleeps, and answers with as much as it was sent. A [`Site`] of a [`ClientProcess`]."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def accept(self, client: str, invitation: Any) -> Any:
        from fed_trainer.federation.packet import Packet

        return Packet("joined", {}, {"client": client, "num_examples": 1})

    def turn(self, packet: Any) -> Any:
        from fed_trainer.federation.packet import DELTA, STATE, Packet, named

        began = time.perf_counter()
        time.sleep(self._seconds[packet.meta["client"]])
        delta = named(DELTA, {name: tensor + 1 for name, tensor in packet.part(STATE).items()})
        meta = {"client": packet.meta["client"], "round": packet.meta["round"], "figures": {"train_loss": 0.0}}
        return Packet("update", delta, {**meta, "seconds": {"turn": time.perf_counter() - began}})

    def evaluate(self, packet: Any) -> Any:
        raise NotImplementedError("No client of this benchmark evaluates.")


def take_part(job: dict[str, Any]) -> None:
    from fed_trainer.client import process

    process.take_part(Sleeper(job["seconds"]), network_at(job["where"]), job["clients"])


# The coordinator


def memory_mib(of: str) -> float:
    """Memory of this process: `"RssAnon"`, that no file stands behind, or `"VmHWM"`, the most there was of all."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(of):
            return int(line.split()[1]) / 1024
    raise OSError(f"This kernel does not report `{of}` in /proc/self/status.")


def num_files(where: dict[str, Any]) -> int:
    """Files in a folder that is the address."""
    return sum(len(files) for _, _, files in os.walk(where["address"]))


def adapter(mib: float) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    count = int(mib * MIB / 4 / NUM_TENSORS)
    return {f"layer_{index}": torch.randn(count, generator=generator) for index in range(NUM_TENSORS)}


def rounds(job: dict[str, Any], transport: Any, mib: float) -> Iterator[dict[str, Any]]:
    """The figures of each round with an adapter of a size."""
    from fed_trainer.federation.packet import DELTA, STATE, Packet, named
    from fed_trainer.federation.transport.base import Packets
    from fed_trainer.federation.visits import Visits

    clients, state = job["clients"], adapter(mib)
    total = {name: tensor.clone() for name, tensor in state.items()}
    for number in range(1, job["num_rounds"] + 1):

        def packet(client: str, number: int = number) -> Packet:
            return Packet("train", named(STATE, state), {"client": client, "round": number})

        began, own, lost = time.perf_counter(), [], 0
        for reply in transport.exchange(Packets(packet, Visits(), clients), number):
            if reply.packet is None:
                lost += 1
                continue
            own.append(reply.seconds["turn"])
            for name, tensor in reply.packet.part(DELTA).items():
                total[name] += tensor
        wall = time.perf_counter() - began
        yield {
            "beyond": wall - (sum(own) if job["transport"] == "in_process" else max(own, default=0.0)),
            "lost": lost,
        }


def coordinate(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of all rounds, by size; the most memory over that before there was an adapter."""
    import torch

    from fed_trainer.federation.packet import Packet
    from fed_trainer.federation.transport import InProcess
    from fed_trainer.federation.transport.exchange import Exchange
    from fed_trainer.federation.transport.roster import Roster

    torch.set_num_threads(1)
    result: dict[str, Any] = {"by_size": {}}
    if job["transport"] == "in_process":
        for mib in job["sizes"]:
            result["by_size"][mib] = list(rounds(job, InProcess(Sleeper(job["seconds"])), mib))
        return result
    end = network_at(job["where"]).server_end()
    end.open("benchmark")
    end.greet(b"{}")
    exchange = Exchange(end, Roster(end, job["clients"], lambda: Packet("invite")), round_timeout=120)
    exchange.gather(wait=240, needed=len(job["clients"]))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was
    before = memory_mib("VmHWM")
    for mib in job["sizes"]:
        result["by_size"][mib] = []
        for figures in rounds(job, exchange, mib):
            if job["counts_files"]:
                figures |= {"memory_mib": memory_mib("RssAnon"), "files": num_files(job["where"])}
            result["by_size"][mib].append(figures)
    result["most_mib"] = memory_mib("VmHWM") - before
    end.close("all rounds are done", is_finished=True)
    return result


# Both


def measure(
    transport: str, sizes: list[float], num_clients: int, num_processes: int, num_rounds: int, seconds: float
) -> dict[str, Any]:
    """What the coordinator of a federation of its own has measured."""
    clients = [f"client-{index:02d}" for index in range(num_clients)]
    job: dict[str, Any] = {
        "transport": transport,
        "clients": clients,
        "sizes": sizes,
        "num_rounds": num_rounds,
        "seconds": {client: seconds * (index + 1) / num_clients for index, client in enumerate(clients)},
        "counts_files": transport == "folder",
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if transport != "in_process":
            job["where"] = stack.enter_context(place(transport, folder))
            for index in range(num_processes):
                process = process_of("clients", {**job, "clients": clients[index::num_processes]})
                stack.callback(process.wait, 60)
                stack.push(lambda kind, *rest, process=process: process.kill() if kind else None)
        coordinator = process_of("coordinator", job)
        output, _ = coordinator.communicate()
        if coordinator.returncode:
            raise RuntimeError(f"The coordinator of {transport} has failed; what it says is above.")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def process_of(role: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", role, "--job", json.dumps(job)]
    stdout = subprocess.PIPE if role == "coordinator" else subprocess.DEVNULL
    return subprocess.Popen(command, stdout=stdout, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"spread": {}}
    for transport in args.transports:
        figures = measure(transport, args.sizes, args.num_clients, args.num_clients, args.num_rounds, args.seconds)
        for size, of_rounds in figures["by_size"].items():
            beyond = [each["beyond"] for each in of_rounds[1:]]
            lost = sum(each["lost"] for each in of_rounds)
            key = f"{transport}_seconds_at_{float(size):g}".replace(".", "_")
            result[key], result["spread"][key] = statistics.median(beyond), [min(beyond), max(beyond)]
            print(
                f"{transport}, {float(size):g} MiB: {statistics.median(beyond):.3f} s beyond the slowest client "
                f"({min(beyond):.3f} to {max(beyond):.3f}; {len(beyond)} rounds{f', {lost} LOST' if lost else ''})",
                flush=True,
            )
            if lost:
                raise RuntimeError(f"{lost} answers did not come.")
    return result


def measure_memory(mib: float = 16.0) -> dict[str, Any]:
    beyond: dict[int, float] = {}
    for num_clients in (4, 32):
        figures = measure("folder", [mib], num_clients, 2, 4, seconds=0.0)
        beyond[num_clients] = figures["most_mib"] - 3 * mib
        print(
            f"{num_clients} clients of {mib:g} MiB: {figures['most_mib']:.0f} MiB, {beyond[num_clients]:.0f} beyond 3"
        )
    return {"coordinator_mib_beyond_3_adapters": max(beyond.values()), "by_num_clients": beyond}


def measure_many(mib: float = 0.25) -> dict[str, Any]:
    [of_rounds] = measure("folder", [mib], 50, 8, 20, seconds=0.0)["by_size"].values()
    beyond = [each["beyond"] for each in of_rounds[1:]]
    result = {
        "many_lost": sum(each["lost"] for each in of_rounds),
        "many_memory_growth_mib": of_rounds[-1]["memory_mib"] - of_rounds[1]["memory_mib"],
        "many_file_growth": of_rounds[-1]["files"] - of_rounds[1]["files"],
        "many_seconds": statistics.median(beyond),
        "by_round": of_rounds,
    }
    print(
        f"50 clients in 8 processes, 20 rounds: {result['many_lost']} lost, {result['many_seconds']:.2f} s per round, "
        f"{result['many_memory_growth_mib']:+.1f} MiB of the coordinator, {result['many_file_growth']:+d} files (of "
        f"{of_rounds[-1]['files']})"
    )
    return result


def main() -> None:
    args = parse()
    if args.role == "clients":
        take_part(args.job)
    elif args.role == "coordinator":
        print(json.dumps(coordinate(args.job)))
    else:
        result: dict[str, Any] = {}
        if args.memory:
            result |= measure_memory()
        if args.many:
            result |= measure_many()
        if not args.memory and not args.many:
            result |= measure_time(args)
        if args.json:
            print(json.dumps(result))


if __name__ == "__main__":
    main()
