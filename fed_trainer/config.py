# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, RewardConfig, SFTConfig

from .methods.aggregation import METHODS
from .methods.codecs import WIRE_DTYPES
from .methods.objectives import LOCAL_OBJECTIVES
from .methods.schedules import check_local_schedule, check_schedule_name, lr_factors
from .methods.server_optimizers import SERVER_OPTIMIZERS
from .state.checks import check_integer, check_number


__all__ = [
    "FederatedConfig",
    "FederatedDPOConfig",
    "FederatedRewardConfig",
    "FederatedTaskConfig",
    "FederationArguments",
    "given",
    "joins_examples",
    "json_mapping",
    "local_batch",
    "round_lr_factors",
]

REFERENCES = ("initial", "base", "round")

if TYPE_CHECKING:
    _Arguments = TrainingArguments
    NumberOrFraction = int | float
else:
    _Arguments = object  # as a base it would bring its defaults, over those of `SFTConfig`

    class NumberOrFraction:
        """What the command line makes of a text: `1` is a number, `1.0` a fraction."""

        def __new__(cls, text: str) -> int | float:
            try:
                return int(text)
            except ValueError:
                return float(text)


_MAPPINGS = (
    "aggregation_kwargs", "tensor_roles", "client_settings", "server_optimizer_kwargs", "local_objective_kwargs",
    "codecs",
)  # fmt: skip


