# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The configs of `configs/aggregations` compared on one model and one data set, as a Markdown table.

    python recipes/compare_aggregations.py --model_name_or_path STORIES260K --dataset_name MEDQUAD \
        --lr_scale 50 --num_rounds 8 --search_rounds 4 --max_length 128 --use_cpu
    python recipes/compare_aggregations.py --methods fedavg flora --seeds 1 --model_name_or_path ... --dataset_name ...

Every method gets a learning rate of its own, the best one on rows held out of the training split (seed 0): from
`lr_scale` times the config's, by steps of `lr_step`, until both neighbours are worse. Then it runs with every seed, on
all training rows, and is evaluated on the test split. Each run has a folder below `output_dir`, and is not repeated if
it has been finished there, so a comparison that was cut off goes on where it was. Options that are not listed here go
to every run; an option of one method is `--own hetlora_ranks client_settings '{"client_0": {"r": 4}}'`.
"""

import argparse
import gc
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from compare_runs import cell
from federated_sft import RecipeArguments, load_data, make_peft_config, prepare
from transformers.utils import logging
from trl import TrlParser

from fed_trainer import FederatedConfig, FederatedTrainer, read_record
from fed_trainer.federation.broken_state import BrokenStateError
from fed_trainer.federation.validation import TooFewClientsError
from fed_trainer.output.figures import held_out_metrics
from fed_trainer.output.settings import federation_settings, local_settings
from fed_trainer.state.described import agree, storable


CONFIGS = Path(__file__).resolve().parent / "configs" / "aggregations"
BASELINE = "fedavg"


def parse(config: Path, overrides: Sequence[str]) -> tuple[RecipeArguments, FederatedConfig]:
    parser = TrlParser([RecipeArguments, FederatedConfig])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config(["--config", str(config), *overrides])
    return recipe, args


class Comparison:
    """
    Runs of the configs, each in a folder of its own.

    Args:
        output_dir (`Path`):
            Parent of `<method>/lr-<learning rate>/seed-<seed>` and, for the runs that a learning rate is chosen by,
            `.../validation`.
        overrides (`Sequence[str]`):
            Options of every run.
        own (`Sequence[tuple[str, str, str]]`):
            Options of single methods: method, field, value.
        validation_rows (`int`):
            Rows of the training split to choose learning rates by.
        search_rounds (`int`, *optional*):
            Rounds of the runs for it; as many as in other runs if not given.
    """

    def __init__(
        self,
        output_dir: Path,
        overrides: Sequence[str],
        own: Sequence[tuple[str, str, str]],
        validation_rows: int,
        search_rounds: int | None = None,
    ) -> None:
        self.output_dir, self.overrides, self.own = output_dir, overrides, own
        self.validation_rows, self.search_rounds = validation_rows, search_rounds

    def validation_loss(self, method: str, learning_rate: float) -> float:
        """Loss on the validation rows after the last round; infinite if training diverged."""
        folder = self._folder(method, learning_rate) / "validation"
        try:
            record = self._record(method, learning_rate, 0, folder, is_test=False)
        except (BrokenStateError, TooFewClientsError) as error:
            print(f"{folder} diverged: {error}", flush=True)
            return math.inf
        loss = last_loss(record)
        return math.inf if math.isnan(loss) else loss

    def test_record(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Record of a run that is evaluated on the test split."""
        return self._record(method, learning_rate, seed, self._folder(method, learning_rate) / f"seed-{seed}")

    def learning_rate(self, method: str, scale: float, step: float) -> float:
        """The learning rate with the least validation loss, from `scale` times that of the config."""
        first = self._parse(method)[1].learning_rate * scale
        rates = {index: float(f"{first * step**index:.2g}") for index in range(-9, 10)}
        best, center = 0, None
        while best != center:
            center = best
            best = min((center, center - 1, center + 1), key=lambda index: self.validation_loss(method, rates[index]))
        return rates[best]

    def _parse(self, method: str, *options: str) -> tuple[RecipeArguments, FederatedConfig]:
        own = [part for owner, field, value in self.own if owner == method for part in (f"--{field}", value)]
        return parse(CONFIGS / f"{method}.yaml", [*self.overrides, *own, *options])

    def _folder(self, method: str, learning_rate: float) -> Path:
        return self.output_dir / method / f"lr-{learning_rate:.2g}"

    def _record(
        self, method: str, learning_rate: float, seed: int, folder: Path, is_test: bool = True
    ) -> dict[str, Any]:
        recipe, args = self._parse(
            method,
            *("--learning_rate", str(learning_rate), "--seed", str(seed), "--output_dir", str(folder)),
            *("--disable_tqdm", "True"),
            *([] if is_test or self.search_rounds is None else ["--num_rounds", str(self.search_rounds)]),
        )
        args.save_rounds = args.num_rounds
        if not is_test:
            args.eval_on_start, args.eval_rounds = False, args.num_rounds
        record = read_record(folder)
        if len(record.get("rounds", [])) == record.get("num_rounds"):
            refuse_other_settings(record, args, folder)
            return record

        train, test = load_data(recipe, seed=0)
        if not is_test:
            parts = train.train_test_split(test_size=self.validation_rows, seed=0)
            train, test = parts["train"], parts["test"]
        clients, eval_dataset = prepare(recipe, args, train, test)
        trainer = FederatedTrainer(
            model=recipe.model_name_or_path,
            args=args,
            train_dataset=clients,
            eval_dataset=eval_dataset,
            peft_config=make_peft_config(recipe),
        )
        trainer.train(resume_from_checkpoint=True)  # one that was cut off, or has not been started, starts
        del trainer
        gc.collect()
        record = read_record(folder)
        print(f"{folder}  loss {last_loss(record):.4f}  {seconds(record):.0f} s", flush=True)
        return record


