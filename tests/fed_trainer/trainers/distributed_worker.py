# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What every process of test_distributed.py does: see `launch` there. Writes `<rank>.json`."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, set_seed

from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedMixin,
    FederatedTaskConfig,
    FederatedTaskTrainer,
    FederatedTrainer,
)
from fed_trainer.config import FederationArguments
from fed_trainer.federation.packet import Packet
from fed_trainer.federation.validation import TooFewClientsError
from helpers.data import clients_of, preferences_of
from helpers.fsdp_on_cpu import pretend_that_accelerate_found_gpus
from helpers.local_rounds import local_round
from helpers.runs import Stops
from peft_scl import FederaConfig, FederaLayer


KIND, MODEL, FOLDER, SCOPE = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
if KIND.startswith("zero") and SCOPE == "short":
    import deepspeed.ops

    # messages through shared memory, which has to be compiled and takes longer than all else here; gloo does it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
SPLIT = ("zero3", "zero3_offload", "fsdp2")  # kinds that split the weights
SWAPS = {"short": 20, "whole": 200}[SCOPE]
LOCAL = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "num_rounds": 2,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def make_args(config_class: type[FederationArguments], name: str, **settings: Any) -> Any:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    on_cpu = KIND in ("cpu", "ddp")  # the others would be dropped
    args = config_class(
        output_dir=str(FOLDER / name),
        per_device_eval_batch_size=1,  # `Trainer` averages the losses of batches
        use_cpu=on_cpu,
        ddp_backend=None if on_cpu else "gloo",
        **{**LOCAL, "per_device_train_batch_size": 4 // processes, **settings},
    )
    if KIND.startswith("zero3"):  # or else ZeRO-3 would leave these small weights whole
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return args


def make_trainer(name: str, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> FederatedTrainer:
    clients = clients_of(num_clients=3)
    clients["client_1"] = clients["client_1"].select(range(8))
    if settings.pop("leaves_out_client_1", False):
        del clients["client_1"]
    held_out: Any = clients["client_0"].select(range(8))
    if settings.pop("evaluates_clients", False):
        held_out = {client: rows.select(range(4)) for client, rows in clients.items()}
    peft_config = settings.pop("peft_config", LoraConfig(**LORA))
    trainer = FederatedTrainer(
        model=MODEL,
        args=make_args(FederatedConfig, name, max_length=32, **settings),
        train_dataset=clients,
        eval_dataset=held_out,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    if KIND == "fsdp2":  # then an evaluation leaves whole copies of the adapter behind
        trainer.accelerator.state.fsdp_plugin.reshard_after_forward = name != "fedsa_lora"
    return trainer


def make_dpo_trainer() -> FederatedDPOTrainer:
    """With a second adapter in the model, which is written in every round."""
    pairs = preferences_of(clients_of(num_clients=2))
    return FederatedDPOTrainer(
        model=MODEL,
        args=make_args(FederatedDPOConfig, "dpo", max_length=48, beta=0.5, reference="round"),
        train_dataset=pairs,
        eval_dataset=pairs["client_0"].select(range(4)),
        peft_config=LoraConfig(**LORA, init_lora_weights=False),
    )


def make_classifier_trainer() -> FederatedTaskTrainer:
    """Of a model that does not look at `num_items_in_batch`, with a bias that two processes cannot share evenly."""
    rows = {
        "input_ids": [[row % 3, 5 + row % 7, 12, 20 + row % 11] for row in range(16)],
        "label": [row % 3 for row in range(16)],
    }
    set_seed(0)
    widths = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    depths = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return FederatedTaskTrainer(
        model=BertForSequenceClassification(BertConfig(**widths, **depths, **dropouts)),
        args=make_args(FederatedTaskConfig, "classifier", max_grad_norm=0.0),
        train_dataset={"client_0": Dataset.from_dict(rows).select(range(8)), "client_1": Dataset.from_dict(rows)},
        eval_dataset=Dataset.from_dict(rows).select(range(4)),
        peft_config=LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
    )


def digest(state: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        sha.update(key.encode() + tensor.float().numpy().tobytes())
    return sha.hexdigest()


def footprint(trainer: FederatedTrainer) -> dict[str, int]:
    """What must not grow: hooks, processes, threads, open files, tensors."""
    PartialState().wait_for_everyone()
    process, looks = psutil.Process(), []
    for _ in range(3):  # the threads of gloo let go of what they have sent a little later
        time.sleep(0.5)
        gc.collect()
        hooks = sum(
            len(hooks)
            for module in trainer.model_wrapped.modules()
            for name, hooks in vars(module).items()
            if name.endswith("_hooks") and isinstance(hooks, dict)
        )
        looks.append(
            {
                "hooks": hooks + sum(len(p._backward_hooks or ()) for p in trainer.model.parameters()),
                "processes": len(process.children(recursive=True)),
                "threads": process.num_threads(),
                "files": process.num_fds(),
                "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
                "resident": process.memory_info().rss,
            }
        )
    return {key: min(look[key] for look in looks) for key in looks[0]}


def one_engine() -> dict[str, Any]:
    """The first local round of the process, many others, and the first one again."""
    trainer = make_trainer("engine")
    start = trainer.federation.state
    names = list(trainer._clients)

    def turn(client: str, state: dict[str, torch.Tensor], seed: int) -> Any:
        return local_round(trainer, state, trainer.client.data.prepared(client), seed)

    fresh, metrics = turn(names[0], start, seed=1)
    state, sizes = fresh, []
    for swap in range(SWAPS):
        state, _ = turn(names[swap % 3], state, seed=swap)
        if swap in (9, SWAPS - 1):
            sizes.append(footprint(trainer))
    again, metrics_again = turn(names[0], start, seed=1)
    return {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "wrapped": type(trainer.model_wrapped).__name__,
        "moved": max(float((fresh[key] - start[key]).abs().max()) for key in start),
        "loss": metrics["train_loss"],
        "loss_again": metrics_again["train_loss"],
        "adapter": digest(fresh),
        "adapter_again": digest(again),
        "sizes": sizes,
    }


def in_bfloat16() -> dict[str, Any]:
    """
    As `one_engine`, with `bf16`, which the arguments refuse without a GPU; what is gathered takes several messages.
    """
    pretended = patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True)
    with pretended, patch("fed_trainer.client.engines.deepspeed.ELEMENTS_PER_MESSAGE", 500):
        trainer = make_trainer("bfloat16", bf16=True)
        start, client = trainer.federation.state, trainer.client.data.prepared("client_0")
        start = {key: tensor + 1e-5 for key, tensor in start.items()}  # which bfloat16 would round away
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("lora_A.default"))
        computed = []
        hook = layer.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
        trainer._live_adapter.write(start)
        before = digest(trainer._live_adapter.read())
        trainer.evaluate()  # builds the engine
        after = digest(trainer._live_adapter.read())
        hook.remove()
        adapters = [
            local_round(trainer, state, client, seed)[0]
            for state, seed in ((start, 1), ({key: 2 * tensor for key, tensor in start.items()}, 2), (start, 1))
        ]
        trainer._live_adapter.write(start)
        report = {
            "computed": str(computed[0]),
            "are_kept": [after == before, digest(trainer._live_adapter.read()) == digest(start)],
            "adapters": [digest(adapter) for adapter in adapters],
            "whole": federation(make_trainer("bfloat16_whole", bf16=True)),
        }
        published = FOLDER / "bfloat16_whole"
        follower = make_trainer("bfloat16_follower", initial_adapter=str(published), peft_config=None, bf16=True)
        report["follows"] = digest(follower.federation.state) == digest(
            load_file(published / "adapter_model.safetensors")
        )
        make_trainer("bfloat16_resumed", callbacks=[Stops()], bf16=True).train()
        report["resumed"] = federation(make_trainer("bfloat16_resumed", bf16=True), resume=True)
    return report


def federation(trainer: FederatedMixin, resume: bool = False) -> dict[str, Any]:
    trainer.train(resume_from_checkpoint=resume)
    record = trainer.record
    # ZeRO-3 holds parts of the base weights between steps, and whole ones here and there; FSDP2 holds parts
    whole = {} if KIND in SPLIT else {key: p.detach() for key, p in trainer.model.named_parameters()}
    return {
        "global": digest(trainer.federation.state),
        "parameters": digest(whole),
        "evaluations": [entry["eval"]["eval_loss"] for entry in (record["start"], *record["rounds"])],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def move_start(trainer: FederatedTrainer) -> None:
    """As on a machine that computes other singular vectors."""
    for layer in trainer.model.modules():
        if isinstance(layer, FederaLayer):
            layer.load_start("default", 0.5 * layer.lora_start_A["default"], layer.lora_start_B["default"])


def fail_in_last_process(trainer: FederatedTrainer, forward: bool) -> None:
    """
    There `client_1` cannot do a forward pass with gradients accumulated; or the collator fails, once, for some client.
    """
    if int(os.environ.get("RANK", 0)) + 1 != trainer.accelerator.num_processes:
        return
    turn = {"client": "", "passes": 0, "batches": 0}
    client_turn, collator = trainer.client.turn, trainer.data_collator

    def remembered(packet: Packet) -> Packet:
        turn.update(client=packet.meta["client"], passes=0)
        return client_turn(packet)

    def before_forward(module: torch.nn.Module, inputs: Any) -> None:
        turn["passes"] += module.training
        if module.training and turn["client"] == "client_1" and turn["passes"] == 2:
            raise RuntimeError("no memory")

    def collate(rows: Any) -> Any:
        turn["batches"] += trainer.is_in_train
        if turn["batches"] == 6:
            turn["batches"] += 1
            raise OSError("no file")
        return collator(rows)

    trainer.client.turn = remembered
    if forward:
        trainer.model.get_base_model().register_forward_pre_hook(before_forward)
    else:
        trainer.data_collator = collate


def clients_that_fail() -> dict[str, Any]:
    """Failures of one process, which all learn of, beside the same federation without them."""
    short = {"gradient_accumulation_steps": 2, "num_rounds": 1, "per_device_train_batch_size": 1}
    retried = make_trainer("retried", client_retries=1, **short)
    fail_in_last_process(retried, forward=False)
    report: dict[str, Any] = {"retried": federation(retried), "healthy": federation(make_trainer("healthy", **short))}
    if KIND not in SPLIT:
        left_out = make_trainer("left_out", **short)
        fail_in_last_process(left_out, forward=True)
        report["left_out"] = federation(left_out)
        report["without"] = federation(make_trainer("without", leaves_out_client_1=True, **short))
        report["reasons"] = left_out.record["rounds"][0]["refused"]
    hurried = make_trainer("hurried", client_timeout=100.0, **short)
    seconds_per_look = 1000 if os.environ.get("RANK", "0") == "0" else 0
    with patch("fed_trainer.client.engine.time.perf_counter", itertools.count(step=seconds_per_look).__next__):
        try:
            hurried.train()
        except TooFewClientsError as error:
            report["hurried"] = str(error)
    return report


def all_methods() -> dict[str, Any]:
    report = {}
    if KIND not in SPLIT:  # refused there
        report["fedex_lora"] = federation(make_trainer("fedex_lora", aggregation="fedex_lora"))
    if KIND in ("cpu", "ddp"):
        kept = {"keep_optimizer_state": True}
        report["kept_optimizers"] = federation(make_trainer("kept_optimizers", **kept))
        make_trainer("kept_and_resumed", callbacks=[Stops()], **kept).train()
        report["kept_and_resumed"] = federation(make_trainer("kept_and_resumed", **kept), resume=True)
    if KIND in ("cpu", "zero3"):
        federa = {"peft_config": FederaConfig(**LORA)}
        make_trainer("federa", callbacks=[Stops()], **federa).train()
        resumed = make_trainer("federa", **federa)
        if KIND != "cpu":
            move_start(resumed)
        report["federa"] = federation(resumed, resume=True)
    if KIND != "fsdp2":
        report["dpo"] = federation(make_dpo_trainer())
        report["classifier"] = federation(make_classifier_trainer())
    return report


def main() -> None:
    if KIND == "fsdp2":
        pretend_that_accelerate_found_gpus()
    report = {"engine": one_engine(), "fedavg": federation(make_trainer("fedavg"))}
    report["fedsa_lora"] = federation(make_trainer("fedsa_lora", aggregation="fedsa_lora", evaluates_clients=True))
    make_trainer("resumed", callbacks=[Stops()]).train()
    report["resumed"] = federation(make_trainer("resumed"), resume=True)
    if SCOPE == "whole" or KIND == "ddp":
        report["failing"] = clients_that_fail()
    if SCOPE == "whole":
        report |= all_methods()
        if KIND not in ("cpu", "ddp"):
            report["bfloat16"] = in_bfloat16()
    (FOLDER / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
