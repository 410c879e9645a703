# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of a training step with SCL and with PEFT's LoRA, at equal trainable parameters.

A step is forward, backward and AdamW over a stack of Llama blocks (no embedding, no head). All sides are built
once, with the same frozen weights, and take their steps in turn, in one process; a ratio is the median over the
rounds of the time of one side over that of LoRA on the down projections in the same round. Memory is the peak of
all live tensors (weights, gradients, optimiser, activations) in a step, counted tensor by tensor on the CPU, or the
peak of CUDA's allocator; `memory_ratio` leaves the frozen weights out, which are the same on both sides.

    python benchmarks/tuner_step.py
    python benchmarks/tuner_step.py --hidden_sizes 2048 --dtype bfloat16 --json
    python benchmarks/tuner_step.py --device cuda --dtype bfloat16 --json

With `--json` the last line is one JSON object; `time_ratio` and `memory_ratio` are the default `SclConfig` over
LoRA on the down projections at the largest hidden size.
"""

import argparse
import gc
import json
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaModel

from peft_scl import SclConfig


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REFERENCE = "LoRA, down_proj"
DEFAULT = "SCL, compress (the default)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs=2, default=[2, 512], metavar=("BATCH", "LENGTH"))
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on the down projections; sets the budget")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_base(args: argparse.Namespace, hidden: int) -> LlamaModel:
    """Frozen blocks with the proportions of TinyLlama (FFN 2.75 times as wide, 64 per head, 4 heads a key)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
    )
    return LlamaModel(config).to(args.device, getattr(torch, args.dtype)).requires_grad_(False)


def sides(base: Callable[[], LlamaModel], lora_r: int) -> dict[str, Any]:
    """One model per side, each with the rank that comes closest to the trainable parameters of the reference."""
    makers: dict[str, Callable[[int], PeftConfig]] = {
        REFERENCE: lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=["down_proj"]),
        "LoRA, all-linear": lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=ALL_LINEAR),
        DEFAULT: lambda r: SclConfig(r=r),
        "SCL, compress, SiLU": lambda r: SclConfig(r=r, activation="silu"),
        "SCL, compress, residual dropped": lambda r: SclConfig(r=r, keep_residual=False),
        "SCL, bottleneck, delta none": lambda r: SclConfig(r=r, variant="bottleneck", train_down_proj="none"),
        "SCL, bottleneck, delta low_rank": lambda r: SclConfig(r=r, variant="bottleneck"),
    }
    budget = trainable(get_peft_model(base(), makers[REFERENCE](lora_r)))
    models = {}
    for name, make in makers.items():
        per_rank = trainable(get_peft_model(base(), make(1)))
        models[name] = get_peft_model(base(), make(max(1, round(budget / per_rank))))
    return models


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def hold(self, tensors: list[torch.Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Stepper:
    """A model with its optimiser and input; calling it takes one training step."""

    def __init__(self, model: Any, inputs: torch.Tensor) -> None:
        self.model, self.inputs = model.train(), inputs
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def __call__(self) -> None:
        self.forward().float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> torch.Tensor:
        return self.model(inputs_embeds=self.inputs, use_cache=False).last_hidden_state

    def peak_bytes(self) -> int:
        """Peak of all live tensors during a step."""
        gc.collect()
        if self.inputs.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            # other sides are alive too: count what this step adds, and what it holds already
            return torch.cuda.max_memory_allocated() - before + sum(t.numel() * t.element_size() for t in self.held())
        counter = LiveBytes()
        counter.hold(self.held())
        with counter:
            self()
        return counter.peak

    def held(self) -> list[torch.Tensor]:
        """What is there before a step: weights, optimiser state, input."""
        state = [t for slot in self.optimizer.state.values() for t in slot.values() if isinstance(t, torch.Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state, self.inputs]

    def frozen_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)


def seconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, hidden: int) -> dict[str, dict[str, float]]:
    inputs = torch.randn(*args.tokens, hidden, device=args.device, dtype=getattr(torch, args.dtype))
    steppers = {
        name: Stepper(model, inputs) for name, model in sides(lambda: make_base(args, hidden), args.lora_r).items()
    }
    base = make_base(args, hidden)

    @torch.no_grad()
    def base_forward() -> None:
        base(inputs_embeds=inputs, use_cache=False)

    times: dict[str, list[float]] = {name: [] for name in steppers}
    forwards: dict[str, list[float]] = {name: [] for name in steppers}
    base_forwards: list[float] = []
    for repetition in range(args.repetitions + 1):
        for name, stepper in steppers.items():
            times[name].append(seconds(stepper, args.device))
            with torch.no_grad():
                forwards[name].append(seconds(stepper.forward, args.device))
        base_forwards.append(seconds(base_forward, args.device))
        if repetition == 0:  # warms up
            for values in (*times.values(), *forwards.values(), base_forwards):
                values.clear()

    figures = {}
    peaks = {name: stepper.peak_bytes() for name, stepper in steppers.items()}
    frozen = steppers[REFERENCE].frozen_bytes()
    for name, stepper in steppers.items():
        ratios = [own / lora for own, lora in zip(times[name], times[REFERENCE], strict=True)]
        figures[name] = {
            "trainable": trainable(stepper.model),
            "seconds": statistics.median(times[name]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
            "memory_ratio": (peaks[name] - frozen) / (peaks[REFERENCE] - frozen),
            "total_memory_ratio": peaks[name] / peaks[REFERENCE],
            "forward_over_base": statistics.median(
                own / alone for own, alone in zip(forwards[name], base_forwards, strict=True)
            ),
        }
    return figures


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    results = {}
    for hidden in args.hidden_sizes:
        results[hidden] = figures = measure(args, hidden)
        print(
            f"\nhidden {hidden}, {args.num_layers} layers, {args.tokens[0]} x {args.tokens[1]} tokens, "
            f"{args.dtype}, {args.device}"
        )
        print(
            f"{'':<38} {'trainable':>9} {'s/step':>7} {'time':>6} {'(range)':>14} {'memory':>7} {'total':>6} "
            f"{'forward/base':>13}"
        )
        for name, row in figures.items():
            spread = f"({row['time_ratio_min']:.2f}-{row['time_ratio_max']:.2f})"
            print(
                f"{name:<38} {row['trainable']:>9} {row['seconds']:>7.3f} {row['time_ratio']:>6.3f} {spread:>14} "
                f"{row['memory_ratio']:>7.3f} {row['total_memory_ratio']:>6.3f} {row['forward_over_base']:>13.3f}"
            )
    if args.json:
        largest = results[max(args.hidden_sizes)][DEFAULT]
        print(
            json.dumps(
                {
                    "time_ratio": round(largest["time_ratio"], 3),
                    "memory_ratio": round(largest["memory_ratio"], 3),
                    "results": {str(hidden): figures for hidden, figures in results.items()},
                }
            )
        )


if __name__ == "__main__":
    main()
