# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from trl import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from peft_scl import FederaConfig
from peft_scl.linalg import evenly_spaced

from ..client.engines import engine_of
from ..client.live import live_state
from ..client.live.base_changes import NEUTRAL_STARTS
from ..client.live.state import LiveState
from ..client.put_back import evaluating, remember_hooks, restoring
from ..client.tasks import Task, Trained
from ..config import FederatedDPOConfig, FederationArguments
from ..methods.aggregation import METHODS
from ..output.record import peft_type_name
from ..state.adapter_state import AdapterState
from .trl import TRLMixin, refuse_without_log_probs


__all__ = ["FederatedDPOTrainer"]


_REFERENCE = "ref"  # the adapter that TRL takes for the reference, if there is one of this name
_DIGEST = "digest"


class FederatedDPOTrainer(TRLMixin, DPOTrainer):
    """
    Federated direct preference optimisation: a [`~trl.DPOTrainer`] whose preferences are spread over clients.

    The loss compares the policy with a reference, and over rounds there are several to choose from: `args.reference`.

    | `reference` | the reference is | over the rounds |
    |---|---|---|
    | `"initial"` | the adapter that the federation starts from, such as `initial_adapter` | fixed |
    | `"base"` | the model without the adapter | fixed |
    | `"round"` | the global adapter at the start of the round | moves |

    For `"initial"` and `"round"` a frozen copy of the adapter (`"ref"`) is in the model; it is neither sent nor
    published. The checkpoints hold it, so that a resumed run has the same one.

    Without an adapter (full fine-tuning) the reference is `ref_model`, or the model that `DPOTrainer` loads for it,
    once more from where `model` came from; `reference` is then to be `"initial"`. A run is resumed with the same one
    only.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as in `DPOTrainer`. The adapter of a `PeftModel` has to be named `"default"`.
        args ([`FederatedDPOConfig`]):
            Settings of the federation and of the local rounds.
        train_dataset (`Mapping[str, Dataset]`):
            Preferences by client, in any format that `DPOTrainer` takes: `chosen` and `rejected`, with or without a
            `prompt`, as texts or messages.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out preferences on which the global model is evaluated. With `"round"` the loss after a round is
            relative to the global adapter before that round, so that it does not fall over the rounds.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train, if `model` is no `PeftModel` and there is no `args.initial_adapter`.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `DPOTrainer`: `processing_class`, `data_collator`, `callbacks`, ...; `ref_model`
            without an adapter only.

    Raises:
        ValueError: As [`FederatedTrainer`]; for columns without pairs of answers, and for what would move the
            reference: rules that add to the base weights, biases that PEFT trains in place (`bias="all"`), or with
            `"round"` tensors that stay with the clients. The message says what to do.

    Example:

    ```python
    >>> from fed_trainer import FederatedDPOConfig, FederatedDPOTrainer, natural_partition

    >>> trainer = FederatedDPOTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M",
    ...     args=FederatedDPOConfig(
    ...         output_dir="out",
    ...         initial_adapter="me/fed-sft",
    ...         reference="initial",
    ...         num_rounds=10,
    ...         max_steps=10,
    ...         learning_rate=5e-5,
    ...     ),
    ...     train_dataset=natural_partition(preferences, column="annotator"),
    ...     eval_dataset=held_out,
    ... )
    >>> trainer.train()
    ```
    """

    _config_class = FederatedDPOConfig
    _side_metrics = frozenset(
        {"entropy", "mean_token_accuracy", "num_tokens"}
        | {f"{kind}/{answer}" for kind in ("logits", "logps", "rewards") for answer in ("chosen", "rejected")}
    )
    _preference_formats = ({"chosen", "rejected"},)
    _kind = "dpo"
    _stub_row = MappingProxyType({"prompt": "A", "chosen": "B", "rejected": "C"})
    args: FederatedDPOConfig
    _reference: LiveState | None = None

    def __init__(
        self,
        model: str | nn.Module | None,
        args: FederationArguments,
        train_dataset: Mapping[str, Dataset] | Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._has_ref_model = kwargs.get("ref_model") is not None
        super().__init__(model, args, train_dataset, eval_dataset, peft_config, **kwargs)
        if not isinstance(self.model, PeftModel):
            return
        if _REFERENCE in self.model.peft_config:  # TRL adds it to a `PeftModel`, whatever `reference` is
            self.model.delete_adapter(_REFERENCE)
        if self.args.reference != "base":
            if self._engine.replaces_parameters:
                raise NotImplementedError(
                    f"`reference={self.args.reference!r}` is a second adapter in the model, whose parameters FSDP2 "
                    "would replace as well. Set `reference='base'`, or launch DDP or DeepSpeed."
                )
            self._reference = self._add_reference(self.model)

    def _check_settings(self, start: AdapterState) -> None:
        super()._check_settings(start)
        if isinstance(self.model, PeftModel):
            self._refuse_to_follow_what_stays_with_the_clients()

    def _local_round(self, task: Task) -> Trained:
        if self.args.reference == "round":
            assert self._reference is not None
            self._reference.write(task.state if task.global_state is None else task.global_state)
        return super()._local_round(task)

    def _before_first_round(self) -> None:
        self._follow_the_rounds(self.federation.state)

    def _before_new_state(self, state: AdapterState) -> None:
        self._follow_the_rounds(state)  # clients of smaller ranks were sent parts of it

    # The reference policy

    def _follow_the_rounds(self, state: AdapterState) -> None:
        """With `reference="round"` evaluations compare with the global state that the last round has begun with."""
        if self.args.reference == "round":
            assert self._reference is not None
            self._reference.write(state)

    def _add_reference(self, model: PeftModel) -> LiveState:
        """Beside the adapter a frozen copy of it, which `DPOTrainer` knows by its name."""
        config: Any = copy.deepcopy(model.active_peft_config)
        if isinstance(config, LoraConfig):
            config.init_lora_weights = True  # it is overwritten; other starts need data, or move the base weights
        start = self._live_adapter.read(include_frozen=True)
        with _keeping_what_is_trained(model):
            model.add_adapter(_REFERENCE, config)
            with use_adapter(model, _REFERENCE):
                reference = live_state(model, self._engine)
                for key, parameter in reference.parameters().items():
                    parameter.data = parameter.data.to(start[key].dtype)  # TRL's choice for quantised bases
        reference.write(start)
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        return reference

    def _reference_state(self) -> AdapterState:
        """
        The adapter `"ref"`; of a `ref_model`, which is as large as the model, a digest; nothing of the base model.
        """
        if self._reference is not None:
            return self._reference.saved()
        return {} if self.ref_model is None else {_DIGEST: _weights_digest(self.ref_model)}

    def _load_reference(self, state: AdapterState) -> None:
        if self._reference is not None:
            self._reference.load(state, "The reference policy in the checkpoint")
        elif self.ref_model is not None and not torch.equal(state[_DIGEST], _weights_digest(self.ref_model)):
            raise ValueError(
                "The checkpoint belongs to a run with another reference: the weights of `ref_model` (without it, of "
                "the model as `DPOTrainer` loads it) were others. Resume with the `ref_model` that the run was "
                "started with."
            )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with self._switching_policies():
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._switching_policies():
            return super().compute_ref_log_probs(model, inputs)

    @contextmanager
    def _switching_policies(self) -> Iterator[None]:
        """Within, TRL takes the reference and goes back to the policy, for which it switches on too much."""
        # checkpointing is off for the reference, and each time that it is on again, there is one more hook
        with restoring(remember_hooks(self.model)), _keeping_what_is_trained(self.model):
            yield

    # Data

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        if self._is_vision_dataset:  # the collator does it
            return dataset
        prepared = self._prepare_as_trl(dataset, client)
        if not self.args.precompute_ref_log_probs:
            return prepared
        batch = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        return self._precompute_ref_logps(prepared, f"client {client}", batch)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if dataset is self._first_look:
            return dataset
        with evaluating(self.model):  # a client that is prepared in its turn finds it in train mode
            return super()._precompute_ref_logps(dataset, name, batch_size)

    # Refusals

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        refuse_without_log_probs("DPOTrainer", model, peft_config)
        self._refuse_to_precompute_in_several_processes()
        if isinstance(model, PeftModel):
            self._refuse_adapters_that_trl_does_not_copy(model)
        config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
        if config is None:
            self._refuse_references_of_adapters()
        else:
            self._refuse_what_moves_the_reference(config)
        return super()._model_arguments(model, peft_config)

    def _refuse_adapters_that_trl_does_not_copy(self, model: PeftModel) -> None:
        names = list(model.peft_config)
        if _REFERENCE in names:
            raise ValueError(
                f"The `PeftModel` has the adapters {names}, but {_REFERENCE!r} is what `DPOTrainer` calls its "
                "reference, such as one that an earlier run has left in the model. Call "
                f"`model.delete_adapter({_REFERENCE!r})` first."
            )
        if names != ["default"]:
            raise ValueError(
                "`DPOTrainer` trains the adapter 'default' of a `PeftModel` and adds one, but the one that was given "
                f"has {names}. Save the adapter, and pass its folder as `initial_adapter`."
            )
        config = model.active_peft_config
        if config.is_prompt_learning:
            obstacle = f"{peft_type_name(config)}, whose parameters it looks for under other names"
        elif isinstance(config, FederaConfig):
            obstacle = "FeDeRA"
        elif self.args.precompute_ref_log_probs:
            obstacle = "`precompute_ref_log_probs=True`"
        else:
            return
        raise ValueError(
            "`DPOTrainer` adds a copy of the adapter to a `PeftModel` before it does anything else, which does not "
            f"go with {obstacle}. Pass the base model, with `peft_config` or `initial_adapter`."
        )

    def _refuse_to_precompute_in_several_processes(self) -> None:
        engine = engine_of(self.args.distributed_state)
        if self.args.precompute_ref_log_probs and engine.kind != "NO":
            raise NotImplementedError(
                f"`precompute_ref_log_probs=True` under {engine.kind}: `DPOTrainer` writes what it computes into a "
                "file of its first process, which the others do not find where a client's data is in memory. Leave "
                "it off, which gives the same loss, or launch a single process."
            )

    def _refuse_references_of_adapters(self) -> None:
        if self.args.reference != "initial":
            raise ValueError(
                f"`reference={self.args.reference!r}` is made by switching adapters, but a model without one is "
                "trained. Leave `reference` at 'initial': it is `ref_model`, or the model as it was loaded. Or give "
                "a `peft_config`."
            )

    def _refuse_what_moves_the_reference(self, config: Any) -> None:
        """All that is known of the adapter before a model is loaded."""
        if self._has_ref_model:
            raise ValueError(
                "`ref_model` is the reference of a model that is trained without an adapter. With an adapter set "
                "`reference`, and leave it out."
            )
        if METHODS[self.args.aggregation].moves_base:
            raise ValueError(
                f"`aggregation={self.args.aggregation!r}` changes the base weights, on which the reference stands as "
                "well, so it would change with them. Use an aggregation that leaves them alone, such as 'fedavg'."
            )
        bias = getattr(config, "bias", "none")
        if bias not in ("none", False):
            raise ValueError(
                f"`bias={bias!r}` trains biases of the base model in place, and PEFT leaves them so where it switches "
                "to another adapter or to none, so the reference would change with them. Set `bias='none'`."
            )
        if self.args.reference != "base" and isinstance(config, FederaConfig) and not config.keep_base:
            raise ValueError(
                f"`reference={self.args.reference!r}` is a second adapter in the model, but with `keep_base=False` "
                "the base weights hold the residual of one FeDeRA adapter. Set `keep_base=True` in the "
                "`FederaConfig`, or `reference='base'`."
            )
        start = getattr(config, "init_lora_weights", True)
        if self.args.reference == "base" and start not in NEUTRAL_STARTS:
            raise ValueError(
                f"`reference='base'` is the model without its adapter, but `init_lora_weights={start!r}` has taken "
                "the start of the LoRA out of the base weights. Set `reference='initial'`, which is the same policy."
            )

    def _refuse_to_follow_what_stays_with_the_clients(self) -> None:
        if self.args.reference == "round" and self._local_keys:
            raise ValueError(
                f"`reference='round'` is the global adapter at the start of the round, but {len(self._local_keys)} "
                f"tensors stay with the clients (the first: {min(self._local_keys)}), so there is none. Set 'initial' "
                "or 'base'."
            )


def _weights_digest(model: nn.Module) -> torch.Tensor:
    """
    SHA-256 over a sample of each parameter, `(32,)`, as [`base_digest`]. A whole model is trained by what does not
    split it only.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        sample = evenly_spaced(parameter).to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@contextmanager
def _keeping_what_is_trained(model: nn.Module) -> Iterator[None]:
    """PEFT switches adapters on by making all of their parameters trainable, those too that are to stay frozen."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