def refuse_other_settings(record: dict[str, Any], args: FederatedConfig, folder: Path) -> None:
    """
    Raises:
        ValueError: If the finished run in `folder` is not the one that is asked for.
    """
    theirs = {"num_rounds": record["num_rounds"], **record["settings"], **record["federation"]}
    ours = {"num_rounds": args.num_rounds, **local_settings(args), **federation_settings(args)}
    differing = [name for name in ours if name in theirs and not agree(theirs[name], ours[name])]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{str(folder)!r} holds a finished run with `{name}={theirs.get(name)!r}`, but {ours[name]!r} is asked "
            "for. Give another `--output_dir`, or the options that the comparison was started with."
        )


def last_loss(record: dict[str, Any]) -> float:
    metrics = held_out_metrics(record)
    return metrics[max(metrics)].get("eval_loss", math.nan)  # which is left out if it was not finite


def client_losses(record: dict[str, Any]) -> dict[str, float]:
    """Last loss of every client's model on its own rows; empty without `evaluate_clients`."""
    clients = record["rounds"][-1]["client_eval"] or {}
    return {client: float(metrics["eval_loss"]) for client, metrics in clients.items()}  # "nan" is a number, too


def seconds(record: dict[str, Any]) -> float:
    return sum(sum(entry["seconds"].values()) for entry in record["rounds"])


def megabytes(record: dict[str, Any], direction: str) -> float:
    """Mean over clients and rounds."""
    turns = [client[direction] for entry in record["rounds"] for client in entry["clients"].values()]
    return statistics.mean(turns) / 1e6


def summary(method: str, learning_rate: float, seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run in a file of results."""
    return {
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "num_trainable_parameters": record["num_trainable_parameters"],
        "eval_loss": {
            number: metrics["eval_loss"]
            for number, metrics in held_out_metrics(record).items()
            if "eval_loss" in metrics
        },
        "client_eval_loss": client_losses(record),
        "train_loss": [entry["train_loss"] for entry in record["rounds"]],
        "bytes_up": [entry["bytes_up"] for entry in record["rounds"]],
        "bytes_down": [entry["bytes_down"] for entry in record["rounds"]],
        "clients": [sorted(entry["clients"]) for entry in record["rounds"]],
        "seconds": round(seconds(record), 1),
    }


def table(runs: dict[str, tuple[float, list[dict[str, Any]]]]) -> str:
    """
    A Markdown table of the learning rate and the records of every method, the smallest loss first. A seed draws the
    same clients for all methods, so the difference from the baseline is taken seed by seed. The held-out loss
    weights clients by their rows, as most methods do; the mean over clients weights them alike.
    """
    lines = [
        f"| method | learning rate | held-out loss | minus that of `{BASELINE}` | mean over clients | trained "
        "parameters | MB up | MB down | seconds |",
        "|---" * 9 + "|",
    ]
    losses = {method: [last_loss(record) for record in records] for method, (_, records) in runs.items()}
    for method in sorted(runs, key=lambda method: statistics.mean(losses[method])):
        learning_rate, records = runs[method]
        difference = "-"
        if BASELINE in losses:
            difference = cell([own - base for own, base in zip(losses[method], losses[BASELINE], strict=True)])
        alike = [statistics.mean(client_losses(record).values()) for record in records if client_losses(record)]
        up, down = (
            statistics.mean(megabytes(record, direction) for record in records)
            for direction in ("bytes_up", "bytes_down")
        )
        lines.append(
            f"| `{method}` | {learning_rate:.2g} | {cell(losses[method])} | {difference} | "
            f"{cell(alike) if alike else '-'} | "
            f"{records[0]['num_trainable_parameters']:,} | {up:.3f} | {down:.3f} | "
            f"{statistics.median(map(seconds, records)):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--own", nargs=3, action="append", default=[], metavar=("METHOD", "FIELD", "VALUE"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--lr_scale", type=float, default=1.0, help="factor on the config's learning rate to begin with"
    )
    parser.add_argument("--lr_step", type=float, default=3.0, help="factor between neighbouring learning rates")
    parser.add_argument("--validation_rows", type=int, default=500)
    parser.add_argument("--search_rounds", type=int, help="rounds of the runs that choose the learning rate")
    parser.add_argument("--output_dir", type=Path, default=Path("out/aggregations"))
    parser.add_argument(
        "--results", type=Path, help="file of JSON lines for the figures of every run on the test split"
    )
    options, overrides = parser.parse_known_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    comparison = Comparison(options.output_dir, overrides, options.own, options.validation_rows, options.search_rounds)
    runs = {}
    lines = []
    for method in options.methods:
        rate = comparison.learning_rate(method, options.lr_scale, options.lr_step)
        records = [comparison.test_record(method, rate, seed) for seed in range(options.seeds)]
        runs[method] = rate, records
        lines += [json.dumps(storable(summary(method, rate, seed, record))) for seed, record in enumerate(records)]
    if options.results is not None:
        options.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{table(runs)}")


if __name__ == "__main__":
    main()
