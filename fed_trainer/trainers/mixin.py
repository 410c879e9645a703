# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rounds of a federation, over any trainer."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

import peft_scl  # noqa: F401  (registers SCL: an adapter to start from may be one)

from ..client.between_rounds import BetweenRoundsMixin
from ..client.data import ClientData
from ..client.engines import engine_of
from ..client.evaluation import ClientEvaluationMixin
from ..client.live import live_state
from ..client.live.base_changes import BaseChanges
from ..client.live.base_model import base_digest, keep_differentiable
from ..client.live.facts import check_adapter, model_facts
from ..client.live.sparse_stage import SparseStage
from ..client.live.state import LiveState
from ..client.store import PRIVATE_FOLDER, ClientStore
from ..client.turn import Client
from ..config import FederationArguments, given
from ..data.client_datasets import ClientDatasets
from ..data.digests import described_transforms
from ..data.held_out import check_held_out, is_by_client
from ..federation.client_settings import parse_client_settings
from ..federation.plan import Plan
from ..federation.rounds import Federation
from ..federation.sampling import ClientSampler
from ..federation.server import Server
from ..federation.transport import InProcess, Transport
from ..output.run_lock import owning
from ..output.saved_files import fresh_folder, move_into_place
from ..output.settings import described_arguments
from ..state.adapter_state import AdapterState, state_digest
from ..state.processes import rest_at_exit
from .adapter import InitialAdapter, wrapped
from .between_machines import BetweenMachinesMixin
from .checkpoints import Checkpoints
from .files import CARD_NAME, RunFiles
from .first_look import telling_row
from .host import TrainerHost
from .record import RunRecord
from .refusals.adapters import check_prompt_arguments, freeze_for_good, refuse_idle_adapter, refuse_unwrapped_adapter
from .refusals.callbacks import refuse_callback, refuse_callbacks, remove_last
from .refusals.data import check_clients, held_out_sets
from .refusals.launch import check_launch
from .refusals.settings import (
    refuse_adapter_names,
    refuse_empty_held_out,
    refuse_kept_optimizers,
    refuse_one_evaluation,
    refuse_other_weights_in_evaluation,
    refuse_taken_names,
    refuse_turns_that_differ,
    refuse_what_would_leak,
)
from .run import Run
from .unnamed import unnamed


__all__ = ["FederatedMixin"]

logger = logging.get_logger(__name__)

# what `_compose` makes that others read
_PARTS = ("client", "federation")


