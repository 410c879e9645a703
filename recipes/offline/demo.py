# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federated fine-tuning without a network, a hub or a GPU: `make demo`.

A small Llama that this project trained itself (`train_base.py`) learns from clients whose "private" text is the
documentation of different packages of the Python standard library. Every client trains a Sequential Compression Layer
adapter; only adapters are sent and averaged. At the end a fresh process loads the saved adapter and answers a held-out
prompt with and without it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
# matrices this small gain nothing from a second thread, and lose much when that core is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from client_data import build_clients  # noqa: E402
from trl import TrlParser  # noqa: E402

from fed_trainer import FederatedConfig, FederatedTrainer, partition_summary  # noqa: E402
from fed_trainer.output.record import RECORD_NAME  # noqa: E402
from fed_trainer.output.report import write_report  # noqa: E402
from peft_scl import SclConfig  # noqa: E402


def answer(adapter_dir: str, prompt: str) -> None:
    """Print what the base model and the adapted model make of `prompt`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(HERE / "model"), adapter_dir).eval()
    inputs = tokenizer(prompt, return_tensors="pt")

    def generate() -> str:
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(answer).strip()

    with model.disable_adapter():
        before = generate()
    print(f"prompt  {prompt.strip()}\nbefore  {before}\nafter   {generate()}")


def free_folder(output_dir: str) -> str:
    """
    `output_dir`, or with a number behind it if that holds a federation already, of the demo or of anybody: nothing is
    deleted.
    """
    folder, number = output_dir, 1
    while (Path(folder) / RECORD_NAME).is_file():
        number += 1
        folder = f"{output_dir}-{number}"
    if folder != output_dir:
        print(f"{output_dir} holds a federation already (--resume continues it), so this one goes to {folder}\n")
    return folder


def train(config_path: Path, arguments: list[str], fresh: bool) -> None:
    parser = TrlParser([FederatedConfig])  # type: ignore[list-item]
    (args,) = parser.parse_args_and_config(["--config", str(config_path), *arguments])
    if fresh:
        args.output_dir = free_folder(str(args.output_dir))

    clients, held_out = build_clients()
    print(partition_summary(clients, args.label_column), end="\n\n")
    trainer = FederatedTrainer(
        model=str(HERE / "model"),
        args=args,
        train_dataset=clients,
        eval_dataset=held_out,
        peft_config=SclConfig(r=16, task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=None if fresh else True)

    print(f"\nThe adapter is in {args.output_dir}")
    try:
        for path in write_report(args.output_dir):
            print(f"wrote {path}")
    except ImportError as error:
        print(error)

    # one that the base model has not seen, with a documentation of a sentence or so
    prompt = next(row["prompt"] for row in held_out if 30 < len(row["completion"]) < 120)
    print("\nA fresh process loads the adapter:")
    command = [sys.executable, __file__, "--answer", prompt, "--adapter_dir", str(args.output_dir)]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output directory")
    parser.add_argument("--answer", metavar="PROMPT", help="only answer a prompt with the adapter in --adapter_dir")
    parser.add_argument("--adapter_dir", default="out/demo")
    own, arguments = parser.parse_known_args()
    if own.answer is not None:
        answer(own.adapter_dir, own.answer)
    else:
        train(own.config, arguments, fresh=not own.resume)


if __name__ == "__main__":
    main()
