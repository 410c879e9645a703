# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from datasets import DatasetDict
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from fed_trainer import FederatedTrainer, read_record
from fed_trainer.federation.sampling import client_seed
from helpers.comparison import same, weights_in
from helpers.runs import Dies, Stops
from helpers.trainers import QUICK_TEXT
from peft_scl import FederaConfig, SclConfig, load_federa


LOCAL = {**QUICK_TEXT, "max_steps": 3}
SCL = {"r": 4, "task_type": "CAUSAL_LM"}

pytestmark = pytest.mark.trainer(adapter=SclConfig(**SCL), eval_rows=8, **LOCAL)


@pytest.mark.fast("peft_config0")
@pytest.mark.parametrize("peft_config", [SclConfig(**SCL), LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM")])
def test_rounds_equal_fresh_trl_trainers_averaged_in_float64(
    make_trainer, make_clients, tiny_model_dir, tmp_path, peft_config
):
    """The kept model and optimiser against a new model and `SFTTrainer` per client and round, averaged densely."""
    clients = make_clients(num_clients=3)
    clients["client_1"] = clients["client_1"].select(range(6))  # unequal weights
    trainer = make_trainer(clients=clients, peft_config=peft_config, num_rounds=2, round_lr_scheduler_type="linear")
    state = {key: tensor.clone() for key, tensor in trainer.federation.state.items()}
    trainer.train()

    for round in (1, 2):
        mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
        total = sum(len(rows) for rows in clients.values())
        for name, rows in clients.items():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), peft_config)
            config = {**LOCAL, "learning_rate": 1e-2 * (1 if round == 1 else 0.5), "lr_scheduler_type": "constant"}
            local = SFTTrainer(
                model=model,
                args=SFTConfig(
                    output_dir=str(tmp_path / "local"), bf16=False, save_strategy="no", logging_strategy="no", **config
                ),
                train_dataset=rows,
            )
            set_peft_model_state_dict(local.model, {key: tensor.clone() for key, tensor in state.items()})
            set_seed(client_seed(42, round, name))
            local.train()
            trained = get_peft_model_state_dict(local.model)
            for key in mean:  # all but the frozen start of a compression
                mean[key] += len(rows) / total * trained[key].double()
        state = {key: tensor.float() for key, tensor in mean.items()}
        saved = weights_in(tmp_path / "out" / f"checkpoint-{round}")
        for key, tensor in state.items():
            torch.testing.assert_close(saved[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_one_client_with_one_round_is_plain_fine_tuning(make_trainer, make_clients, tmp_path):
    trainer = make_trainer(clients=make_clients(num_clients=1), num_rounds=1)
    before = trainer.federation.state
    trainer.train()
    after = weights_in(tmp_path / "out")
    assert not same(before, after)
    assert trainer.record["rounds"][0]["clients"]["client_0"]["num_steps"] == LOCAL["max_steps"]


def test_same_seed_gives_the_same_adapter_and_another_seed_another(make_trainer, tmp_path):
    make_trainer("a", clients_per_round=2, peft_config=SclConfig(**SCL, scl_dropout=0.1)).train()
    make_trainer("b", clients_per_round=2, peft_config=SclConfig(**SCL, scl_dropout=0.1)).train()
    make_trainer("c", clients_per_round=2, peft_config=SclConfig(**SCL, scl_dropout=0.1), seed=1).train()
    assert same(weights_in(tmp_path / "a"), weights_in(tmp_path / "b"))
    assert not same(weights_in(tmp_path / "a"), weights_in(tmp_path / "c"))


def test_data_seed_changes_the_order_and_every_round_has_another(make_trainer, make_clients):
    batches = []

    def run(output, **settings):
        trainer = make_trainer(output, clients=make_clients(num_clients=1), eval_rows=0, **settings)
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **kwargs: (
            batches.append(inputs["input_ids"].flatten().tolist()) or compute_loss(model, inputs, **kwargs)
        )
        trainer.train()

    run("a", data_seed=1)
    first = batches[:6]
    batches.clear()
    run("b", data_seed=2)
    assert first != batches
    assert first[:3] != first[3:], "the two rounds saw the same batches"


def test_a_run_that_died_resumes_to_the_same_adapter_and_record(make_trainer, tmp_path):
    whole = make_trainer("whole", num_rounds=4, clients_per_round=2, round_lr_scheduler_type="cosine")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            "died", num_rounds=4, clients_per_round=2, round_lr_scheduler_type="cosine", callbacks=[Dies("on_save")]
        ).train()
    assert not (tmp_path / "died" / "adapter_model.safetensors").exists()
    again = make_trainer("died", num_rounds=4, clients_per_round=2, round_lr_scheduler_type="cosine")
    again.train(resume_from_checkpoint=True)

    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    steps = [
        [entry["step"] for entry in t.state.log_history if "seconds_checkpoint" not in entry] for t in (whole, again)
    ]
    assert steps[0] == steps[1]
    losses = [[entry["train_loss"] for entry in t.record["rounds"]] for t in (whole, again)]
    assert losses[0] == losses[1]
    assert [entry["eval"]["eval_loss"] for entry in whole.record["rounds"]] == [
        entry["eval"]["eval_loss"] for entry in again.record["rounds"]
    ]


def test_resuming_refuses_another_run_and_leaves_it_alone(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 42 there, 7 here\)"):
        make_trainer(num_rounds=2, seed=7).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="does not fit|belongs to another run"):
        make_trainer(num_rounds=2, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM")).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(FileExistsError, match=r"already holds a run \(checkpoint-1\)"):
        make_trainer(num_rounds=1).train()
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.fast("False")
@pytest.mark.parametrize("keep_base", [False, True])
def test_federa_resumes_exactly_and_ends_as_a_plain_lora(make_trainer, tiny_model_dir, tmp_path, keep_base):
    def make(output, num_rounds):
        config = FederaConfig(r=4, target_modules=["q_proj", "down_proj"], keep_base=keep_base, task_type="CAUSAL_LM")
        return make_trainer(output, num_rounds=num_rounds, peft_config=config)

    whole = make("whole", 3)
    whole.train()
    make("parts", 1).train()
    parts = make("parts", 3)
    parts.train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "parts"))
    assert same(whole.model.state_dict(), parts.model.state_dict())
    # clients and server exchange factors of rank 4; what is saved has their start beside them
    sent = sum(tensor.numel() * tensor.element_size() for tensor in whole.federation.state.values())
    assert whole.record["rounds"][0]["bytes_up"] == 3 * (sent + 8)
    assert sum(tensor.numel() for tensor in weights_in(tmp_path / "whole").values()) * 4 == 2 * sent

    loss = whole.evaluate()["eval_loss"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = PeftModel.from_pretrained(base, tmp_path / "whole")
    assert type(plain.peft_config["default"]) is LoraConfig
    whole.model.eval(), plain.eval()
    tokens = torch.arange(4, 20).unsqueeze(0)
    torch.testing.assert_close(plain(tokens).logits, whole.model(tokens).logits, rtol=1e-4, atol=1e-5)
    again = load_federa(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "whole")
    assert torch.equal(again.eval()(tokens).logits, whole.model(tokens).logits)
    assert "FeDeRA ([arXiv 2404.18848]" in (tmp_path / "whole" / "README.md").read_text()

    continued = make_trainer("continued", initial_adapter=str(tmp_path / "whole"))  # as the LoRA it was saved as
    assert continued.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_more_rounds_can_be_added_to_a_finished_run(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    make_trainer(num_rounds=2).train(resume_from_checkpoint=True)
    make_trainer("whole", num_rounds=2).train()
    assert same(weights_in(tmp_path / "out"), weights_in(tmp_path / "whole"))


def test_the_live_model_is_the_global_adapter_when_it_is_evaluated_and_afterwards(
    make_trainer, tmp_path, tiny_model_dir
):
    trainer = make_trainer(num_rounds=1)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == trainer.record["rounds"][0]["eval"]["eval_loss"]

    fresh = make_trainer("fresh", initial_adapter=str(tmp_path / "out"), model=str(tiny_model_dir))
    assert fresh.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)
    assert same(fresh._live_adapter.read(include_frozen=True), weights_in(tmp_path / "out"))


def test_a_client_does_not_evaluate_save_or_report(make_trainer, tmp_path):
    class Events(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.seen.append("train_begin")

        def on_evaluate(self, args, state, control, **kwargs):
            self.seen.append(f"evaluate {state.global_step}")

        def on_save(self, args, state, control, **kwargs):
            self.seen.append(f"save {state.global_step}")

        def on_log(self, args, state, control, logs, **kwargs):
            kind = next(key for key in ("loss", "eval_loss", "seconds_checkpoint") if key in logs)
            self.seen.append(f"log {state.global_step} {kind}")

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append("step")

        def on_train_end(self, args, state, control, **kwargs):
            self.seen.append("train_end")

    events = Events()
    make_trainer(callbacks=[events], eval_rounds=2, save_strategy="steps", save_steps=1, logging_steps=1).train()
    steps = ["step"] * 9
    assert events.seen == [
        "train_begin",
        "log 0 eval_loss",
        "evaluate 0",
        *steps,
        "log 1 loss",
        "save 1",
        "log 1 seconds_checkpoint",
        *steps,
        "log 2 eval_loss",
        "evaluate 2",
        "log 2 loss",
        "save 2",
        "log 2 seconds_checkpoint",
        "train_end",
    ]
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_early_stopping_ends_the_federation(make_trainer):
    trainer = make_trainer(num_rounds=3, callbacks=[Stops("on_evaluate")])
    assert trainer.train().global_step == 1


def test_record_log_history_and_table(make_trainer, tmp_path, capsys):
    trainer = make_trainer(
        clients_per_round=2, label_column="topic", partition="by hand", disable_tqdm=False, save_total_limit=1
    )
    output = trainer.train()
    record = read_record(tmp_path / "out")
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.federation.state.values())
    assert record["num_trainable_parameters"] * 4 == size
    for entry in record["rounds"]:
        assert list(entry["clients"]) == trainer.sampler.sample(entry["round"])
        assert entry["bytes_up"] == 2 * (size + 8)  # and the number of examples
        assert entry["bytes_down"] == 2 * size
        weights = {name: client["num_examples"] for name, client in entry["clients"].items()}
        mean = sum(weights[n] * entry["clients"][n]["train_loss"] for n in weights) / sum(weights.values())
        assert entry["train_loss"] == pytest.approx(mean)
        assert {"prepare", "local", "aggregate", "evaluate", "checkpoint"} <= entry["seconds"].keys() | {"checkpoint"}
    assert record["clients"]["client_0"]["composition"] is not None
    assert record["partition"] == "by hand"
    assert output.metrics["bytes_up"] == 4 * (size + 8)
    logged = [entry for entry in trainer.state.log_history if "bytes_up" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    shown = capsys.readouterr()
    assert "round 1/2" in shown.out + shown.err
    assert "train loss" in shown.out


def test_engine_and_model_are_built_once(make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=3)
    created = []
    original = trainer.create_optimizer
    monkeypatch.setattr(trainer, "create_optimizer", lambda *a: created.append(1) or original(*a))
    trainer.train()
    assert len(created) == 1
    assert len(trainer.accelerator._models) <= 1
    assert len(trainer.accelerator._dataloaders) <= 3


def test_modules_to_save_travel_with_the_adapter(make_trainer, tmp_path):
    config = SclConfig(**SCL, modules_to_save=["norm"])
    trainer = make_trainer(peft_config=config, num_rounds=1)
    start = {key: tensor for key, tensor in trainer.federation.state.items() if "norm" in key}
    assert start
    trainer.train()
    saved = weights_in(tmp_path / "out")
    assert all(not torch.equal(saved[key], tensor) for key, tensor in start.items())


def test_a_peft_model_is_taken_as_it_is(make_trainer, tiny_model_dir, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    make_trainer(model=model, num_rounds=1).train()
    assert read_record(tmp_path / "out")["peft_type"] == "LORA"


def test_refusals_before_training(make_trainer, make_clients):
    clients = make_clients(num_clients=2)
    with pytest.raises(ValueError, match="Client 'client_1' has no examples"):
        make_trainer(clients={**clients, "client_1": clients["client_1"].select([])})
    with pytest.raises(ValueError, match="has 3 examples, fewer than one local batch of 4"):
        make_trainer(clients={**clients, "client_1": clients["client_1"].select(range(3))})
    with pytest.raises(ValueError, match="`clients_per_round` is 5.*only 2 clients"):
        make_trainer(clients=clients, clients_per_round=5)
    with pytest.raises(ValueError, match=r"has the columns \['answer', 'prompt', 'topic'\], none of the formats"):
        make_trainer(clients={name: rows.rename_column("completion", "answer") for name, rows in clients.items()})
    with pytest.raises(ValueError, match="`label_column` is 'colour'"):
        make_trainer(clients=clients, label_column="colour")


def test_parameters_outside_the_adapter_may_not_be_trained(make_trainer, tiny_model_dir):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trainable but not part of the adapter"):
        make_trainer(model=model)


def test_an_adapter_of_another_base_is_refused(make_trainer, tiny_model_dir, tmp_path):
    make_trainer(num_rounds=1).train()
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base model"):
        make_trainer("b", model=other, initial_adapter=str(tmp_path / "out"))
    other.config.intermediate_size = 48
    narrow = AutoModelForCausalLM.from_config(other.config)
    with pytest.raises(ValueError, match="has the shape .* It belongs to another base model"):
        make_trainer("c", model=narrow, initial_adapter=str(tmp_path / "out"))


def test_an_initial_adapter_brings_its_own_config(make_trainer, tmp_path):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match="brings its own PEFT config"):
        make_trainer("b", initial_adapter=str(tmp_path / "out"), peft_config=SclConfig(**SCL))


def test_gradient_checkpointing_changes_nothing_and_hooks_do_not_pile_up(make_trainer, tmp_path):
    def hooks(trainer):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())

    make_trainer("plain", num_rounds=1).train()
    trainer = make_trainer("checkpointed", num_rounds=1, gradient_checkpointing=True)
    trainer.train()
    after_one = hooks(trainer)
    for key, tensor in weights_in(tmp_path / "plain").items():
        torch.testing.assert_close(weights_in(tmp_path / "checkpointed")[key], tensor, rtol=1e-4, atol=1e-6)
    longer = make_trainer("longer", num_rounds=4, gradient_checkpointing=True)
    longer.train()
    assert hooks(longer) == after_one


def test_resuming_from_further_back_does_not_mix_with_later_rounds(make_trainer, tmp_path):
    make_trainer(num_rounds=3).train()
    with pytest.raises(ValueError, match=r"holds later rounds too \(checkpoint-2, checkpoint-3\)"):
        make_trainer(num_rounds=3).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    make_trainer("other", num_rounds=3).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert same(weights_in(tmp_path / "other"), weights_in(tmp_path / "out"))


def test_a_stopped_run_leaves_its_last_round(make_trainer, tmp_path):
    make_trainer(num_rounds=4, save_rounds=3, callbacks=[Stops()]).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_no_local_path_is_written_into_the_record_or_the_card(make_trainer, tmp_path, tiny_model_dir):
    make_trainer(num_rounds=1).train()
    for name in ("federation.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert tiny_model_dir.name in text
        assert str(tiny_model_dir.parent) not in text


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"peft_config": SclConfig(**SCL, activation="gelu")}, "activation: 'linear' there, 'gelu' here"),
        ({"learning_rate": 1e-5}, "learning_rate: 0.01 there, 1e-05 here"),
        ({"max_steps": 1}, "max_steps: 3 there, 1 here"),
    ],
)
def test_resuming_with_another_adapter_or_budget_is_refused(make_trainer, change, difference):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match=difference):
        make_trainer(num_rounds=2, **change).train(resume_from_checkpoint=True)


