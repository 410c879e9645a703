# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federated DPO: the reference policy over rounds, against losses computed by hand, and the stock trainer."""

import copy
import shutil
from functools import partial

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

from fed_trainer import FederatedConfig, FederatedDPOConfig, FederatedDPOTrainer, FederatedTrainer
from fed_trainer.federation.sampling import client_seed
from helpers.comparison import same, weights_in
from helpers.data import preferences_of
from helpers.local_rounds import local_round
from helpers.runs import Dies
from helpers.trainers import QUICK_TEXT
from helpers.transports import OverBytes
from peft_scl import FederaConfig, SclConfig


LOCAL = {**QUICK_TEXT, "max_length": 48, "beta": 0.5}
TINY = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
REFERENCES = ["initial", "base", "round"]
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(**LORA, lora_dropout=0.1, init_lora_weights=False),  # no start at zero, that of B
    "scl": SclConfig(r=4, variant="compress", task_type="CAUSAL_LM"),
    "federa": FederaConfig(**LORA, keep_base=True),
    "federa, residual": FederaConfig(**LORA),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def clients(make_clients):
    return preferences_of(make_clients(num_clients=2))


@pytest.fixture(scope="module")
def sft_adapter(make_clients, tiny_model_dir, tmp_path_factory):
    """A LoRA that does something, to start from."""
    folder = tmp_path_factory.mktemp("sft")
    local = {key: value for key, value in LOCAL.items() if key != "beta"}
    FederatedTrainer(
        model=str(tiny_model_dir),
        args=FederatedConfig(output_dir=str(folder), num_rounds=1, **local),
        train_dataset=make_clients(num_clients=2),
        peft_config=LoraConfig(**LORA),
    ).train()
    return folder


@pytest.fixture
def make_trainer(make_trainer, clients):
    return partial(make_trainer, kind="dpo", adapter=None, clients=clients, **LOCAL)


