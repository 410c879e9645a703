# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluating, predicting and saving between rounds leaves model and trainer as they are, whatever the settings are."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from fed_trainer import FederatedTrainer
from fed_trainer.client import engine
from fed_trainer.client.put_back import _HOOKS
from fed_trainer.trainers.refusals.settings import refuse_other_weights_in_evaluation
from helpers.comparison import same
from helpers.local_rounds import local_round
from helpers.trainers import QUICK_TEXT


LOCAL = {**QUICK_TEXT, "num_rounds": 2, "max_steps": 1, "per_device_train_batch_size": 2, "save_only_model": True}
# Read where `Trainer` or a trainer of TRL evaluates, predicts or prepares for it: each is tried out below.
ACTS: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16": True,
    "bf16_full_eval": True,
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "dataloader_multiprocessing_context": {
        "dataloader_multiprocessing_context": "fork",
        "dataloader_num_workers": 1,
    },
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    "dataloader_pin_memory": False,
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 3, "dataloader_num_workers": 1},
    "debug": "underflow_overflow",
    "eval_accumulation_steps": 1,
    "eval_do_concat_batches": False,
    "eval_packing": True,
    "eval_use_gather_object": True,
    "fp16_full_eval": True,
    "gradient_checkpointing": True,
    "include_for_metrics": ["inputs", "loss"],
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "length",
    "logging_nan_inf_filter": False,
    "loss_type": "dft",
    "neftune_noise_alpha": 5.0,
    "packing": {"packing": True, "packing_strategy": "wrapped"},
    "per_device_eval_batch_size": 3,
    "prediction_loss_only": True,
    "seed": 7,
    "skip_memory_metrics": False,
    "train_sampling_strategy": "group_by_length",
    "use_cache": True,
}
# Refused, by us or by `Trainer`: the settings, and a word of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "different local batches"),
    "enable_jit_checkpoint": ({"enable_jit_checkpoint": True}, "in the middle of a client's local steps"),
    "eval_strategy": ({"eval_strategy": "steps", "eval_steps": 1}, "in the middle of a client's local steps"),
    "load_best_model_at_end": (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        "load_best_model_at_end",
    ),
}
# Read between rounds too, but other tests try them out: several processes, a GPU, kernels that are not installed,
# another trainer.
ELSEWHERE = {
    "activation_offloading", "data_seed", "deepspeed", "disable_dropout", "fsdp", "full_determinism",
    "max_length", "parallelism_config", "precompute_ref_batch_size", "precompute_ref_log_probs", "router_aux_loss_coef",
    "sync_ref_model", "torch_compile", "use_cpu", "use_liger_kernel",
}  # fmt: skip
# Read while a client trains, or where files, logs and processes are set up: they do not touch the model between
# rounds.
INERT = {
    "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon",
    "assistant_only_loss", "beta", "center_rewards_coefficient", "chat_template_path", "completion_only_loss", "dataset_kwargs",
    "dataset_num_proc", "dataset_text_field", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "disable_tqdm", "discopop_tau", "do_eval", "do_predict",
    "do_train", "eos_token", "eval_delay", "eval_on_start", "eval_steps", "f_alpha_divergence_coef", "f_divergence_type", "fp16",
    "fsdp_config", "gradient_accumulation_steps", "gradient_checkpointing_kwargs", "greater_is_better", "hub_always_push",
    "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "ignore_data_skip",
    "include_num_input_tokens_seen", "label_smoothing", "ld_alpha", "learning_rate", "liger_kernel_config", "local_rank",
    "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps", "logging_strategy",
    "loss_weights", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_steps", "metric_for_best_model",
    "model_init_kwargs", "num_train_epochs", "optim", "optim_args", "optim_target_modules", "output_dir", "packing_strategy",
    "pad_to_multiple_of", "pad_token", "padding_free", "per_device_train_batch_size", "project", "push_to_hub",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "remove_unused_columns", "report_to",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name", "save_on_each_node", "save_only_model",
    "save_steps", "save_strategy", "save_total_limit", "shuffle_dataset", "tf32", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "truncation_mode",
    "trust_remote_code", "use_weighting", "warmup_steps", "weight_decay",
}  # fmt: skip
CONFIGS = (TrainingArguments, SFTConfig, DPOConfig, RewardConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_classified(config):
    known = [set(ACTS), set(REFUSED), ELSEWHERE, INERT]
    unknown = {field.name for field in dataclasses.fields(config)} - set().union(*known)
    assert not unknown, f"classify me: {sorted(unknown)} of {config.__name__}, does it act outside of `train()`?"
    assert sum(map(len, known)) == len(set().union(*known))  # each once


@pytest.mark.parametrize("trainer", [Trainer, SFTTrainer, DPOTrainer, RewardTrainer])
def test_no_field_that_is_read_in_an_evaluation_is_called_inert(trainer):
    doors = ["evaluate", "predict", "evaluation_loop", "prediction_step", "get_eval_dataloader", "get_test_dataloader"]
    doors += ["_get_dataloader", "_get_eval_sampler", "compute_loss", "_compute_loss"]
    read = set()
    for door in doors:
        if door in vars(trainer):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(vars(trainer)[door])))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                    read.add(node.attr)
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    # numbers that go into a loss, and what DPO checks
    harmless = {"beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "loss_weights"}
    harmless |= {"use_weighting", "discopop_tau", "center_rewards_coefficient", "gradient_checkpointing_kwargs"}
    assert sorted(read & fields & INERT - harmless) == []


class Doors(TrainerCallback):
    """Goes through every door after each round, and looks whether something has changed."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.trainer, self.gather = folder, None, None
        self.losses: list[float] = []

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        trainer.model.train()  # as a local round leaves it
        assert trainer.gather_function is self.gather
        for door in (
            lambda: self.losses.append(trainer.evaluate()["eval_loss"]),
            lambda: trainer.predict(trainer.eval_dataset),
            lambda: trainer.evaluation_loop(trainer.get_eval_dataloader(), description="Evaluation"),
            lambda: trainer.save_model(str(self.folder)),
            lambda: trainer.save_client_model("a", self.folder / "a"),
        ):
            before = everything(trainer)
            door()
            assert_unchanged(before, everything(trainer))


def everything(trainer: Any) -> dict[str, Any]:
    model = trainer.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {
            name: (id(tensor), tensor.requires_grad, tensor.detach().clone()) for name, tensor in tensors.items()
        },
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, hooks)) for module in model.modules() for hooks in _HOOKS],
        "flags": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
        "gather": trainer.gather_function,
        "use_cache": model.config.use_cache,
        "args": {field.name: getattr(trainer.args, field.name) for field in dataclasses.fields(trainer.args)},
        "loaders": len(trainer.accelerator.gradient_state._dataloader_references_ref),
        "figures": {mode: dict(figures) for mode, figures in trainer._metrics.items()},
        "is_tracked": bool(vars(trainer._memory_tracker).get("cur_stage")),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert before == after
    assert tensors.keys() == others.keys()
    for name, (identity, requires_grad, tensor) in tensors.items():
        assert others[name][:2] == (identity, requires_grad)
        assert tensor.dtype == others[name][2].dtype and torch.equal(tensor, others[name][2])


def count(output: Any, compute_result: bool = True) -> dict[str, float]:
    return {"count": 1.0}


@pytest.fixture
def make_trainer(make_trainer, make_clients, tmp_path):
    rows = make_clients(num_clients=2, rows=8)
    rows = {name: data.remove_columns("topic") for name, data in rows.items()}
    adapter = {"r": 4, "lora_dropout": 0.1, "target_modules": ["v_proj"]}

    def make(output: str, doors: bool, **settings: Any) -> FederatedTrainer:
        held_out = Doors(tmp_path / "saved") if doors else None
        trainer = make_trainer(
            output,
            adapter=adapter,
            clients={"a": rows["client_0"]},
            eval_dataset=rows["client_1"] if doors else None,
            compute_metrics=count if doors else None,
            callbacks=[held_out] if doors else [],
            **LOCAL | {"eval_on_start": doors} | settings,
        )
        if held_out is not None:
            held_out.trainer, held_out.gather = trainer, trainer.gather_function
            trainer.doors = held_out
        return trainer

    return make


pytestmark = pytest.mark.usefixtures("little_garbage")  # measuring memory collects it


@pytest.mark.fast(
    "bf16",
    "bf16_full_eval",
    "dataloader_drop_last",
    "dataloader_persistent_workers",
    "eval_accumulation_steps",
    "eval_packing",
    "gradient_checkpointing",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "packing",
    "seed",
    "skip_memory_metrics",
    "train_sampling_strategy",
)
@pytest.mark.parametrize("field", ACTS)
def test_what_is_done_between_rounds_changes_nothing(make_trainer, field):
    settings = ACTS[field] if isinstance(ACTS[field], dict) else {field: ACTS[field]}
    without = make_trainer("without", False, **settings)
    without.train()
    trainer = make_trainer("doors", True, **settings)
    trainer.train()
    assert len(trainer.doors.losses) == 2
    assert same(trainer.federation.state, without.federation.state)


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_change_something_is_refused(make_trainer, field):
    settings, reason = REFUSED[field]
    with pytest.raises(ValueError, match=reason):
        make_trainer("refused", False, **settings)


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
def test_figures_of_a_cast_evaluation_are_those_of_the_base_trainer(make_trainer, tiny_model_dir, tmp_path, field):
    trainer = make_trainer("ours", True, **{field: True})
    trainer.train()
    stock = SFTTrainer(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours"),
        SFTConfig(
            str(tmp_path / "stock"), use_cpu=True, report_to="none", disable_tqdm=True, bf16=False, **{field: True}
        ),
        train_dataset=trainer.eval_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
    )
    rounded = stock.evaluate()["eval_loss"]
    assert trainer.doors.losses[-1] == trainer.evaluate()["eval_loss"] == rounded
    setattr(trainer.args, field, False)
    assert trainer.evaluate()["eval_loss"] != rounded
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
@pytest.mark.parametrize("obstacle", ["quantised", "split"])
def test_a_model_that_could_not_be_cast_back_is_not_cast(make_trainer, monkeypatch, field, obstacle):
    args = make_trainer("cast", False, **{field: True}).args
    model = torch.nn.Linear(1, 1)
    model.is_quantized = obstacle == "quantised"
    with pytest.raises(NotImplementedError, match=f"`{field}=True` casts the model"):
        refuse_other_weights_in_evaluation(args, model, obstacle == "split")


def test_an_evaluation_that_breaks_off_changes_nothing(make_trainer):
    without = make_trainer("without", False)
    without.train()
    trainer = make_trainer("broken", True, eval_on_start=False, bf16_full_eval=True, skip_memory_metrics=False)
    trainer.doors.on_save = lambda *args, **kwargs: break_off(trainer)
    trainer.train()
    assert same(trainer.federation.state, without.federation.state)


def break_off(trainer: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no figures")

    before = everything(trainer)
    for part in ("compute_metrics", "compute_loss"):  # after the batches, and among them
        whole = getattr(trainer, part)
        setattr(trainer, part, broken)
        for door in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
            with pytest.raises(RuntimeError, match="no figures"):
                door()
        setattr(trainer, part, whole)
    assert_unchanged(before, everything(trainer))


class Lookahead(torch.optim.SGD):
    """Trains at other weights than those to be used, as schedule-free optimisers do: they go half the way back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.param_groups[0]["is_training"] = False

    def train(self) -> None:
        self._exchange(True)

    def eval(self) -> None:
        self._exchange(False)

    @torch.no_grad()
    def _exchange(self, is_training: bool) -> None:
        if self.param_groups[0]["is_training"] == is_training:
            return
        self.param_groups[0]["is_training"] = is_training
        for group in self.param_groups:
            for parameter in group["params"]:
                if "first" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["first"], -1.0 if is_training else 0.5)

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["is_training"]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("first", parameter.detach().clone())
        return super().step(closure)


