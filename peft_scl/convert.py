# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The command `scl-to-lora`: writes a linear SCL adapter as a LoRA adapter that loads without `peft_scl`, or recompresses
a FeDeRA adapter, which is one already, to another rank.

    scl-to-lora ADAPTER OUTPUT [--base_model ID] [--r N] [--dtype float32] [--overwrite]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .federa import FederaConfig, load_federa
from .foreign_files import FEDERA_CONFIG_NAME, check_adapter_files, check_shapes, read_peft_config, read_shapes
from .lora import LoraExport, to_lora
from .scl import SclConfig


__all__ = ["main"]


_AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line if not given."""
    args = _parser().parse_args(arguments)
    try:
        _check_output(args.output, args.adapter, args.overwrite)
        model = _load(args.adapter, args.base_model)
        export = to_lora(model, r=args.r, dtype=_DTYPES[args.dtype])
    except (OSError, ValueError) as error:
        sys.exit(f"scl-to-lora: {error}")
    export.save_pretrained(args.output)
    print(_report(export, args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scl-to-lora",
        description="Write a linear SCL adapter as a LoRA adapter, which loads without peft_scl, or a FeDeRA adapter "
        "as one of another rank.",
    )
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("output", help="folder for the LoRA adapter")
    parser.add_argument(
        "--base_model", help="folder or Hub id of the base model; by default the one the adapter names"
    )
    parser.add_argument("--r", type=int, help="rank of the LoRA adapter; by default the one that is exact")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the LoRA weights")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    return parser


def _check_output(output: str, adapter: str, overwrite: bool) -> None:
    if Path(output).resolve() == Path(adapter).resolve():
        raise ValueError(f"The output {output!r} is the folder of the adapter itself. Choose another one.")
    if os.path.isdir(output) and os.listdir(output) and not overwrite:
        raise ValueError(f"The folder {output!r} is not empty. Choose another one, or pass `--overwrite`.")


def _load(adapter: str, base_model: str | None) -> PeftModel:
    """The adapter on its base model, in the dtype the base model is stored in."""
    if not os.path.isdir(adapter):
        adapter = snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    check_adapter_files(adapter)
    is_federa = Path(adapter, FEDERA_CONFIG_NAME).is_file()
    config: Any = read_peft_config(FederaConfig if is_federa else PeftConfig, adapter)
    if not isinstance(config, (SclConfig, FederaConfig)):
        raise ValueError(
            f"{adapter!r} holds an adapter of type {config.peft_type.value}, not one that SCL or FeDeRA has saved."
        )
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter {adapter!r} does not name its base model. Pass it as `--base_model`.")
    base: Any = _model_class(config).from_pretrained(
        config.base_model_name_or_path, revision=None if base_model else config.revision
    )
    # as `AutoPeftModel`: a tokenizer beside the adapter says how far the vocabulary was extended
    if Path(adapter, "tokenizer_config.json").exists():
        vocabulary = len(transformers.AutoTokenizer.from_pretrained(adapter))
        if vocabulary > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(vocabulary)
    check_adapter_files(adapter, base)
    try:
        model = load_federa(base, adapter) if is_federa else PeftModel.from_pretrained(base, adapter, config=config)
    except (RuntimeError, ValueError) as error:  # torch and PEFT say which tensor, but not of which adapter
        raise ValueError(f"The adapter {adapter!r} does not fit its base model: {error}") from error
    weights = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
    if weights.is_file():  # of tensors that a file lacks PEFT only warns
        state = get_peft_model_state_dict(model)
        expected = {key: tuple(tensor.shape) for key, tensor in state.items() if ".scl_" in key or ".lora_" in key}
        found = {key: shape for key, shape in read_shapes(weights).items() if key in expected}
        check_shapes(found, expected, f"The adapter {adapter!r}")
    return model


def _model_class(config: SclConfig | FederaConfig) -> Any:
    if config.task_type is not None:
        return _AUTO_CLASSES[config.task_type]
    mapping = config.auto_mapping or {}
    if not str(mapping.get("parent_library")).startswith("transformers."):
        raise ValueError(
            "The configuration of the adapter names neither a task type nor a class of transformers, so its base "
            "model cannot be loaded from here. Load it in Python and call `peft_scl.to_lora`."
        )
    return getattr(transformers, mapping["base_model_class"])


def _report(export: LoraExport, args: argparse.Namespace) -> str:
    config = export.config
    width = max(len(name) for name in export.errors)
    lines = [f"{name:{width}}  relative error {error:.2e}" for name, error in export.errors.items()]
    lines.append(f"{'all':{width}}  relative error {export.error:.2e}")
    kind = f"exact up to the rounding to {args.dtype}" if args.r is None else f"best approximation of rank {args.r}"
    lines += [
        f"Wrote {args.output}: LoRA of rank {config.r} on {len(export.errors)} modules, {kind}.",
        f"Load it on {config.base_model_name_or_path!r}: `PeftModel.from_pretrained(base_model, {args.output!r})`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