def log_probs(model, inputs):
    """Of each completion, from plain logits: `(2 * batch,)`."""
    tokens = inputs["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=inputs["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (each * inputs["completion_mask"][:, 1:]).sum(-1)


def dpo_loss(folder, inputs, policy, reference):
    """By the formula, in float64; `None` is the model without an adapter."""
    rewards = []
    for state in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if state is not None:
            model = get_peft_model(model, LoraConfig(**LORA))
            set_peft_model_state_dict(model, state)
        rewards.append(log_probs(model.double().eval(), inputs))
    chosen, rejected = (rewards[0] - rewards[1]).chunk(2)
    return -logsigmoid(LOCAL["beta"] * (chosen - rejected)).mean().item()


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_loss_of_every_step_and_evaluation_compares_with_the_reference(
    make_trainer, clients, sft_adapter, tiny_model_dir, tmp_path, reference
):
    seen = []
    held_out = clients["client_0"].select(range(4))
    trainer = make_trainer(
        initial_adapter=str(sft_adapter), reference=reference, max_steps=1, eval_dataset=held_out, num_rounds=3
    )
    compute_loss = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        policy = trainer._live_adapter.read(include_frozen=True)
        inputs = {key: value.clone() for key, value in inputs.items()}
        loss = compute_loss(model, inputs, **kwargs)
        seen.append((trainer.model.training, inputs, policy, loss.item()))
        return loss

    trainer.compute_loss = spy
    trainer.train()

    starts = [
        weights_in(sft_adapter),
        weights_in(tmp_path / "out" / "checkpoint-1"),
        weights_in(tmp_path / "out" / "checkpoint-2"),
    ]
    # the evaluation at the start, then two clients and an evaluation per round
    assert [training for training, *_ in seen] == [False] + 3 * [True, True, False]
    for place, (_, inputs, policy, loss) in enumerate(seen):
        round_start = starts[max(place - 1, 0) // 3]
        expected = {"initial": starts[0], "base": None, "round": round_start}[reference]
        assert loss == pytest.approx(dpo_loss(tiny_model_dir, inputs, policy, expected), rel=2e-5)
    if reference == "base":
        assert seen[0][3] != pytest.approx(0.6931, abs=1e-3)  # the adapter that it starts from is not the base
    else:
        assert seen[0][3] == pytest.approx(0.693147, abs=1e-5)
    evaluation = trainer.record["rounds"][-1]["eval"]
    assert evaluation["eval_loss"] == pytest.approx(seen[-1][3], rel=1e-6)
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= evaluation.keys()


@pytest.mark.fast("lora-initial", "scl-base")
@pytest.mark.parametrize("reference", ["initial", "base"])
@pytest.mark.parametrize("kind", ["lora", "scl"])
def test_the_first_local_round_is_the_stock_trainer_bit_for_bit(
    make_trainer, clients, tiny_model_dir, tmp_path, kind, reference
):
    config = ADAPTERS[kind]
    one = {"client_0": clients["client_0"]}
    trainer = make_trainer(peft_config=config, clients=one, reference=reference, num_rounds=1)
    seed = client_seed(42, 1, "client_0")
    prepared = trainer.client.data.prepared("client_0")
    start = trainer._live_adapter.read(include_frozen=True)
    local, metrics = local_round(trainer, trainer.federation.state, prepared, seed=seed)

    args = DPOConfig(
        output_dir=str(tmp_path / "stock"), bf16=False, save_strategy="no", lr_scheduler_type="constant", **LOCAL
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if reference == "initial":
        model, config = get_peft_model(model, config), None  # of a `PeftModel` the stock trainer makes a copy
    stock = DPOTrainer(model=model, args=args, train_dataset=one["client_0"], peft_config=config)
    set_peft_model_state_dict(stock.model, start)
    if reference == "initial":
        set_peft_model_state_dict(stock.model, start, adapter_name="ref")
    set_seed(seed)
    assert stock.train().training_loss == metrics["train_loss"]
    after = get_peft_model_state_dict(stock.model)
    assert all(torch.equal(local[key], after[key]) for key in local)
    assert not same(local, trainer.federation.state)

    trainer.train()
    for key, tensor in weights_in(tmp_path / "out").items():
        torch.testing.assert_close(tensor, after[key], rtol=1e-6, atol=1e-8)


@pytest.mark.fast("lora-initial", "federa, residual-base", "lora-round")
@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        *(("lora", reference) for reference in REFERENCES),
        *((kind, "initial") for kind in ("scl", "federa", "pissa", "prompt")),
        *((kind, "base") for kind in ("scl", "federa, residual", "prompt")),
    ],
)
def test_a_run_that_died_resumes_to_the_same_adapter_and_reference(make_trainer, tmp_path, kind, reference):
    settings = {"peft_config": ADAPTERS[kind], "reference": reference, "num_rounds": 3}
    whole = make_trainer("whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", callbacks=[Dies()], **settings).train()
    again = make_trainer("died", **settings)
    again.train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    assert [entry["train_loss"] for entry in whole.record["rounds"]] == [
        entry["train_loss"] for entry in again.record["rounds"]
    ]
    if reference != "base":
        assert same(whole._reference.read(include_frozen=True), again._reference.read(include_frozen=True))


@pytest.mark.fast("round")
@pytest.mark.parametrize("reference", REFERENCES)
def test_a_finished_run_is_evaluated_as_it_was_after_it_is_resumed(make_trainer, clients, reference):
    settings = {"peft_config": ADAPTERS["lora"], "reference": reference, "eval_dataset": clients["client_0"]}
    make_trainer(**settings).train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.evaluate()["eval_loss"] == again.record["rounds"][-1]["eval"]["eval_loss"]


def test_a_second_run_of_a_trainer_starts_with_the_adapter_it_starts_from_as_reference(
    make_trainer, clients, tmp_path
):
    trainer = make_trainer(
        peft_config=ADAPTERS["lora"], reference="round", eval_dataset=clients["client_0"], num_rounds=1
    )
    trainer.train()
    shutil.rmtree(tmp_path / "out")
    trainer.train()
    assert trainer.record["start"]["eval"]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_resuming_takes_the_initial_reference_from_the_checkpoint(make_trainer, clients, tiny_model_dir, tmp_path):
    def model(seed):
        torch.manual_seed(seed)
        config = LoraConfig(**LORA, init_lora_weights=False)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)

    first = make_trainer(model=model(0), num_rounds=1)
    start = first._live_adapter.read()
    first.train()
    assert same(first._reference.read(), start)
    again = make_trainer(model=model(1), num_rounds=2)
    assert not same(again._reference.read(), start)
    again.train(resume_from_checkpoint=True)
    assert same(again._reference.read(), start)
    with pytest.raises(ValueError, match="reference: 'initial' there, 'base' here"):
        make_trainer(model=model(0), reference="base", num_rounds=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_reference_is_neither_trained_nor_sent_nor_published(
    make_trainer, sft_adapter, tiny_model_dir, tmp_path, reference
):
    trainer = make_trainer(initial_adapter=str(sft_adapter), reference=reference, num_rounds=1)
    trainer.train()
    sizes = [tensor.numel() for tensor in weights_in(sft_adapter).values()]
    assert trainer.record["num_trainable_parameters"] == sum(sizes)
    assert trainer.record["rounds"][0]["bytes_up"] == 2 * (4 * sum(sizes) + 8)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(sizes) and all(".default." in name for name in trained)
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir() if path.name != "checkpoint-1")
    published = weights_in(tmp_path / "out")
    assert published.keys() == weights_in(sft_adapter).keys() and not same(published, weights_in(sft_adapter))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "out")
    tokens = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_a_client_does_not_train_stays_as_it_is(make_trainer, reference):
    """PEFT switches adapters by making them trainable, which must not thaw what is frozen in this round."""
    trainer = make_trainer(peft_config=ADAPTERS["lora"], reference=reference)
    start = trainer.federation.state
    trained = {key for key in start if ".lora_A." in key}
    rows = trainer.client.data.prepared("client_0")
    local, _ = local_round(trainer, start, rows, seed=0, trained=trained)
    assert {key for key in start if not torch.equal(local[key], start[key])} == trained


