# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What writing the residual of FeDeRA into the base model costs, in each dtype: the table of docs/federa.md.

    python benchmarks/federa_rounding.py --model STORIES260K [--r 8] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from peft_scl import FederaConfig, FederaLayer


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--encoder", action="store_true", help="the model has no language modelling head")
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rows = [measure(args, name) for name in DTYPES]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )


@torch.no_grad()
def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The figures of one dtype; all but `exact_after_unload`, a share, and `keep_base_equal` are relative."""
    model_class = AutoModel if args.encoder else AutoModelForCausalLM
    full = model_class.from_pretrained(args.model, dtype=torch.float32).eval()
    base = copy.deepcopy(full).to(DTYPES[dtype])
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    config = {"r": args.r, "lora_alpha": args.r, "target_modules": targets}
    weights = {name: module.weight.double() for name, module in base.named_modules() if hasattr(module, "weight")}
    tokens = torch.randint(3, full.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    expected, exact = _output(base, tokens), _output(full, tokens)

    kept = get_peft_model(copy.deepcopy(base), FederaConfig(keep_base=True, **config)).eval()
    model = get_peft_model(base, FederaConfig(**config)).eval()
    output = _output(model, tokens)
    rounding, norm, largest = 0.0, 0.0, 0.0
    names = []
    adapted: Any = model.get_base_model()
    for name, layer in adapted.named_modules():
        if not isinstance(layer, FederaLayer):
            continue
        names.append(name)
        start = layer.start_scaling["default"] * (
            layer.lora_start_B["default"].double() @ layer.lora_start_A["default"].double()
        )
        error = layer.get_base_layer().weight.double() - (weights[name] - start)
        rounding += error.square().sum().item()
        norm += weights[name].square().sum().item()
        largest = max(largest, (error.abs().max() / weights[name].abs().max()).item())
    plain: Any = model.unload()
    unloaded = dict(plain.named_modules())
    equal = sum(int((unloaded[name].weight.double() == weights[name]).sum()) for name in names)
    return {
        "dtype": dtype,
        "rounding": (rounding / norm) ** 0.5,
        "rounding_largest": largest,
        "output_change": _distance(output, expected),
        "output_change_of_dtype": _distance(expected, exact),
        "exact_after_unload": equal / sum(weights[name].numel() for name in names),
        "keep_base_equal": torch.equal(_output(kept, tokens), expected),
    }


def _output(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=tokens)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).double()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


if __name__ == "__main__":
    main()
