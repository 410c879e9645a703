# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What changing from one client to the next costs beyond its optimiser steps, with the engine kept and with one built
anew.

Each engine is launched as users launch it (`recipes/accelerate`; ZeRO with two processes on the CPU). In one process,
on the same prepared data, the sides take their turns with every client, in a shuffled order:

* kept: `local_rounds` of a `FederatedTrainer`;
* fresh_trainer (plain): write the state into the loaded model, `SFTTrainer(...)`, `train()`, read the state;
arguments,
  tokeniser and tokens are there already;
* fresh_model (plain): the same, with the base model loaded anew;
* rewrap (ZeRO-2, ZeRO-3): write the state, let `train()` of a trainer that stays destroy its engine and prepare
  another one, read the state.

All have to arrive at the same adapter. A step lasts from fetching its batch to the end of its update; what is left of
a turn counts. The garbage of the turn before is collected off the clock. Most of what `train()` adds to its steps is
one `gc.collect()`, which looks at everything that was ever imported and which a kept engine saves. So all is measured
twice: as it is, and (`_frozen`) after a `gc.freeze()`, which keeps the imports out of it.

    python benchmarks/engine_reuse.py --engines plain
    python benchmarks/engine_reuse.py --model MODEL --dataset_name DATA --prompt_column question \
        --completion_column answer --client_column collection --json

With `--json` the last line is one JSON object; its ratios are kept over the other (small is good), medians over
repetitions.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from federation_tax import load_clients  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.utils.integrations import gather_params_ctx  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from fed_trainer import FederatedConfig, FederatedTrainer  # noqa: E402
from fed_trainer.client.tasks import Task  # noqa: E402


