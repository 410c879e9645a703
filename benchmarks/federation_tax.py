# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a federated round costs beyond its local steps.

The floor is a bare PyTorch loop: the same model object, adapter, start, batches (recorded as they reach the model),
loss, clipping and AdamW, and the weighted mean at the end. It runs after every round of a `FederatedTrainer`, in
the same process with the same threads, and has to arrive at the same adapter. A round counts with everything it
does: preparing, loading, training, reading, checking, aggregating and writing its checkpoint. Memory is the peak
resident size of further processes: one runs the trainer alone, one the floor alone after the same imports and with
the same data loaded (`memory_ratio` compares these two), and one the floor without importing TRL and datasets.

    python benchmarks/federation_tax.py
    python benchmarks/federation_tax.py --model MODEL --dataset_name DATA --prompt_column question \
        --completion_column answer --client_column collection --json

With `--json` the last line is one JSON object; `ratio` and `memory_ratio` are trainer over floor (1 is best).
`ratio_over_trl_loss` is the ratio to a floor that computes its loss as TRL does (in chunks, with the figures TRL
logs).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, set_seed  # noqa: E402

from peft_scl import SclConfig  # noqa: E402


State = dict[str, torch.Tensor]
Batches = list[dict[str, torch.Tensor]]
LEARNING_RATE = 1e-3
MODEL_KWARGS = {"attention_dropout": 0.0}  # random numbers would keep the two sides from arriving at the same adapter


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "recipes/offline/model"))
    parser.add_argument("--dataset_name", help="folder or Hub id; the offline demo's clients if not given")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--client_column")
    parser.add_argument("--num_clients", type=int, default=4)
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=["trainer", "floor", "floor_without_imports"], help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_clients(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset

    from fed_trainer import natural_partition

    if args.dataset_name is None:
        sys.path.insert(0, str(ROOT / "recipes/offline"))
        from client_data import build_clients

        clients = build_clients()[0]
        clients = {name: rows.select_columns(["prompt", "completion"]) for name, rows in clients.items()}
    else:
        rows = load_dataset(args.dataset_name, split="train")
        clients = natural_partition(rows, args.client_column)
        names = {args.prompt_column: "prompt", args.completion_column: "completion"}
        clients = {
            name: rows.select_columns(list(names)).rename_columns(
                {old: new for old, new in names.items() if old != new}
            )
            for name, rows in clients.items()
        }
    return dict(sorted(clients.items())[: args.num_clients])


def stock_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of transformers: full logits, cross entropy."""
    return model(**batch, use_cache=False).loss


def trl_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `SFTTrainer`: log-probabilities in chunks, without the full logits, and the figures it logs."""
    output = model(**batch, use_cache=False, fused_lm_head=True)
    return -output.log_probs.sum() / output.label_mask.sum()


def bare_round(
    model: PeftModel,
    start: State,
    clients: list[tuple[Batches, int]],
    loss: Callable[[PeftModel, dict[str, torch.Tensor]], torch.Tensor] = stock_loss,
) -> State:
    """One round of the floor: per client a fresh AdamW over its batches, then the mean weighted by examples."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    total = sum(num_examples for _, num_examples in clients)
    model.train()
    for batches, num_examples in clients:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
        for batch in batches:
            loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in trained.items():
                mean[name].add_(parameter, alpha=num_examples / total)
    return mean


def make_trainer(args: argparse.Namespace, output_dir: str, callbacks: list[Any]) -> Any:
    from fed_trainer import FederatedConfig, FederatedTrainer

    config = FederatedConfig(
        output_dir=output_dir,
        num_rounds=args.repetitions + 1,  # the first round warms up and is not counted
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=LEARNING_RATE,
        max_length=args.max_length,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs=MODEL_KWARGS,
        save_total_limit=1,
        seed=0,
    )
    return FederatedTrainer(
        model=args.model,
        args=config,
        train_dataset=load_clients(args),
        peft_config=SclConfig(r=16, task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def run_trainer(args: argparse.Namespace, alternate: bool) -> tuple[dict[str, list[float]], Batches]:
    """Seconds per round of the trainer and of the floor with both losses, and the batches of the last round."""
    from transformers import TrainerCallback

    recorded: Batches = []
    seconds: dict[str, list[float]] = {"floor": [], "floor_trl_loss": []}

    class Floor(TrainerCallback):
        """After every round: the same round, bare."""

        start: State

        def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:  # type: ignore[override]
            if "loss" not in logs or not alternate:
                return
            model = trainer.model
            arrived = named_state(model)
            steps = args.max_steps
            clients = [
                (recorded[-steps * (trainer.sampler.num_sampled - k) :][:steps], len(trainer._clients[name]))
                for k, name in enumerate(trainer.sampler.clients)
            ]
            start = time.perf_counter()
            mean = bare_round(model, self.start, clients)
            middle = time.perf_counter()
            bare_round(model, self.start, clients, trl_loss)
            seconds["floor"].append(middle - start)
            seconds["floor_trl_loss"].append(time.perf_counter() - middle)
            gap, way = distance(mean, arrived), distance(arrived, self.start)
            if gap > 1e-3 * way:  # rounding, magnified by Adam where gradients are tiny
                raise AssertionError(
                    f"the floor ended {gap / way:.1e} of the way beside the trainer: not the same work"
                )
            restore(model, arrived)
            self.start = arrived

    floor = Floor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder, [floor])
        floor.start = named_state(trainer.model)
        compute_loss = trainer.compute_loss

        def recording(model: PeftModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
            recorded.append({key: tensor.clone() for key, tensor in inputs.items()})
            return compute_loss(model, inputs, **kwargs)

        if alternate:
            trainer.compute_loss = recording
        trainer.train()
        seconds["trainer"] = [sum(entry["seconds"].values()) for entry in trainer.record["rounds"]]
    return {side: values[1:] for side, values in seconds.items()}, recorded[-args.max_steps * args.num_clients :]


def named_state(model: PeftModel) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(left: State, right: State) -> float:
    return torch.cat([(left[name] - right[name]).flatten() for name in right]).norm().item()


@torch.no_grad()
def restore(model: PeftModel, state: State) -> None:
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])


def run_floor(args: argparse.Namespace) -> None:
    """Nothing but the floor, on the batches of an earlier process."""
    if args.only == "floor":
        import fed_trainer  # noqa: F401

        _ = load_clients(args)
    flat = load_file(args.exchange)
    batches: Batches = [{} for _ in range(args.max_steps * args.num_clients)]
    for key, tensor in flat.items():
        index, name = key.split(".", 1)
        batches[int(index)][name] = tensor
    set_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, **MODEL_KWARGS), SclConfig(r=16, task_type="CAUSAL_LM")
    )
    steps = args.max_steps
    clients = [(batches[k * steps : (k + 1) * steps], 1) for k in range(args.num_clients)]
    state = named_state(model)
    for _ in range(3):
        state = bare_round(model, state, clients)


def peak_memory(args: argparse.Namespace, only: str, exchange: Path) -> float:
    """Peak resident size in MB of a process of its own that runs one side."""
    command = [sys.executable, __file__, "--only", only, "--exchange", str(exchange), "--repetitions", "2"]
    for name in ("model", "dataset_name", "prompt_column", "completion_column", "client_column", "num_clients"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    for name in ("max_steps", "batch_size", "max_length", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])["peak_mb"]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.only is not None:
        if args.only == "trainer":
            run_trainer(args, alternate=False)
        else:
            run_floor(args)
        # not `ru_maxrss`, which starts from the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"peak_mb": peak_kb / 1024}))
        return

    seconds, batches = run_trainer(args, alternate=True)
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "batches.safetensors"
        save_file({f"{i}.{name}": t for i, batch in enumerate(batches) for name, t in batch.items()}, exchange)
        peaks = {only: peak_memory(args, only, exchange) for only in ("trainer", "floor", "floor_without_imports")}

    ratios = [trainer / floor for trainer, floor in zip(seconds["trainer"], seconds["floor"], strict=True)]
    over_trl = [trainer / floor for trainer, floor in zip(seconds["trainer"], seconds["floor_trl_loss"], strict=True)]
    result = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "memory_ratio": round(peaks["trainer"] / peaks["floor"], 3),
        "ratio_over_trl_loss": round(statistics.median(over_trl), 3),
        **{f"{side}_seconds": round(statistics.median(values), 3) for side, values in seconds.items()},
        **{f"{only}_mb": round(peak) for only, peak in peaks.items()},
        "repetitions": args.repetitions,
        "threads": args.threads,
    }
    print(f"{args.num_clients} clients, {args.max_steps} steps of batch {args.batch_size}, {args.threads} threads")
    print(f"{'':<10} {'s per round':>12} {'peak MB':>9}")
    print(f"{'floor':<10} {result['floor_seconds']:>12.3f} {result['floor_mb']:>9}")
    print(f"{'trainer':<10} {result['trainer_seconds']:>12.3f} {result['trainer_mb']:>9}")
    print(f"{'ratio':<10} {result['ratio']:>12.3f} {result['memory_ratio']:>9.3f}")
    print(f"over the floor with TRL's loss instead of that of transformers: {result['ratio_over_trl_loss']:.3f}")
    print(f"without importing TRL and datasets the floor peaks at {result['floor_without_imports_mb']} MB")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