@pytest.mark.fast("round")
@pytest.mark.parametrize("reference", REFERENCES)
def test_gradient_checkpointing_changes_nothing(make_trainer, tmp_path, reference):
    for checkpointing in (False, True):
        make_trainer(
            f"{checkpointing}",
            peft_config=LoraConfig(**LORA),
            reference=reference,
            aggregation="ffa_lora",
            gradient_checkpointing=checkpointing,
        ).train()
    without, with_checkpointing = (weights_in(tmp_path / name) for name in ("False", "True"))
    for key in without:
        torch.testing.assert_close(with_checkpointing[key], without[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [{}, {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}}])
def test_the_reference_of_a_round_is_what_a_client_was_sent(make_trainer, objective):
    """It asks no server for it: there is none in its turn."""
    settings = {"peft_config": ADAPTERS["lora"], "reference": "round", "num_rounds": 2, **objective}
    plain, remote = (make_trainer(output, **settings) for output in ("plain", "remote"))
    remote.federation.transport = OverBytes(remote)
    plain.train()
    remote.train()
    assert same(plain.federation.state, remote.federation.state)
    assert same(plain._reference.read(), remote._reference.read())
    for ours, theirs in zip(plain.record["rounds"], remote.record["rounds"], strict=True):
        assert ours["train_loss"] == theirs["train_loss"]


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_tensors_that_clients_keep_and_a_local_objective(make_trainer, clients, tmp_path, reference):
    trainer = make_trainer(
        peft_config=LoraConfig(**LORA),
        reference=reference,
        aggregation="fedsa_lora",
        local_objective="fedprox",
        local_objective_kwargs={"mu": 0.1},
        eval_dataset={name: rows.select(range(4)) for name, rows in clients.items()},
    )
    trainer.train()
    losses = [list(entry["client_eval"].values()) for entry in trainer.record["rounds"]]
    assert losses[1][0]["eval_loss"] < 0.6931 and losses[1][0] != losses[1][1]


