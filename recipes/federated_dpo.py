# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federated DPO of any causal language model on preferences from any Hub id or local folder.

    python recipes/federated_dpo.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name PREFERENCES --partition_column annotator --peft_config '{"peft_type": "LORA", "r": 16}' \
        --reference base --beta 0.1 --num_rounds 10 --max_steps 10 --learning_rate 5e-5 --output_dir out

The rows have `chosen` and `rejected`, and a `prompt` unless both begin with it, as texts or messages.
`--initial_adapter`, such as that of `federated_sft.py`, takes the place of `--peft_config`. Every field of
`FederatedDPOConfig` (hence of TRL's `DPOConfig`) and of the arguments of `federated_sft.py` can stand in a YAML too
(`--config`).
"""

from federated_sft import RecipeArguments, load_data, make_peft_config, prepare, resume
from transformers.utils.import_utils import is_matplotlib_available
from trl import TrlParser

from fed_trainer import FederatedDPOConfig, FederatedDPOTrainer, partition_summary
from fed_trainer.output.report import write_report


def main() -> None:
    parser = TrlParser([RecipeArguments, FederatedDPOConfig])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config()

    clients, test = prepare(recipe, args, *load_data(recipe, args.seed))
    trainer = FederatedDPOTrainer(
        model=recipe.model_name_or_path,
        args=args,
        train_dataset=clients,
        eval_dataset=test,
        peft_config=make_peft_config(recipe),
    )
    if trainer.is_world_process_zero():
        print(partition_summary(clients, recipe.partition_column))
        print(f"trainable parameters: {trainer.get_num_trainable_parameters():,}, reference: {args.reference}")
    trainer.train(resume_from_checkpoint=resume(args.resume_from_checkpoint))
    if trainer.is_world_process_zero() and is_matplotlib_available():
        for path in write_report(args.output_dir):
            print(f"wrote {path}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
