# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rounds of a federation, over any trainer."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

import peft_scl  # noqa: F401  (registers SCL: an adapter to start from may be one)

from .adapter_state import AdapterState, check_same_layout, state_bytes, subtract
from .aggregation import AGGREGATIONS, ClientUpdate
from .checkpoint import (
    ADAPTER_WEIGHTS,
    find_checkpoint,
    load_adapter,
    refuse_another_run,
    refuse_later_rounds,
    rotate_checkpoints,
    write_checkpoint,
)
from .clients import ClientSampler, check_clients, client_seed, local_batch
from .config import FederationArguments, joins_examples, round_lr_factors
from .hub import fetch_adapter, publish
from .live_model import MODEL_WEIGHTS, load_model
from .live_prompt import check_prompt_arguments
from .live_state import live_state
from .local_round import LocalRoundMixin
from .progress import RoundProgress
from .record import RECORD_NAME, held_out_metrics, read_record
from .run_files import RunFilesMixin


__all__ = ["FederatedMixin"]

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"


class FederatedMixin(LocalRoundMixin, RunFilesMixin):
    """
    Federated rounds over any [`~transformers.Trainer`]: `class MyTrainer(FederatedMixin, SomeTrainer)`.

    `train()` runs the rounds; within one, each sampled client is trained by `SomeTrainer.train()` itself, on the one live
    model. See [`FederatedTrainer`] and [`FederatedTaskTrainer`] for the arguments.
    """

    _config_class: type[FederationArguments] = FederationArguments

    def __init__(
        self,
        model: str | nn.Module | None,
        args: FederationArguments,
        train_dataset: dict[str, Dataset],
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"`args` should be a `{self._config_class.__name__}` but is a {type(args).__name__}. It takes every field of "
                f"`{self._config_class.__bases__[-1].__name__}`, plus `num_rounds` and the like."
            )
        if any(isinstance(callback, EarlyStoppingCallback) for callback in kwargs.get("callbacks") or []):
            raise ValueError(
                "`EarlyStoppingCallback` follows evaluations within a training run, and a client makes none. Use a callback "
                "that sets `control.should_training_stop` in `on_evaluate`, which is called once per evaluated round."
            )
        self.args = args  # `Trainer.__init__` sets it again; the checks come first
        self._lr_factors = round_lr_factors(args)
        check_clients(train_dataset, args)
        self._check_clients(train_dataset, eval_dataset, model, **kwargs)
        self.sampler = ClientSampler(list(train_dataset), args.clients_per_round, args.seed)
        self.aggregator = AGGREGATIONS[args.aggregation]()

        adapter_folder = None
        if args.initial_adapter is not None:
            if peft_config is not None or isinstance(model, PeftModel):
                raise ValueError(
                    f"`initial_adapter` is {args.initial_adapter!r}, which brings its own PEFT config, but a "
                    f"{'`peft_config`' if peft_config is not None else '`PeftModel`'} was given too. Give one of them."
                )
            adapter_folder = fetch_adapter(args.initial_adapter, args.initial_adapter_revision, args.hub_token)
            if not (adapter_folder / CONFIG_NAME).is_file():
                raise ValueError(
                    f"`initial_adapter` takes adapters only, but {args.initial_adapter!r} has no {CONFIG_NAME}. To start from a "
                    f"whole model, load it with `from_pretrained({args.initial_adapter!r})` and pass it as `model`."
                )
            peft_config = PeftConfig.from_pretrained(str(adapter_folder))
            peft_config.inference_mode = False

        self._folder = Path(args.output_dir or "")
        self._clients = dict(sorted(train_dataset.items()))
        first = next(iter(self._clients))
        super().__init__(
            **self._model_arguments(model, peft_config),
            args=args,
            train_dataset=self._clients[first],
            eval_dataset=eval_dataset,
            **kwargs,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "Federated rounds under DeepSpeed or FSDP are not supported yet: the kept engine would go on with stale copies "
                "of the adapter. Launch with plain DDP (`accelerate launch --multi_gpu`) or a single process."
            )
        # the bar over rounds replaces the bar over steps, and the printed dictionaries
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self.remove_callback(PrinterCallback)

        self._prepared_clients: dict[str, Dataset] = {}
        self._keep_prepared(first, self.train_dataset)  # `super().__init__` has tokenised it
        self._live_adapter = live_state(self.model)
        if isinstance(self.model, PeftModel):
            check_prompt_arguments(self.model, args)
        self._refuse_what_would_leak()
        if adapter_folder is not None:
            self._start_from(adapter_folder)
        self._global_state = self._live_adapter.read()
        self._record = self._new_record()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Run the federation.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues from the last checkpoint in `output_dir`, a path from that checkpoint.

        Returns:
            `TrainOutput`: the number of rounds, the mean training loss over rounds, and the totals of the run.

        Raises:
            FileExistsError: If `output_dir` holds a run that is not being resumed.
            ValueError: If the checkpoint belongs to another run, or a client's update is not usable. The live model then
                holds the global adapter of the last finished round.
        """
        if trial is not None:
            raise NotImplementedError(
                "Hyperparameter search over a federation is not supported: start one run per trial."
            )
        done = self._resume(resume_from_checkpoint) if resume_from_checkpoint else self._start(ignore_keys_for_eval)
        lr_factors = self._lr_factors
        last = self.args.num_rounds

        with RoundProgress(last, done, self._shows_progress) as progress, self._keeping_the_global_adapter():
            for round in range(done + 1, last + 1):
                seconds: dict[str, float] = {}
                clients: dict[str, dict[str, float]] = {}
                self.aggregator.begin(self._global_state)
                for client in self.sampler.sample(round):
                    update = self._local_update(client, round, lr_factors[round - 1], seconds)
                    check_same_layout(update.delta, self._global_state, f"The update of client {client!r}")
                    with _timed(seconds, "aggregate"):
                        self.aggregator.add(update)
                    clients[client] = {"num_examples": update.num_examples, **update.metrics}
                    progress.client(round, client, update.num_examples, update.metrics)
                with _timed(seconds, "aggregate"):
                    self._global_state = _step(self._global_state, self.aggregator.finish())
                    self._live_adapter.write(self._global_state)

                self.state.global_step = self.state.epoch = round
                evaluation = None
                if self._is_due(round, self.args.eval_rounds) and self.eval_dataset is not None:
                    with _timed(seconds, "evaluate"):
                        evaluation = self.evaluate(ignore_keys=ignore_keys_for_eval)
                self._report(round, clients, lr_factors[round - 1], seconds, evaluation)
                if self._is_due(round, self.args.save_rounds) or self.control.should_training_stop:
                    with _timed(seconds, "checkpoint"):
                        self._save_round(round)
                    self.log({"seconds_checkpoint": seconds["checkpoint"]})  # known only now
                    self._write_record(self._folder)
                progress.round(self._record["rounds"][-1]["train_loss"], held_out_metrics(self._record).get(round, {}))
                if self.control.should_training_stop:  # a callback
                    break
        return self._end()

    # The steps of a round

    def _local_update(self, client: str, round: int, lr_factor: float, seconds: dict[str, float]) -> ClientUpdate:
        with _timed(seconds, "prepare"):
            dataset = self._prepared_client(client)
        data_seed = None if self.args.data_seed is None else client_seed(self.args.data_seed, round, client)
        seed = client_seed(self.args.seed, round, client)
        with _timed(seconds, "local"):
            local, metrics = self.local_round(self._global_state, dataset, seed, data_seed, lr_factor)
        return ClientUpdate(client, self._num_examples(client), subtract(local, self._global_state), metrics)

    def _num_examples(self, client: str) -> int:
        """Examples that are trained on; preparation drops those without a label, and packing joins them."""
        return len(self._clients[client] if joins_examples(self.args) else self._prepared_client(client))

    def _prepared_client(self, client: str) -> Dataset:
        """A client's dataset, tokenised at its first local round and kept."""
        if client not in self._prepared_clients:
            self._keep_prepared(client, self._prepare_client_dataset(self._clients[client], client))
        return self._prepared_clients[client]

    def _keep_prepared(self, client: str, dataset: Dataset) -> None:
        if len(dataset) == 0:
            raise ValueError(
                f"Client {client!r} has {len(self._clients[client])} examples, but none is left after preparation: every "
                "label is masked. Raise `max_length` (prompts may fill it), or leave the client out."
            )
        if len(dataset) < local_batch(self.args) and not joins_examples(self.args):
            raise ValueError(
                f"Client {client!r} has {len(self._clients[client])} examples, but only {len(dataset)} are left after "
                f"preparation (the others have no label), fewer than one local batch of {local_batch(self.args)}. Raise "
                "`max_length` (prompts may fill it), lower the batch size, or leave the client out."
            )
        self._prepared_clients[client] = dataset

    def _check_clients(self, clients: dict[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        """Refuse data that the base trainer cannot use; `kwargs` are the base trainer's."""

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        """What the base trainer is given of model and adapter. TRL's trainers load and wrap, [`Trainer`] does neither."""
        if not isinstance(model, nn.Module if peft_config is not None else (PreTrainedModel, PeftModel)):
            raise TypeError(
                f"`model` should be a `PreTrainedModel` or a `PeftModel` but is a {type(model).__name__}. Load it first, for "
                "instance with `AutoModelForSequenceClassification.from_pretrained(...)`."
            )
        if peft_config is None:
            return {"model": model}
        if isinstance(model, PeftModel):
            raise ValueError("`model` is a `PeftModel` already, but a `peft_config` was given too. Give one of them.")
        set_seed(self.args.seed)  # adapters start at random
        # a copy: for a classifier PEFT adds the head to `modules_to_save` of the config, each time it gets it
        return {"model": get_peft_model(model, copy.deepcopy(peft_config))}

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        """Tokenise one client's data; the base trainer's own preparation, where it has one."""
        return dataset

    def _report(
        self,
        round: int,
        clients: dict[str, dict[str, float]],
        lr_factor: float,
        seconds: dict[str, float],
        evaluation: dict[str, float] | None,
    ) -> None:
        """Enter the round into the record, `log_history` and whatever `report_to` names."""
        total = sum(client["num_examples"] for client in clients.values())
        sent = state_bytes(self._global_state) * len(clients)
        entry: dict[str, Any] = {
            "round": round,
            "clients": clients,
            "train_loss": sum(c["num_examples"] * c["train_loss"] for c in clients.values()) / total,
            "learning_rate": self.args.learning_rate * lr_factor,
            "bytes_up": sent,
            "bytes_down": sent,
            "seconds": seconds,
            "eval": evaluation,
        }
        self._record["rounds"].append(entry)
        logs = {"loss": entry["train_loss"]}
        logs |= {key: entry[key] for key in ("learning_rate", "bytes_up", "bytes_down")}
        logs |= {f"seconds_{phase}": value for phase, value in seconds.items()}
        logs |= {f"clients/{client}/loss": metrics["train_loss"] for client, metrics in clients.items()}
        self.log(logs)
        self._write_record(self._folder)

    def _save_round(self, round: int) -> None:
        if self.is_world_process_zero():
            folder = write_checkpoint(self._folder, round, self._write_checkpoint_files)
            rotate_checkpoints(self._folder, self.args.save_total_limit)
            is_last = round == self.args.num_rounds or self.control.should_training_stop  # `_end` publishes the last
            if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and not is_last:
                self._publish_round(folder, round)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _write_checkpoint_files(self, folder: Path) -> None:
        self._save(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _publish_round(self, folder: Path, round: int) -> None:
        try:
            publish(folder, self.hub_model_id, f"Round {round}", self.args.hub_token, self.args.hub_revision)
        except Exception as error:  # the run, and what it has on disk, is worth more than one upload
            logger.warning(f"Round {round} could not be pushed to {self.hub_model_id}: {error}. The run goes on.")

    # Beginning and end

    def _start(self, ignore_keys_for_eval: list[str] | None) -> int:
        refuse_another_run(self._folder)
        self._record = self._new_record()
        self._begin(TrainerState())
        if self.args.eval_on_start and self.eval_dataset is not None:
            self._record["start"]["eval"] = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._write_record(self._folder)
        return 0

    def _resume(self, resume_from_checkpoint: str | bool) -> int:
        weights = ADAPTER_WEIGHTS if isinstance(self.model, PeftModel) else MODEL_WEIGHTS
        folder = find_checkpoint(self._folder, resume_from_checkpoint, weights)
        record = read_record(folder)
        fresh = self._new_record()
        _refuse_another_run(record, fresh, folder)
        done = record["rounds"][-1]["round"]
        refuse_later_rounds(self._folder, done)
        if not self._live_adapter.saved_file_is_state:
            raise NotImplementedError(
                f"A federation of {record['peft_type']} cannot be resumed: the checkpoint {str(folder)!r} holds the prompts as "
                "PEFT saves them, without the encoder that computes them. Start the run again in another `output_dir`."
            )
        saved = load_adapter(folder) if isinstance(self.model, PeftModel) else load_model(folder, self.model)
        kind = "adapter" if isinstance(self.model, PeftModel) else "model"
        self._live_adapter.load(saved, f"The {kind} in {str(folder)!r}")
        self._global_state = self._live_adapter.read()
        self._record = {**fresh, "start": record["start"], "rounds": record["rounds"]}
        self._begin(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
        return done

    def _begin(self, state: TrainerState) -> None:
        self.state = state
        self.state.max_steps = self.args.num_rounds
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _end(self) -> TrainOutput:
        rounds = self._record["rounds"]
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self.state.save_to_json(str(self._folder / TRAINER_STATE_NAME))
        if self._shows_progress:
            from .report import round_table  # at module level `python -m fed_trainer.report` would import itself twice

            print(round_table(self._record))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message=f"Round {len(rounds)}, end of training")
        train_loss = sum(entry["train_loss"] for entry in rounds) / len(rounds)
        metrics = {
            "train_loss": train_loss,
            "bytes_up": sum(entry["bytes_up"] for entry in rounds),
            "bytes_down": sum(entry["bytes_down"] for entry in rounds),
            "train_runtime": sum(sum(entry["seconds"].values()) for entry in rounds),
        }
        return TrainOutput(len(rounds), train_loss, metrics)

    @contextmanager
    def _keeping_the_global_adapter(self) -> Iterator[None]:
        """Whatever happens in a local round, the live model holds the last global adapter afterwards."""
        try:
            yield
        finally:
            self._live_adapter.write(self._global_state)

    # Small things

    @property
    def _shows_progress(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    def _is_due(self, round: int, every: int) -> bool:
        return round % every == 0 or round == self.args.num_rounds

    # Refusals

    def _refuse_what_would_leak(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            if not isinstance(self.model, PeftModel):
                raise ValueError(
                    f"No parameter of the `{type(self.model).__name__}` that was given requires gradients. Give a `peft_config`, "
                    "or set `requires_grad` where it is to be trained."
                )
            raise ValueError(
                "Nothing is trainable in the `PeftModel` that was given. `PeftModel.from_pretrained` freezes the adapter: pass "
                "`is_trainable=True` to it, or leave the loading to `initial_adapter`."
            )
        tracked = self._live_adapter.tensor_ids
        stray = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in tracked]
        if stray:
            raise ValueError(
                f"{len(stray)} parameters are trainable but not part of the adapter (the first: {stray[0]}): they would "
                "leak from one client to the next. Freeze them, or name their modules in `modules_to_save`."
            )
        statistics = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and id(module.running_mean) not in tracked
            and "original_module" not in name.split(".")
        ]
        if statistics:
            raise ValueError(
                f"Training updates the running statistics of {statistics[0]}, which is not part of the adapter: they would leak "
                "from one client to the next, and would not be saved. Name it in `modules_to_save`."
            )
        cumulative = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and id(module.running_mean) in tracked and module.momentum is None
        ]
        if cumulative:
            raise ValueError(
                f"The running statistics of {cumulative[0]} are a cumulative average, since it has `momentum=None`: its weights "
                "follow from the number of batches seen, which a mean over clients has no meaning for. Set a momentum, such "
                "as 0.1."
            )

    def _start_from(self, folder: Path) -> None:
        source = f"The adapter {self.args.initial_adapter!r}"
        state = self._live_adapter.from_saved(load_adapter(folder), source)
        check_same_layout(state, self._live_adapter.read(include_frozen=True), source)
        record = read_record(folder)
        theirs, ours = record.get("base_digest"), self._base_digest
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(
                f"{source} was trained on another base model ({record['base_model']!r}) than "
                f"{get_config_model_id(self.model.config)!r}: the shapes agree, the weights do not. Load that base model, or "
                "start without `initial_adapter`."
            )
        self._live_adapter.write(state)


def _step(state: AdapterState, delta: AdapterState) -> AdapterState:
    """`state + delta`, summed in float32 and kept in the dtypes of `state`."""
    return {key: (tensor + delta[key]).to(tensor.dtype) for key, tensor in state.items()}


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _refuse_another_run(record: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    if not record.get("rounds"):
        raise ValueError(
            f"{str(folder)!r} has no {RECORD_NAME} with a finished round, so it is not a checkpoint of a federation. Pass "
            "a `checkpoint-<round>` folder, or use it as `initial_adapter`."
        )
    there, here = _comparable(record), _comparable(ours)
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(here[key])} here" for key in differing)
        raise ValueError(
            f"The checkpoint {str(folder)!r} belongs to another run ({shown}). Resume with the settings it was started "
            "with, or choose another `output_dir`."
        )


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What has to agree for a run to be continued, one level deep, so that a difference can be named."""
    keys = ("base_digest", "peft_type", "num_trainable_parameters", "aggregation", "seed", "num_sampled", "clients")
    return {key: record.get(key) for key in keys} | record.get("peft_config", {}) | record.get("settings", {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
