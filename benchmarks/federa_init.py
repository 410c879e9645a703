# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time, error and memory of a FeDeRA start and of PEFT's `init_lora_weights="pissa"` and `"pissa_niter_16"`.

Each side wraps one `nn.Linear` that holds the same weight: principal factors, and the residual written back. The
sides take turns in one process; a speedup is the median over the rounds of the time of PEFT over ours in the same
round. The full SVD of `pissa` takes minutes on the large shapes, so it runs in the first round only there
(`--pissa_repetitions`). The error is the norm of the residual, as written back, over that of the best approximation
of rank `r`, from the eigenvalues of the float64 Gram matrix. Memory is the peak of the bytes that torch's
operations allocate, over those of the weight as stored; workspaces inside LAPACK are not counted.

The spectra are `gaussian` (independent entries), `decaying` (singular values fall as `i ** -0.36`, the median over
the dense weights of all-MiniLM-L6-v2) and `steep` (`1 / i`).

    python benchmarks/federa_init.py
    python benchmarks/federa_init.py --shapes 1024x4096 --dtypes bfloat16 --r 64 --json

With `--json` the last line is one JSON object; the two speedups are the smallest and `error_over_optimal` the
largest over the large weights (4096 rows or columns and more).
"""

import argparse
import itertools
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tuner_step import LiveBytes

from peft_scl import FederaConfig


SPECTRA = {"gaussian": 0.0, "decaying": 0.36, "steep": 1.0}
FEDERA, PISSA, PISSA_NITER = "FeDeRA", "pissa", "pissa_niter_16"
LARGE = 4096


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["384x1536", "4096x4096", "11008x4096"], metavar="OUTxIN")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=["gaussian", "decaying"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pissa_repetitions", type=int, default=1, help="of the full SVD, on large weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_weight(n: int, m: int, exponent: float) -> torch.Tensor:
    """Gaussian columns of falling length, turned so that no direction lies along an axis."""
    torch.manual_seed(0)
    weight = torch.randn(n, m) / n**0.5
    if exponent:
        weight *= torch.arange(1, m + 1) ** -exponent
        mirrors = torch.linalg.qr(torch.randn(m, 64)).Q
        weight -= 2 * (weight @ mirrors) @ mirrors.T
    return weight


def federa(model: nn.Module, r: int) -> PeftModel:
    return get_peft_model(model, FederaConfig(r=r, lora_alpha=2 * r, target_modules=["linear"]))


def pissa(model: nn.Module, r: int, init: Any) -> PeftModel:
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["linear"], init_lora_weights=init)
    return get_peft_model(model, config)


SIDES: dict[str, Callable[[nn.Module, int], PeftModel]] = {
    FEDERA: federa,
    PISSA_NITER: lambda model, r: pissa(model, r, PISSA_NITER),
    PISSA: lambda model, r: pissa(model, r, PISSA),
}


def model_of(weight: torch.Tensor) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(OrderedDict(linear=linear))


def layer_of(model: Any) -> Any:
    return model.base_model.model.linear


def least_error(weight: torch.Tensor, r: int) -> float:
    matrix = weight.double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T)[:-r].sum().sqrt().item()


def error(model: PeftModel) -> float:
    """Norm of the residual, as the base weight stores it."""
    return layer_of(model).get_base_layer().weight.data.double().norm().item()


def run(model: nn.Module, start: Callable[[nn.Module, int], PeftModel], r: int) -> tuple[PeftModel, float]:
    begin = time.perf_counter()
    return start(model, r), time.perf_counter() - begin


def measure(weight: torch.Tensor, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    large = max(weight.shape) >= LARGE
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    errors, peaks = {}, {}
    for repetition in range(args.repetitions):
        for name, start in SIDES.items():
            rare = name == PISSA and large
            if repetition == 0:  # warms up too
                model, counter = model_of(weight), LiveBytes()
                counter.hold(list(model.parameters()))
                with counter:
                    adapted, seconds = run(model, start, args.r)
                errors[name] = error(adapted)
                peaks[name] = counter.peak - weight.nbytes  # the weight itself is there before
                if rare:
                    times[name].append(seconds)
            if not rare or 0 < repetition < args.pissa_repetitions:
                times[name].append(run(model_of(weight), start, args.r)[1])
    least = least_error(weight, args.r)
    figures = {}
    for name in SIDES:
        ratios = [other / own for other, own in zip(times[name], times[FEDERA], strict=False)]
        figures[name] = {
            "seconds": statistics.median(times[name]),
            "federa_speedup": statistics.median(ratios),
            "federa_speedup_min": min(ratios),
            "federa_speedup_max": max(ratios),
            "error_over_optimal": errors[name] / least,
            "peak_memory_in_layers": peaks[name] / weight.nbytes,
        }
    return figures


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    print(f"{'':<32} {'':<15} {'seconds':>8} {'FeDeRA is faster by':>24} {'error/optimal - 1':>18} {'peak/layer':>11}")
    results, large = {}, []
    for shape, dtype, spectrum in itertools.product(args.shapes, args.dtypes, args.spectra):
        n, m = map(int, shape.split("x"))
        case = f"{shape} {dtype} {spectrum}"
        weight = make_weight(n, m, SPECTRA[spectrum]).to(getattr(torch, dtype))
        results[case] = figures = measure(weight, args)
        if max(n, m) >= LARGE:
            large.append(figures)
        for name, row in figures.items():
            speedup = f"{row['federa_speedup']:.2f} ({row['federa_speedup_min']:.2f}-{row['federa_speedup_max']:.2f})"
            print(
                f"{case:<32} {name:<15} {row['seconds']:>8.3f} {speedup:>24} {row['error_over_optimal'] - 1:>18.1e} "
                f"{row['peak_memory_in_layers']:>11.2f}",
                flush=True,
            )
    if args.json:
        summary = large or list(results.values())
        print(
            json.dumps(
                {
                    "speedup_over_pissa": round(min(row[PISSA]["federa_speedup"] for row in summary), 2),
                    "speedup_over_pissa_niter_16": round(
                        min(row[PISSA_NITER]["federa_speedup"] for row in summary), 2
                    ),
                    "error_over_optimal": max(row[FEDERA]["error_over_optimal"] for row in summary),
                    "error_over_optimal_pissa_niter_16": max(
                        row[PISSA_NITER]["error_over_optimal"] for row in summary
                    ),
                    "peak_memory_in_layers": round(max(row[FEDERA]["peak_memory_in_layers"] for row in summary), 2),
                    "results": results,
                }
            )
        )


if __name__ == "__main__":
    main()