State = dict[str, torch.Tensor]
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
CONFIGS = {"plain": "cpu.yaml", "zero2": "zero2.yaml", "zero3": "zero3.yaml"}
MODEL_KWARGS = {"attention_dropout": 0.0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "recipes/offline/model"))
    parser.add_argument("--dataset_name", help="folder or Hub id; the offline demo's clients if not given")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--client_column")
    parser.add_argument("--num_clients", type=int, default=4)
    parser.add_argument("--engines", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument(
        "--deepspeed_folder",
        default=os.environ.get("DEEPSPEED_FOLDER"),
        help="where DeepSpeed is, if it is not importable; the environment variable DEEPSPEED_FOLDER if not given",
    )
    parser.add_argument("--max_steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4, help="over all processes")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=list(CONFIGS), help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


class StepClock(TrainerCallback):
    """The seconds within optimiser steps, from fetching the batch on."""

    seconds = 0.0

    def watch(self, trainer: SFTTrainer) -> None:
        trainer.add_callback(self)
        fetch = trainer.get_batch_samples

        def started(*args: Any, **kwargs: Any) -> Any:
            self.start = time.perf_counter()
            return fetch(*args, **kwargs)

        trainer.get_batch_samples = started  # type: ignore[method-assign]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.start


class Side:
    """Trains one client after the other, each from a given state."""

    clock: StepClock
    trainer: SFTTrainer

    def turn(self, state: State, dataset: Dataset, seed: int) -> State:
        """What the client's data make of `state`."""
        raise NotImplementedError


class Kept(Side):
    """The engine of the first client serves all."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        config = FederatedConfig(num_rounds=1, **settings(args, folder))
        split_all_weights(config)
        self.trainer = self.federation = FederatedTrainer(
            model=args.model, args=config, train_dataset=load_clients(args), peft_config=lora()
        )
        self.clock = StepClock()
        self.clock.watch(self.trainer)

    def turn(self, state: State, dataset: Dataset, seed: int) -> State:
        (trained,) = self.federation.local_rounds([Task(state, dataset, seed)])
        return trained.state


class FreshTrainer(Side):
    """A new trainer for every client, on the model that is loaded."""

    def __init__(self, config: SFTConfig, path: str, tokenizer: Any) -> None:
        self.config, self.path, self.tokenizer = config, path, tokenizer
        self.model = self.load()
        self.clock = StepClock()

    def load(self) -> PeftModel:
        return get_peft_model(AutoModelForCausalLM.from_pretrained(self.path, **MODEL_KWARGS), lora())

    def turn(self, state: State, dataset: Dataset, seed: int) -> State:
        write(self.model, state)
        self.config.seed = seed
        self.trainer = SFTTrainer(
            model=self.model, args=self.config, train_dataset=dataset, processing_class=self.tokenizer
        )
        self.trainer.remove_callback(PrinterCallback)
        self.clock.watch(self.trainer)
        self.trainer.train()
        del self.model.get_base_model().forward  # each `SFTTrainer` would wrap that of the one before
        return read(self.model)


class FreshModel(FreshTrainer):
    """A new model and a new trainer for every client."""

    def turn(self, state: State, dataset: Dataset, seed: int) -> State:
        self.model = self.load()
        return super().turn(state, dataset, seed)


class Rewrap(Side):
    """One trainer, which builds a new DeepSpeed engine around its model for every client."""

    def __init__(self, args: argparse.Namespace, folder: str, tokenizer: Any, dataset: Dataset) -> None:
        # not before the other trainer is built: Accelerate takes one DeepSpeed plugin, and new arguments reset its
        # state
        config = SFTConfig(**settings(args, folder), dataset_kwargs={"skip_prepare_dataset": True})
        split_all_weights(config)
        self.trainer = SFTTrainer(
            model=args.model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora()
        )
        self.trainer.remove_callback(PrinterCallback)
        self.clock = StepClock()
        self.clock.watch(self.trainer)

    def turn(self, state: State, dataset: Dataset, seed: int) -> State:
        trainer: Any = self.trainer
        write(trainer.model, state)
        set_seed(seed)
        trainer.train_dataset = dataset
        trainer.model_wrapped = trainer.model
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()  # the first thing it does is to destroy the engine that accelerate knows of
        return read(trainer.model)


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The local round, which is the same for all sides."""
    return {
        "output_dir": folder,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size // PROCESSES,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_length": args.max_length,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": args.only == "plain",
        "ddp_backend": None if args.only == "plain" else "gloo",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": MODEL_KWARGS,
    }


def split_all_weights(config: SFTConfig) -> None:
    """Of ZeRO-3, which would leave those whole that are as small as in these models."""
    if config.deepspeed_plugin is not None:
        zero = config.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of the adapter under the names that PEFT saves them by."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def write(model: PeftModel, state: State) -> None:
    parameters = trained(model)
    with gather_params_ctx(list(parameters.values()), modifier_rank=0):  # of ZeRO-3; else it does nothing
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


@torch.no_grad()
def read(model: PeftModel) -> State:
    parameters = trained(model)
    with gather_params_ctx(list(parameters.values()), modifier_rank=None):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def distance(left: State, right: State) -> float:
    return torch.cat([(left[name] - right[name]).flatten() for name in right]).norm().item()


def measure(args: argparse.Namespace, sides: dict[str, Side], state: State) -> dict[str, Any]:
    """Seconds per turn beyond its steps, by side and repetition, and how far the adapters of the sides are apart."""
    kept = sides["kept"]
    assert isinstance(kept, Kept)
    clients = [kept.federation.client.data.prepared(name) for name in kept.federation._clients]
    order = random.Random(0)  # the same in all processes
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gap = 0.0
    for repetition in range(args.repetitions + 1):
        beyond = dict.fromkeys(sides, 0.0)
        for index, dataset in enumerate(clients):
            results = {}
            for name in order.sample(list(sides), len(sides)):
                gc.collect()
                kept.trainer.accelerator.wait_for_everyone()
                in_steps, start = sides[name].clock.seconds, time.perf_counter()
                results[name] = sides[name].turn(state, dataset, seed=1000 * repetition + index)
                beyond[name] += time.perf_counter() - start - (sides[name].clock.seconds - in_steps)
            way = distance(results["kept"], state)
            for result in results.values():
                gap = max(gap, distance(result, results["kept"]) / way)
            state = results["kept"]
        if repetition > 0:  # the first builds the engine that is kept
            for name, total in beyond.items():
                seconds[name].append(total / len(clients))
    if gap > 1e-3:
        raise AssertionError(f"The sides end {gap:.1e} of the way beside each other: not the same work.")
    return {"seconds": seconds, "gap": gap}


def work(args: argparse.Namespace) -> None:
    """What the processes of one engine do."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # before the other trainer is built, whose state of Accelerate new arguments would reset
        config = SFTConfig(**settings(args, folder), dataset_kwargs={"skip_prepare_dataset": True})
        config.model_init_kwargs = None
        kept = Kept(args, folder)
        tokenizer = kept.trainer.processing_class
        sides: dict[str, Side] = {"kept": kept}
        if args.only == "plain":
            sides["fresh_trainer"] = FreshTrainer(config, args.model, tokenizer)
            sides["fresh_model"] = FreshModel(config, args.model, tokenizer)
        else:
            sides["rewrap"] = Rewrap(args, folder, tokenizer, kept.trainer.train_dataset)
        figures = {"": measure(args, sides, kept.federation.federation.state)}
        gc.collect()
        gc.freeze()
        figures["_frozen"] = measure(args, sides, kept.federation.federation.state)
    wrapped = {type(side.trainer.model_wrapped).__name__ for side in sides.values()}
    if wrapped != ({"PeftModelForCausalLM"} if args.only == "plain" else {"DeepSpeedEngine"}):
        raise AssertionError(f"{args.only} was asked for, but the models are wrapped by {wrapped}.")
    if kept.trainer.is_world_process_zero():
        args.exchange.write_text(json.dumps(figures))
    kept.trainer.accelerator.wait_for_everyone()
    kept.trainer.accelerator.end_training()


def launch(args: argparse.Namespace, engine: str) -> dict[str, Any]:
    """What the processes of `engine` have measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if engine != "plain":
        environment["DS_ACCELERATOR"] = "cpu"
        if args.deepspeed_folder is not None:
            paths = [args.deepspeed_folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            # ninja, which DeepSpeed compiles with
            environment["PATH"] = os.pathsep.join([str(Path(args.deepspeed_folder, "bin")), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "recipes/accelerate" / CONFIGS[engine]), "--main_process_port", "0"]
        command += [__file__, "--only", engine, "--exchange", str(exchange)]
        for name in ("model", "dataset_name", "prompt_column", "completion_column", "client_column", "num_clients"):
            if getattr(args, name) is not None:
                command += [f"--{name}", str(getattr(args, name))]
        for name in ("max_steps", "batch_size", "max_length", "repetitions", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"The launch of {engine} failed: {' '.join(command)}\n{result.stderr}")
        return json.loads(exchange.read_text())


def check_deepspeed(folder: str | None) -> None:
    """Refuse to start what would fail after minutes."""
    if importlib.util.find_spec("deepspeed") is None and not Path(folder or "", "deepspeed").is_dir():
        sys.exit(
            "DeepSpeed cannot be imported, so ZeRO cannot be measured. Install it (`pip install peft-scl[deepspeed] "
            "ninja`), say where it is with --deepspeed_folder (`make env` puts it into .venv/deepspeed), or leave "
            "ZeRO out with `--engines plain`."
        )


def main() -> None:
    args = parse()
    if args.only is not None:
        work(args)
        return
    if args.engines != ["plain"]:
        check_deepspeed(args.deepspeed_folder)
    result: dict[str, Any] = {}
    print(
        f"{args.num_clients} clients, {args.max_steps} steps of batch {args.batch_size}, {args.threads} threads per "
        f"process"
    )
    print(f"{'':<8} {'':<14} {'ms per client beyond its steps':>32}   {'kept over it':<22} apart")
    for engine in args.engines:
        for suffix, figures in launch(args, engine).items():
            kept = figures["seconds"]["kept"]
            for side, seconds in figures["seconds"].items():
                row = f"{engine:<8} {side + suffix:<22} {spread([1000 * s for s in seconds], 1):>24}"
                result[f"{engine}_{side}_seconds{suffix}"] = round(statistics.median(seconds), 4)
                if side != "kept":
                    ratios = [own / other for own, other in zip(kept, seconds, strict=True)]
                    key = f"{engine}_over_{side}{suffix}"
                    result[key] = round(statistics.median(ratios), 3)
                    result[f"{key}_min"], result[f"{key}_max"] = round(min(ratios), 3), round(max(ratios), 3)
                    row += f"   {spread(ratios, 3):<22} {figures['gap']:.0e}"
                print(row, flush=True)
            result[f"{engine}_apart{suffix}"] = figures["gap"]
    result |= {"repetitions": args.repetitions, "threads": args.threads}
    if args.json:
        print(json.dumps(result))


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