def test_precomputed_references_of_the_base_model_are_those_of_every_step(make_trainer, clients):
    held_out = clients["client_1"].select(range(4))
    runs = []
    for precompute in (False, True):
        trainer = make_trainer(
            f"{precompute}",
            peft_config=LoraConfig(**LORA),
            reference="base",
            precompute_ref_log_probs=precompute,
            eval_dataset=held_out,
        )
        trainer.train()
        runs.append([value for r in trainer.record["rounds"] for value in (r["train_loss"], r["eval"]["eval_loss"])])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_precomputed_references_are_without_dropout(make_trainer, clients, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.5)
    modes = []
    settings = {"reference": "base", "precompute_ref_log_probs": True, "disable_dropout": False, "num_rounds": 1}
    trainer = make_trainer(model=model, peft_config=LoraConfig(**LORA), **settings)
    prepare = trainer._prepare_client_dataset

    def spy(*args):
        modes.append([module.training for module in trainer.model.modules()])
        prepared = prepare(*args)
        modes.append([module.training for module in trainer.model.modules()])
        return prepared

    trainer._prepare_client_dataset = spy
    trainer.train()
    assert len(modes) == 2 and modes[0] == modes[1] and all(modes[0])  # the second client, after the first has trained
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for client in clients:
        rows = list(trainer.client.data.prepared(client))
        found = [torch.tensor([row[f"ref_{answer}_logps"] for row in rows]) for answer in ("chosen", "rejected")]
        torch.testing.assert_close(
            torch.cat(found), log_probs(base, trainer.data_collator(rows)), rtol=1e-5, atol=1e-4
        )