@dataclass
class FederationArguments(_Arguments):
    """
    What a federation adds to any [`~transformers.TrainingArguments`]:
    `class MyConfig(FederationArguments, SomeConfig)`.

    The fields are explained in [`FederatedConfig`].
    """

    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Schedule of the learning rate within a local round."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate the global adapter before the first round."}
    )

    num_rounds: int = field(default=10, metadata={"help": "Number of communication rounds."})
    clients_per_round: NumberOrFraction | None = field(
        default=None,
        metadata={
            "help": "Clients sampled per round: a number (1, 2, ...) or a fraction of all clients (0.1, ..., 1.0 "
            "for all). All clients if not given."
        },
    )
    min_clients: int = field(default=1, metadata={"help": "Usable updates that a round needs."})
    client_retries: int = field(
        default=0, metadata={"help": "How often the local round of a client that failed is tried again."}
    )
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a local round counts as failed; no limit if not given."}
    )
    keep_optimizer_state: bool = field(
        default=False,
        metadata={
            "help": "Whether the local optimiser of a client goes on from its last local round, instead of "
            "starting afresh."
        },
    )
    aggregation: str = field(
        default="fedavg",
        metadata={"help": "How client updates become the next global adapter.", "choices": sorted(METHODS)},
    )
    aggregation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the aggregation, such as '{\"trim\": 0.2}'."}
    )
    tensor_roles: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Patterns of tensors that are shared, local or frozen, such as \'{"local": ["classifier"]}\'.'
        },
    )
    client_settings: dict | str | None = field(
        default=None,
        metadata={"help": 'What single clients do differently, such as \'{"a": {"r": 4, "max_steps": 5}}\'.'},
    )
    server_optimizer: str = field(
        default="sgd",
        metadata={"help": "What the server does with the aggregated update.", "choices": sorted(SERVER_OPTIMIZERS)},
    )
    server_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the server; 1 for 'sgd' and 'fedavgm', 0.01 for the others."}
    )
    server_optimizer_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further options of the server optimiser, such as '{\"beta1\": 0.9}'."}
    )
    local_objective: str | None = field(
        default=None,
        metadata={"help": "What clients add to their loss or gradients.", "choices": sorted(LOCAL_OBJECTIVES)},
    )
    local_objective_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the local objective, such as '{\"mu\": 0.01}'."}
    )
    wire_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Floating dtype in which tensors are sent, if theirs is wider; as they are if not given.",
            "choices": sorted(WIRE_DTYPES),
        },
    )
    codecs: dict | str | None = field(
        default=None,
        metadata={"help": "Steps of an update before it is sent, by name with their options, in order."},
    )
    round_lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Schedule of the learning rate over rounds ('constant', 'linear', 'cosine', ...)."},
    )
    initial_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start from, a folder or a Hub id."}
    )
    initial_adapter_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `initial_adapter` on the Hub."}
    )
    eval_rounds: int = field(default=1, metadata={"help": "Evaluate every so many rounds, and always after the last."})
    save_rounds: int = field(
        default=1, metadata={"help": "Write a checkpoint every so many rounds, and always after the last."}
    )
    partition: str | None = field(
        default=None, metadata={"help": "How the data was split into clients, in words, for the record."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column counted per client for the record and the heat map of the split."}
    )
    publish_client_names: bool = field(
        default=False, metadata={"help": "Whether what is pushed to the Hub names the clients."}
    )
    publish_client_metrics: bool = field(
        default=False,
        metadata={"help": "Whether what is pushed to the Hub has the figures and sizes of single clients."},
    )
    publish_label_counts: bool = field(
        default=False,
        metadata={"help": "Whether what is pushed to the Hub has the counts of `label_column` by client."},
    )

    def __post_init__(self) -> None:
        for name in ("lr_scheduler_type", "round_lr_scheduler_type"):  # `TrainingArguments` would ask for evaluations
            check_schedule_name(name, getattr(self, name))
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()

        for name in _MAPPINGS:
            setattr(self, name, json_mapping(name, getattr(self, name)) or None)  # an empty one is none
        for name in ("num_rounds", "min_clients", "eval_rounds", "save_rounds"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("client_retries", self.client_retries, least=0)
        if self.client_timeout is not None:
            check_number(
                "client_timeout", self.client_timeout, lambda value: value > 0, "a positive number of seconds"
            )
        _check_clients_per_round(self.clients_per_round)
        self._check_local_budget()
        round_lr_factors(self)
        choices = (
            ("aggregation", METHODS),
            ("server_optimizer", SERVER_OPTIMIZERS),
            ("local_objective", {None, *LOCAL_OBJECTIVES}),
            ("wire_dtype", {None, *WIRE_DTYPES}),
        )
        for name, names in choices:
            if getattr(self, name) not in list(names):  # it may have no hash
                raise ValueError(
                    f"`{name}` should be one of {sorted(names, key=str)} but the value passed is "
                    f"{getattr(self, name)!r}"
                )
        if self.initial_adapter_revision is not None and self.initial_adapter is None:
            raise ValueError(
                "`initial_adapter_revision` is given without `initial_adapter`, which it is a revision of."
            )
        if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"`hub_strategy={HubStrategy(self.hub_strategy).value!r}` would push checkpoint folders. Use "
                "'every_save' (one commit per saved round) or 'end'."
            )
        self._refuse_local_evaluation_and_saving()

    def _check_local_budget(self) -> None:
        """Refuse a local round without a step, and a schedule that it could not follow."""
        if self.max_steps != -1 and not self.max_steps >= 1:
            raise ValueError(
                "`max_steps` is the budget of a client in a round, so it should be at least 1 (or left out, for "
                f"`num_train_epochs`), but the value passed is {self.max_steps!r}"
            )
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(
                "`num_train_epochs` is the budget of a client in a round, so it should be positive (or `max_steps` "
                f"be set), but the value passed is {self.num_train_epochs!r}"
            )
        steps = -1 if self.client_settings else self.max_steps  # a client may have a budget of its own
        kwargs: Any = self.lr_scheduler_kwargs  # `TrainingArguments` has read its JSON
        check_local_schedule(self.lr_scheduler_type, self.warmup_steps, kwargs, self.learning_rate, steps)

    def _refuse_local_evaluation_and_saving(self) -> None:
        if self.eval_strategy != "no":
            raise ValueError(
                f"`eval_strategy={IntervalStrategy(self.eval_strategy).value!r}` would evaluate in the middle of a "
                "client's local steps. Leave it at 'no' and set `eval_rounds`."
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end=True` is not supported by a federation. Every round is kept in "
                "`checkpoint-<round>`, with its evaluation in `federation.jsonl`: load the one you want."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint=True` would save in the middle of a client's local steps. Leave it out: a "
                "run that is stopped goes on from its last round with `train(resume_from_checkpoint=True)`."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size=True` would give clients different local batches. Set "
                "`per_device_train_batch_size` and `gradient_accumulation_steps`."
            )


@dataclass
class FederatedConfig(FederationArguments, SFTConfig):
    """
    Configuration of a [`FederatedTrainer`]: every field of [`~trl.SFTConfig`], plus what a federation adds.

    The inherited fields keep their names and describe the *local* work of one client in one round: `max_steps` or
    `num_train_epochs` is the budget per client and round, `per_device_train_batch_size` and
    `gradient_accumulation_steps` the local batch, `learning_rate` and `lr_scheduler_type` the local optimiser, which
    starts afresh in every local round (but see `keep_optimizer_state`). Schedules that follow metrics are refused, a
    budget without a step too. `save_total_limit`, `seed`, `report_to`, `push_to_hub` and the like concern the whole
    run.

    Parameters:
        > Parameters that control the federation

        num_rounds (`int`, *optional*, defaults to `10`):
            Number of communication rounds.
        clients_per_round (`int` or `float`, *optional*):
            Clients sampled per round, uniformly without replacement, seeded by `seed` and the round: a number of
            clients (`1`, `2`, ...), or a fraction of all clients (`0.1`; `1.0` is all of them, `1` is one client). All
            clients if not given.
        min_clients (`int`, *optional*, defaults to `1`):
            Usable updates that a round needs. A client whose local round fails (an exception, out of memory, too
            slow), or whose update cannot be used (values that are not finite, ...), is named in the log and the
            record, and left out.
        client_retries (`int`, *optional*, defaults to `0`):
            How often the local round of a client that failed is tried again, from the same start with the same seed.
        client_timeout (`float`, *optional*):
            Seconds after which a local round counts as failed, looked at after every optimiser step; no limit
            if not given.
        keep_optimizer_state (`bool`, *optional*, defaults to `False`):
            Whether what the local optimiser of a client remembers (moments, numbers of steps) is kept on disk and goes
            on in its next local round, instead of starting afresh. The learning rate follows its schedules either way.
        round_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of the learning rate *over rounds*, a name that `transformers.get_scheduler` knows without further
            arguments (`"constant"`, `"linear"`, `"cosine"`, ...) or metrics. Round `t` of `T` trains with
            `learning_rate` times the factor of step `t - 1` of `T`.
        initial_adapter (`str`, *optional*):
            Adapter to start from, a folder or a Hub id, for instance the result of an earlier federation. It brings
            its own PEFT config.
        initial_adapter_revision (`str`, *optional*):
            Branch, tag or commit of `initial_adapter` on the Hub.

        > Parameters that control the aggregation

        aggregation (`str`, *optional*, defaults to `"fedavg"`):
            How client updates become the next global adapter, a name in
            `fed_trainer.methods.aggregation.METHODS`. `"fedavg"`: mean weighted by the clients' numbers of
            examples (McMahan et al., 2017), or otherwise with `weights`.
        aggregation_kwargs (`dict` or `str`, *optional*):
            Options of the aggregation, as its class names them: `{"trim": 0.2}` for `"trimmed_mean"`. Rules that are
            weighted means take `weights`: `"examples"`, `"uniform"` (all clients alike) or `"tokens"` (those that
            carry a loss).
        tensor_roles (`dict` or `str`, *optional*):
            Which tensors are shared, which stay with a client and which nobody trains: fields of [`TensorRoles`],
            as in `{"local": ["classifier"]}`, in addition to what the aggregation sets. With local tensors
            `eval_dataset` is a dictionary by client, each client is evaluated with its own, and `eval_loss` is the
            mean weighted by examples.
        client_settings (`dict` or `str`, *optional*):
            What single clients do differently, by client:
            `{"a": {"r": 4, "layers_to_transform": [0, 1], "max_steps": 5}}`. `r` is at most the rank of the PEFT
            config (for `"flora"`, `"flexlora"`, `"hetlora"`), with the scaling of that config;
            `layers_to_transform` are the layers whose tensors the client trains; `max_steps` is its local budget.
        server_optimizer (`str`, *optional*, defaults to `"sgd"`):
            What the server does with the aggregated update: `"sgd"` adds `server_lr` times it, `"fedavgm"`,
            `"fedadagrad"`, `"fedadam"` and `"fedyogi"` are those of Reddi et al. (2020).
        server_lr (`float`, *optional*):
            Learning rate of the server: 1 for `"sgd"` and `"fedavgm"`, 0.01 for the others if not given.
        server_optimizer_kwargs (`dict` or `str`, *optional*):
            Further options of the server optimiser, as its class names them: `{"beta1": 0.9, "tau": 1e-3}`.
        local_objective (`str`, *optional*):
            What clients add to their gradients, a name in `fed_trainer.methods.objectives.LOCAL_OBJECTIVES`.
        local_objective_kwargs (`dict` or `str`, *optional*):
            Options of the local objective, as its class names them: `{"mu": 0.01}` for `"fedprox"`.

        > Parameters that control what is sent

        wire_dtype (`str`, *optional*):
            Floating dtype in which tensors are sent, if theirs is wider: `"bfloat16"` or `"float16"` halve the
            bytes of float32. Updates are rounded without bias (stochastically), what the server sends to the
            nearest. As they are if not given.
        codecs (`dict` or `str`, *optional*):
            Steps that an update goes through before it is sent, in order: names in `fed_trainer.methods.codecs.CODECS`
            with their options, such as `{"dtype": {"dtype": "bfloat16"}}`. `wire_dtype` is a last step behind them.

        > Parameters that control evaluation and saving

        eval_rounds (`int`, *optional*, defaults to `1`):
            Evaluate the global adapter on `eval_dataset` every so many rounds, and always after round `num_rounds`.
        save_rounds (`int`, *optional*, defaults to `1`):
            Write a checkpoint (`checkpoint-<round>`) every so many rounds, and always after the last.

        > Parameters that describe the run

        partition (`str`, *optional*):
            How the data was split into clients, in words (`"dirichlet(alpha=0.1) over category"`), for the record
            and the model card.
        label_column (`str`, *optional*):
            Column whose values are counted per client for the record and the heat map of the split. Nothing is counted
            if not given: such counts leave the clients.

        > Parameters that control what is published (the files in `output_dir` have it all)

        publish_client_names (`bool`, *optional*, defaults to `False`):
            Whether `push_to_hub` publishes the names of the clients, in the record and which of them took part in a
            round.
        publish_client_metrics (`bool`, *optional*, defaults to `False`):
            Whether `push_to_hub` publishes figures of single clients: sizes, losses, steps, seconds, bytes,
            evaluations. With the names also why clients were left out, and `client_settings`.
        publish_label_counts (`bool`, *optional*, defaults to `False`):
            Whether `push_to_hub` publishes how often each value of `label_column` occurs at each client, of which the
            sum is its size.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`, which would fall to zero within
    >   every round.
    > - `eval_on_start`: Defaults to `True` instead of `False`: a curve over rounds starts before the first.
    > - `bf16`: Defaults to `True` only where an accelerator supports it.
    """


@dataclass
class FederatedTaskConfig(FederationArguments, TrainingArguments):
    """
    Configuration of a [`FederatedTaskTrainer`]: every field of [`~transformers.TrainingArguments`], plus what a
    federation adds.

    The fields that are added, how the inherited ones are meant, and the defaults of `lr_scheduler_type` and
    `eval_on_start` are those of [`FederatedConfig`]. `bf16` keeps its default, `False`.
    """


@dataclass
class FederatedDPOConfig(FederationArguments, DPOConfig):
    """
    Configuration of a [`FederatedDPOTrainer`]: every field of [`~trl.DPOConfig`], plus what a federation adds.

    The fields that are added, how the inherited ones are meant, and the defaults of `lr_scheduler_type`,
    `eval_on_start` and `bf16` are those of [`FederatedConfig`]. One more:

    Parameters:
        reference (`str`, *optional*, defaults to `"initial"`):
            The reference policy of the loss. `"initial"`: the policy before the first round, fixed over the whole
            federation: a copy of the adapter it starts from (of `initial_adapter`, say). `"base"`: the model
            without the adapter, fixed too. `"round"`: the global adapter at the start of the round, for all clients
            of the round and its evaluation. `precompute_ref_log_probs` is possible with `"base"` alone,
            `sync_ref_model` with none.
    """

    reference: str = field(
        default="initial",
        metadata={
            "help": "The reference policy: the adapter the federation starts from, the base model without an "
            "adapter, or the global adapter at the start of each round.",
            "choices": list(REFERENCES),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in REFERENCES:
            raise ValueError(
                f"`reference` should be one of {list(REFERENCES)} but the value passed is {self.reference!r}"
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` moves the reference in the middle of a client's local steps, so that it "
                "would go on from client to client. Set `reference='round'`, which moves it from round to round."
            )
        if self.precompute_ref_log_probs and self.reference != "base":
            raise ValueError(
                f"`precompute_ref_log_probs=True` needs a reference that is known before the run, but `reference` is "
                f"{self.reference!r}. Set `reference='base'`, or leave it off."
            )


@dataclass
class FederatedRewardConfig(FederationArguments, RewardConfig):
    """
    Configuration of a [`FederatedRewardTrainer`]: every field of [`~trl.RewardConfig`], plus what a federation adds.

    The fields that are added, how the inherited ones are meant, and the defaults of `lr_scheduler_type`,
    `eval_on_start` and `bf16` are those of [`FederatedConfig`].
    """


def json_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """
    The value of a field that takes a dictionary, which the command line gives as JSON.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{name}` should be a dictionary or its JSON, but {value!r} is neither ({error})."
            ) from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` should be a dictionary but the value passed is {value!r}")
    return value


def _check_clients_per_round(value: object) -> None:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if value is not None and not (0 < number < 1 or (1 <= number < math.inf and number == int(number))):
        raise ValueError(
            "`clients_per_round` should be a number of clients (1, 2, ...) or a fraction of them up to 1.0, which "
            f"is all of them, but the value passed is {value!r}"
        )


def given(args: FederationArguments, field: str) -> dict[str, Any]:
    """What the user has put into a field that takes a dictionary; empty if nothing."""
    return getattr(args, field) or {}


def joins_examples(args: FederationArguments) -> bool:
    """Whether a training sequence holds several examples: the packing of [`~trl.SFTTrainer`]."""
    return isinstance(args, SFTConfig) and args.packing


def round_lr_factors(args: FederationArguments) -> list[float]:
    """
    Factor on `learning_rate` in each round, by `round_lr_scheduler_type`.

    Raises:
        ValueError: If that is no schedule, or one that needs arguments of its own.
    """
    return lr_factors("round_lr_scheduler_type", args.round_lr_scheduler_type, args.num_rounds)


def local_batch(args: FederationArguments) -> int:
    """Examples of one optimiser step over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