def test_an_optimiser_with_other_weights_gives_those_to_be_used(make_trainer):
    settings = {"max_steps": 3, "max_grad_norm": 0.0}
    plain = make_trainer("plain", False, **settings)
    plain.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    trainer = make_trainer("ours", True, **settings)
    trainer.optimizer_cls_and_kwargs = (Lookahead, {"lr": 0.1})
    start, rows = plain.federation.state, plain.client.data.prepared("a")
    trained, _ = local_round(plain, start, rows, 0)
    to_be_used, _ = local_round(trainer, start, rows, 0)
    for key, tensor in to_be_used.items():
        torch.testing.assert_close(tensor, (start[key] + trained[key]) / 2)
    assert not same(trained, start)
    trainer.train()  # the doors leave all as it is
    again = make_trainer("without", False, **settings)
    again.optimizer_cls_and_kwargs = (Lookahead, {"lr": 0.1})
    again.train()
    assert same(trainer.federation.state, again.federation.state)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"])
def test_weights_that_are_split_are_not_exchanged(make_trainer, optim):
    args = make_trainer("split", False, optim=optim).args
    with pytest.raises(NotImplementedError, match=f"`optim='{optim}'` trains other weights"):
        refuse_other_weights_in_evaluation(args, torch.nn.Linear(1, 1), True)
    refuse_other_weights_in_evaluation(args, torch.nn.Linear(1, 1), False)


def test_an_evaluation_before_the_first_round_has_the_tokens_and_kernels_of_training(make_trainer, monkeypatch):
    """`Trainer` takes over the special tokens of the tokenizer and puts kernels in when training starts."""
    calls = []
    monkeypatch.setattr(engine, "apply_liger_kernel", lambda model, config: calls.append("kernels"))
    trainer = make_trainer("ours", True)
    trainer.args.use_liger_kernel = True
    monkeypatch.setattr(trainer, "_wrap_model", lambda model, **_: calls.append("engine") or model)
    trainer.model.config.bos_token_id = None
    trainer.evaluate()
    assert trainer.model.config.bos_token_id == trainer.processing_class.bos_token_id
    assert calls[:2] == ["kernels", "engine"]
    local_round(trainer, trainer.federation.state, trainer.client.data.prepared("a"), 0)
    assert calls.count("kernels") == 1 and trainer.args.use_liger_kernel