def test_weights_count_the_examples_that_were_trained_on(make_trainer, make_clients):
    clients = make_clients(num_clients=2, rows=12)
    rows = clients["client_1"].to_list()
    rows[:4] = [{**row, "prompt": row["prompt"] * 20} for row in rows[:4]]  # no room for the completion
    trainer = make_trainer(clients={**clients, "client_1": type(clients["client_1"]).from_list(rows)}, num_rounds=1)
    trainer.train()
    counts = {name: client["num_examples"] for name, client in trainer.record["rounds"][0]["clients"].items()}
    assert counts == {"client_0": 12, "client_1": 8}


def test_a_callback_cannot_make_a_client_save(make_trainer, tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_log = control.should_evaluate = True

    make_trainer(num_rounds=1, callbacks=[Saves()]).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_more_refusals(make_trainer, make_clients, tiny_model_dir, tmp_path):
    frozen = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), SclConfig(**SCL, inference_mode=True)
    )
    with pytest.raises(ValueError, match="Nothing is trainable in the `PeftModel`"):
        make_trainer(model=frozen)
    with pytest.raises(ValueError, match="is a `DatasetDict` with the splits"):
        make_trainer(clients=DatasetDict(make_clients(num_clients=2)))
    with pytest.raises(ValueError, match="`EarlyStoppingCallback` follows evaluations"):
        make_trainer(callbacks=[EarlyStoppingCallback()])
    with pytest.raises(ValueError, match="`round_lr_scheduler_type` should be one of .* is 'cosin'"):
        make_trainer(round_lr_scheduler_type="cosin")
    with pytest.raises(ValueError, match="neither a folder here nor a Hub id"):
        make_trainer(initial_adapter=str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="should be a `FederatedConfig` but is a SFTConfig"):
        FederatedTrainer(
            str(tiny_model_dir), SFTConfig(use_cpu=True, bf16=False), make_clients(), None, SclConfig(**SCL)
        )


def test_an_unfinished_run_without_a_checkpoint_is_not_overwritten(make_trainer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(num_rounds=4, save_rounds=3, callbacks=[Dies()]).train()
    with pytest.raises(FileExistsError, match=r"already holds a run \(federation.json\).* Continue it"):
        make_trainer(num_rounds=4, save_rounds=3).train()
    again = make_trainer(num_rounds=4, save_rounds=3)
    again.train(resume_from_checkpoint=True)
    make_trainer("whole", num_rounds=4, save_rounds=3).train()
    assert len(again.record["rounds"]) == 4
    assert same(weights_in(tmp_path / "out"), weights_in(tmp_path / "whole"))