class FederatedMixin(BetweenMachinesMixin, BetweenRoundsMixin, ClientEvaluationMixin):
    """
    Federated rounds over any [`~transformers.Trainer`]: `class MyTrainer(FederatedMixin, SomeTrainer)`.

    `train()` runs the rounds; within one, each sampled client is trained by `SomeTrainer.train()` itself, on the one
    live model. See [`FederatedTrainer`] and [`FederatedTaskTrainer`] for the arguments.
    """

    args: FederationArguments
    model: PeftModel | PreTrainedModel
    hub_model_id: Any  # `None` until the repository exists
    federation: Federation
    """The rounds, and the global state."""
    client: Client  # or what stands for clients elsewhere
    """The clients of this process, and what they keep."""
    _base_changes: BaseChanges | None = None
    _base_digest: str | None  # of the base of an adapter; a plain model has none beside what is trained and saved
    _config_class: type[FederationArguments] = FederationArguments
    _kind: str = "task"  # the name of the trainer in messages
    _stub_row: Mapping[str, Any] = MappingProxyType({"input_ids": [0]})  # what a coordinator without data is made with
    _unfounded_start: AdapterState | None = None  # what is trained, of a trainer that does not know its clients yet
    _local_keys: set[str] = set()  # noqa: RUF012  # replaced, not changed
    _first_look: Dataset | None = None  # while the base trainer is made: the row that it is made with
    _takes_torch_datasets = True  # as held-out data
    _refuses_callbacks = False  # while `Trainer.__init__` adds a bar over steps

    def __init__(
        self,
        model: str | nn.Module | None,
        args: FederationArguments,
        train_dataset: Mapping[str, Dataset] | Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._has_all_clients = train_dataset is not None and not isinstance(train_dataset, Dataset)
        if train_dataset is None or isinstance(train_dataset, Dataset):
            train_dataset, eval_dataset = unnamed(train_dataset, eval_dataset)
        self._look_at_the_arguments(model, args, train_dataset, eval_dataset, kwargs)
        initial = None
        if args.initial_adapter is not None:
            initial = InitialAdapter(args, model, peft_config)
            peft_config = initial.config
        is_sorted = isinstance(train_dataset, ClientDatasets)
        self._clients = train_dataset if is_sorted else dict(sorted(train_dataset.items()))
        looked_at = self._clients or held_out_sets(eval_dataset) or {"": Dataset.from_list([dict(self._stub_row)])}
        self._first_look = telling_row(looked_at, getattr(args, "dataset_text_field", None))
        # held-out data by client is prepared when it is evaluated on, as there may be very many
        by_client = None
        if is_by_client(eval_dataset, self._clients):
            by_client, eval_dataset = eval_dataset, None
        super().__init__(
            **self._model_arguments(model, peft_config),
            args=args,
            train_dataset=self._first_look,
            eval_dataset=dict(eval_dataset) if isinstance(eval_dataset, Mapping) else eval_dataset,
            **kwargs,
        )
        self._engine = engine_of(self.accelerator.state)
        if by_client is not None:
            self.eval_dataset = by_client
        # the bar over rounds replaces the bar over steps, and the printed dictionaries
        remove_last(self.callback_handler, (DEFAULT_PROGRESS_CALLBACK, PrinterCallback))
        refuse_callbacks(self.callback_handler.callbacks)  # of `report_to`, too
        self._refuses_callbacks = True
        self._first_look = None
        self._compose(initial, kwargs.get("optimizers") or (None, None))

    def _look_at_the_arguments(
        self, model: Any, args: FederationArguments, train_dataset: Any, eval_dataset: Any, kwargs: dict[str, Any]
    ) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"`args` should be a `{self._config_class.__name__}` but is a {type(args).__name__}. It takes every "
                f"field of `{self._config_class.__bases__[-1].__name__}`, plus `num_rounds` and the like."
            )
        refuse_callbacks(kwargs.get("callbacks"))
        self.args = args  # `Trainer.__init__` sets it again; the checks come first
        self._seen_side_metrics = set()
        check_launch(args)
        rest_at_exit()
        if self._has_all_clients or train_dataset:
            check_clients(train_dataset, args)
        check_held_out(eval_dataset, train_dataset, self._takes_torch_datasets)
        self._check_clients(train_dataset, eval_dataset, model, **kwargs)
        self._arguments = described_arguments({**kwargs, "transforms": described_transforms(train_dataset)}, ())
        if self._has_all_clients:
            self.sampler = ClientSampler(list(train_dataset), args.clients_per_round, args.seed)
        if isinstance(model, (PreTrainedModel, PeftModel)):
            refuse_unwrapped_adapter(model)

    def _compose(self, initial: InitialAdapter | None, optimizers: tuple[Any, Any]) -> None:
        """What is around the trainer underneath; the two sides of the federation, if all its clients are here."""
        refuse_taken_names(self, _PARTS)
        self._has_optimizer = optimizers[0] is not None
        self._prepared_held_out: dict[str, Dataset] = {}
        if self._clients:
            num_here = self.sampler.num_sampled if self._has_all_clients else len(self._clients)
            self._data = ClientData(self, self._clients, num_here)
            self.train_dataset = self._data.first_prepared()
        self._look_at_the_model()
        self._take_optimizers(*optimizers)
        start = self._start_state_of(initial)
        self._files = RunFiles(self, Path(self.args.output_dir or ""))
        if self._has_all_clients:
            self._found_here(start)
        else:
            self._unfounded_start = start

    def _found_here(self, start: AdapterState) -> None:
        """The two sides of a federation in this process."""
        plan = self._plan(start, self._clients, len(self._clients), self.sampler.num_sampled)
        client = Client(self, plan, self._data, ClientStore(self._files.folder / PRIVATE_FOLDER), start)
        self._found(client, start)
        self._found_server(start, InProcess(client))

    def _plan(self, start: AdapterState, clients: Collection[str], num_clients: int, num_sampled: int) -> Plan:
        settings = parse_client_settings(given(self.args, "client_settings"), clients, start)
        facts = model_facts(self.args.aggregation, self.model, self._live_adapter, self._base_digest)
        return Plan(self.args, facts, start, settings, num_clients, num_sampled)

    def _found(self, client: Any, start: AdapterState) -> None:
        """The clients' side, and what follows from the plan."""
        self.client, plan = client, client.plan
        if plan.method.adds_to_base and self._base_changes is None:
            assert isinstance(self.model, PeftModel)  # others have no factor pairs
            self._base_changes = BaseChanges(self.model, plan.pairs)
        self._stage = SparseStage(self.model, plan, self.args.seed)
        self._local_keys = plan.local_keys(start)
        self._check_settings(start)

    def _found_server(self, start: AdapterState, transport: Transport) -> None:
        """The server's side, and what writes its files."""
        self._host = TrainerHost(self)
        self.federation = Federation(self.args, Server(self.client.plan), self.sampler, transport, self._host, start)
        self._run_record = RunRecord(self, self._files.folder)
        self._checkpoints = Checkpoints(self)
        self._run = Run(self, self._checkpoints)

    @property
    def record(self) -> dict[str, Any]:
        """The record of the run so far, as [`read_record`] gives it."""
        return self._run_record.content

    @record.setter
    def record(self, value: Any) -> None:
        raise TypeError(
            f"`{type(self).__name__}` sets `record`, under which a federation has its record. Give it another name."
        )

    def _look_at_the_model(self) -> None:
        """What of the model is trained, after refusing one that cannot be."""
        model, args = self.model, self.args
        refuse_unwrapped_adapter(model)  # of `from_pretrained` of an adapter
        if isinstance(model, PeftModel):
            refuse_adapter_names(model)
        self._live_adapter = live_state(model, self._engine)
        self._check_model()
        if isinstance(model, PeftModel):
            check_prompt_arguments(model, args)
            keep_differentiable(model.get_base_model())
        refuse_what_would_leak(model, self._live_adapter)
        check_adapter(args.aggregation, model)
        freeze_for_good(args, self._live_adapter)

    def _start_state_of(self, initial: InitialAdapter | None) -> AdapterState:
        """What is trained, before the first round."""
        self._base_digest = base_digest(self.model) if isinstance(self.model, PeftModel) else None
        published: AdapterState = {}
        if initial is not None:
            name = get_config_model_id(self.model.config)
            published = initial.write_into(self._live_adapter, self._base_digest, name)
        self._initial_digest = state_digest(published) if published else None
        start = self._shared_start(published)
        # nothing changes it in place; a whole model is too large to be held twice
        self._start_state = start if isinstance(self.model, PeftModel) else None
        self._has_left_start = False
        return start

    def _check_settings(self, start: AdapterState) -> None:
        """Refuse what does not go together, now that all parts are there."""
        args, plan, has_optimizer = self.args, self.client.plan, self._has_optimizer
        refuse_empty_held_out(self.eval_dataset)
        refuse_kept_optimizers(args)
        refuse_other_weights_in_evaluation(args, self.model, self._engine.holds_weights)
        self._stage.check(args, has_optimizer)
        if self.has_personal_models and self.eval_dataset is not None and not self.evaluates_clients:
            refuse_one_evaluation(self.eval_dataset, self._local_keys)
        if self._engine.has_fixed_parameters:
            refuse_turns_that_differ(args, plan, start)
        self._engine.check(
            args,
            self.model,
            self._live_adapter,
            adds_to_base=plan.method.adds_to_base,
            has_stages=self._stage.rounds > 0,
            has_optimizer=has_optimizer,
        )

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
                `True` continues from the last checkpoint in `output_dir` that is not damaged (a run that died
                before its first checkpoint starts again, and one that is not there yet starts), a path from that
                checkpoint.

        Returns:
            `TrainOutput`: the number of rounds, the mean training loss over rounds, and the totals of the run.

        Raises:
            FileExistsError: If `output_dir` holds a run that is not being resumed, or what the run would write over.
            FolderInUseError: If another run is writing into `output_dir`.
            ValueError: If the checkpoint belongs to another run, or a whole model, which this trainer has trained
                already, is to be trained from its start.
            NothingTrainedError: If no client has changed anything of what it trains, at a learning rate that is not
                zero.
            TooFewClientsError: If fewer than `min_clients` updates of a round can be used. The live model then holds
                the global adapter of the last finished round.
            BrokenStateError: If the model cannot compute with the new global state, which is then not saved. The live
                model holds that of the round before.
        """
        self._refuse_within_client_model("train")
        if not self._has_all_clients:
            raise ValueError(
                "This trainer does not have the data of all clients, which `train()` would need: pass it as a "
                "dictionary by client. `serve()` runs a federation with clients elsewhere, and `join()` takes part "
                "in one."
            )
        if trial is not None:
            raise NotImplementedError(
                "Hyperparameter search over a federation is not supported: start one run per trial."
            )
        refuse_callbacks(self.callback_handler.callbacks)
        if not self._stage.is_on:  # in that stage the LoRA waits
            self._check_model()
        with owning(self._files.folder):
            return self._run.run(resume_from_checkpoint, ignore_keys_for_eval)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        As [`~transformers.Trainer.add_callback`].

        Raises:
            ValueError: For a callback that cannot work in a federation.
        """
        if self._refuses_callbacks:
            refuse_callback(callback)
        super().add_callback(callback)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]. All processes have to call it; the first one writes."""
        self._refuse_within_client_model("save")
        self._save(output_dir, self._files.weights_to_save())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _refuse_within_client_model(self, use: str) -> None:
        if self._owner is not None:
            raise ValueError(
                f"The live model is that of client {self._owner!r}, which is not the federation's to {use}. Leave "
                "`client_model` first; `save_client_model(client, folder)` saves the model of a client."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `Trainer._save`, without the pickled `training_args.bin` and with the record and the model card."""
        folder = Path(output_dir) if output_dir is not None else self._files.folder
        if self.args.should_save:
            self._files.save(folder, state_dict)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of the federation to `output_dir`; the arguments are those of TRL's trainers."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            self._files.card(model_name, dataset_name, tags).save(self._files.folder / CARD_NAME)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Publish the global adapter, what is needed to load it, its card, and of the record and the log what
        [`Openings`] let out.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload. If not, a future is returned.
            token (`str`, *optional*):
                Hub token; `args.hub_token` if not given.
            revision (`str`, *optional*):
                Branch to commit to; `args.hub_revision` if not given.
            private (`bool`, *optional*):
                Whether a new repository is private; `args.hub_private_repo` if not given.
            kwargs (`dict[str, Any]`, *optional*):
                Passed to [`~FederatedMixin.create_model_card`].
        """
        self._refuse_within_client_model("publish")
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        revision = revision if revision is not None else self.args.hub_revision
        return self._files.publish(self._files.folder, commit_message, token, revision, blocking)

    def save_client_model(self, client: str, output_dir: str | os.PathLike) -> None:
        """
        Save the model of one client: the global one, with the tensors that the client keeps.

        Args:
            client (`str`):
                Name of the client. One that has not trained yet has the global model.
            output_dir (`str`):
                Folder to write to, as `save_pretrained` does.

        Raises:
            ValueError: If there is no such client.
        """
        with self.client_model(client):
            weights = self._files.weights_to_save()
            if self.is_world_process_zero():
                with fresh_folder(Path(output_dir)) as beside:
                    self._files.write_weights(beside, weights)
                    move_into_place(beside, Path(output_dir))

    # What the model is made of

    @property
    def has_personal_models(self) -> bool:
        """Whether clients keep a part of their model, so that there is none for all."""
        objective = self.client.plan.objective
        return bool(self._local_keys) or (objective is not None and objective.is_personal)

    def client_state(self, client: str) -> AdapterState:
        """
        What the model of a client is made of: the global state with the tensors that the client keeps, or its own
        model (Ditto). A client that has not trained yet has the global state.
        """
        federation = self.federation
        return self.client.model_state(federation.state, client, federation.server.visits.counted.get(client))

    def _end_sparse_stage(self) -> None:
        """SLoRA goes on with a LoRA that starts from what its first stage has learnt."""
        self._train_from_now_on(self._stage.end())
        self.federation.server.forget()

    def _train_from_now_on(self, live: LiveState) -> None:
        """Other tensors are trained: the engine is built anew."""
        live.engine = self._engine
        self._live_adapter = live
        self.federation.state = live.read()
        self.client.begin(self.federation.state)
        self._drop_engine()

    def _go_back_to_start(self) -> None:
        """
        After rounds of which nothing was saved, or was deleted, a run begins where the first one of this trainer
        did.
        """
        if not self._has_left_start:
            return
        if self._start_state is None:
            raise ValueError(
                "This trainer has trained its model already, and of a whole model the start is not kept: the run "
                "would begin with what was learnt before. Load the model anew and make a new trainer."
            )
        self.federation.state = self._start_state
        self._live_adapter.write(self._start_state)
        self._has_left_start = False

    def _before_first_round(self) -> None:
        """Before a run that does not go on from a checkpoint; the live model holds its start."""

    def _before_new_state(self, state: AdapterState) -> None:
        """After the clients of a round that has begun with `state`, before what has come of them is taken over."""

    def _reference_state(self) -> AdapterState:
        """The policy that a trainer compares with, if a resumed run needs it as it was at the start."""
        return {}

    def _load_reference(self, state: AdapterState) -> None:
        """Take over what `_reference_state` gave."""

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        """Tokenise one client's data; the base trainer's own preparation, where it has one."""
        return dataset

    def _prepare_held_out_dataset(self, dataset: Dataset, client: str) -> Dataset:
        return self._prepare_client_dataset(dataset, client)

    def _check_clients(self, clients: Mapping[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        """Refuse data that the base trainer cannot use; `kwargs` are the base trainer's."""

    def _check_model(self) -> None:
        """Refuse a model of which training would not reach what is trained."""
        refuse_idle_adapter(self.model)

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        """
        What the base trainer is given of model and adapter. TRL's trainers load and wrap, [`Trainer`] does neither.
        """
        return {"model": wrapped(model, peft_config, self.args.seed)}

    def _shared_start(self, published: AdapterState) -> AdapterState:
        """
        The adapter of the first process, in all of them: they may have drawn other random numbers before they made
        theirs. What is `published` is the same everywhere, and has been written.
        """
        if self._engine.num_processes > 1:
            device = self.accelerator.device
            whole = self._live_adapter.read(include_frozen=True)
            self._live_adapter.write({key: broadcast(tensor.to(device)).cpu() for key, tensor in whole.items()})
        state = self._live_adapter.read()
        if self._engine.makes_masters:
            # as the masters, which are made later, whatever the dtype of the model: TRL makes it bfloat16 for ZeRO-3
            # with `bf16`
            state = {key: published.get(key, tensor) for key, tensor in state.items()}
            state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        return state