def test_references_are_not_precomputed_by_several_processes(clients, tiny_model_dir, tmp_path, monkeypatch):
    args = FederatedDPOConfig(output_dir=str(tmp_path), reference="base", precompute_ref_log_probs=True, **LOCAL)
    monkeypatch.setattr(args.distributed_state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(NotImplementedError, match="under MULTI_CPU: .* Leave it off"):
        FederatedDPOTrainer(str(tiny_model_dir), args, clients, peft_config=LoraConfig(**LORA))


def test_a_whole_model_is_compared_with_the_one_that_was_loaded(make_trainer, tiny_model_dir, tmp_path):
    trainer = make_trainer(learning_rate=1e-3)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert same(trainer.ref_model.state_dict(), base.state_dict())
    assert not same(trainer.model.state_dict(), base.state_dict())
    again = make_trainer("given", ref_model=base, learning_rate=1e-3)
    again.train()
    assert same(again.model.state_dict(), trainer.model.state_dict())


def test_a_whole_model_is_resumed_with_the_same_reference_only(make_trainer, tiny_model_dir):
    make_trainer(num_rounds=1, learning_rate=1e-3).train()
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    other.lm_head.weight.data *= 1.1
    with pytest.raises(ValueError, match="Resume with the `ref_model` that the run was started with"):
        make_trainer(ref_model=other, learning_rate=1e-3).train(resume_from_checkpoint=True)
    same_again = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    again = make_trainer(ref_model=same_again, learning_rate=1e-3)
    again.train(resume_from_checkpoint=True)
    assert len(again.record["rounds"]) == 2


def test_messages_and_texts_without_a_prompt(make_trainer, clients):
    def messages(row):
        chosen, rejected = ([{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected"))
        return {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": chosen, "rejected": rejected}

    def whole(row):
        return {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}

    for name, convert, removed in (("messages", messages, []), ("whole", whole, ["prompt"])):
        data = {client: rows.map(convert, remove_columns=removed) for client, rows in clients.items()}
        trainer = make_trainer(name, clients=data, peft_config=LoraConfig(**LORA), num_rounds=1)
        trainer.train()
        assert trainer.record["rounds"][0]["clients"].keys() == clients.keys()


NO_REFERENCE = [
    ({"aggregation": "fedex_lora"}, "'fedex_lora'` changes the base weights"),
    ({"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1}}, "'slora'` changes the base weights"),
    *(
        ({"peft_config": LoraConfig(**LORA, bias=bias), "reference": reference}, f"`bias='{bias}'` trains biases")
        for bias in ("all", "lora_only")
        for reference in REFERENCES
    ),
    ({"peft_config": ADAPTERS["pissa"], "reference": "base"}, "'initial'`, which is the same policy"),
    ({"peft_config": ADAPTERS["federa, residual"]}, "Set `keep_base=True`"),
    ({"peft_config": None, "reference": "round"}, "a model without one is trained"),
    (
        {"ref_model": LlamaForCausalLM(TINY)},
        "`ref_model` is the reference of a model that is trained without an adapter",
    ),
]


@pytest.mark.parametrize(("settings", "message"), NO_REFERENCE)
def test_what_has_no_reference_is_refused_before_a_model_is_loaded(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"model": "there/is-none", "peft_config": LoraConfig(**LORA), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "policy"}, "`reference` should be one of .* but the value passed is 'policy'"),
        ({"sync_ref_model": True}, "Set `reference='round'`"),
        ({"precompute_ref_log_probs": True}, "Set `reference='base'`"),
        ({"precompute_ref_log_probs": True, "reference": "round"}, "but `reference` is 'round'"),
        ({"aggregation": "fedsa_lora", "reference": "round"}, "tensors stay with the clients"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(str(entry) for entry in value)[:40],
)
def test_settings_without_one_reference_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=LoraConfig(**LORA), **settings)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ADAPTERS["prompt"], {}, "does not go with PROMPT_TUNING"),
        (ADAPTERS["federa"], {}, "does not go with FeDeRA"),
        (
            ADAPTERS["lora"],
            {"reference": "base", "precompute_ref_log_probs": True},
            "with `precompute_ref_log_probs=True`",
        ),
        (LoraConfig(**LORA, bias="all"), {}, "`bias='all'` trains biases"),
    ],
)
def test_adapters_that_trl_would_not_copy_are_refused(make_trainer, tiny_model_dir, config, settings, message):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), copy.deepcopy(config))
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model, **settings)


def test_adapters_of_other_names_are_refused(make_trainer, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=r"the one that was given has \['sft'\]"):
        make_trainer(model=get_peft_model(base, LoraConfig(**LORA), adapter_name="sft"))


def test_a_model_with_the_reference_of_an_earlier_run_is_refused_until_it_is_deleted(make_trainer):
    first = make_trainer(peft_config=ADAPTERS["lora"], num_rounds=1)
    first.train()
    with pytest.raises(ValueError, match=r"Call `model.delete_adapter\('ref'\)` first"):
        make_trainer("again", model=first.model)
    first.model.delete_adapter("ref")
    again = make_trainer("again", model=first.model, num_rounds=1)
    assert same(again._reference.read(), first.federation.state)
    again.train()


@pytest.mark.parametrize("columns", [["prompt", "chosen"], ["prompt", "completion", "label"]])
def test_clients_without_pairs_are_refused(make_trainer, clients, columns):
    other = Dataset.from_dict({column: ["a"] * 8 for column in columns})
    with pytest.raises(ValueError, match="Client 'client_1' has the columns .* needs pairs of answers"):
        make_trainer(clients={**clients, "client_1": other}, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="Held-out set 'eval_dataset' has the columns"):
        make_trainer(eval_dataset=other, peft_config=LoraConfig(**LORA))
