# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Shared, local and frozen tensors, clients that differ, and clients that are left out, in the rounds of a trainer."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTTrainer

from fed_trainer.federation.validation import TooFewClientsError
from helpers.comparison import same, weights_in
from helpers.local_rounds import after_local_rounds, kept_by, local_round
from helpers.models import tiny_bert
from peft_scl import FederaConfig, SclConfig


LORA = {"r": 4, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


pytestmark = pytest.mark.trainer(adapter=LORA, eval_on_start=False)


@pytest.fixture
def make_classifier(make_trainer):
    """A random BERT with a LoRA, a head and trained norms, over three clients of random tokens."""

    def make(output="out", modules_to_save=("classifier",), **settings):
        rows = {
            f"client_{c}": Dataset.from_dict(
                {
                    "input_ids": [[(7 * row + 3 * c + t) % 50 for t in range(6)] for row in range(8)],
                    "labels": [(row + c) % 3 for row in range(8)],
                }
            )
            for c in range(3)
        }
        return make_trainer(
            output,
            LoraConfig(r=2, target_modules=["value"], modules_to_save=list(modules_to_save)),
            kind="task",
            model=tiny_bert(vocab_size=50, intermediate_size=24, max_position_embeddings=512),
            clients=rows,
            eval_dataset={name: data.select(range(4)) for name, data in rows.items()},
            **settings,
        )

    return make


def held_out(clients):
    return {name: rows.select(range(4 + 2 * i)) for i, (name, rows) in enumerate(clients.items())}


# Shared, local, frozen


def test_fedsa_lora_shares_a_and_leaves_b_with_the_clients(make_trainer, make_clients):
    clients = make_clients(num_clients=3)
    trainer = make_trainer(aggregation="fedsa_lora", clients=clients, eval_dataset=held_out(clients))
    start = trainer.federation.state
    trainer.train()

    kept = {client: kept_by(trainer, client)["local"] for client in clients}
    for client, local in kept.items():
        assert local and all(".lora_B." in key for key in local), client
        assert all(local[key].any() for key in local)
    assert not same(kept["client_0"], kept["client_1"])
    for key, tensor in trainer.federation.state.items():
        assert torch.equal(tensor, start[key]) == (".lora_B." in key), key
    entry = trainer.record["rounds"][-1]
    a_bytes = sum(4 * tensor.numel() for key, tensor in start.items() if ".lora_A." in key)
    assert entry["bytes_up"] == 3 * (a_bytes + 8)  # and the number of examples
    assert entry["bytes_down"] == 3 * a_bytes


def test_every_client_is_evaluated_with_its_own_model_on_its_own_data(make_trainer, make_clients):
    clients = make_clients(num_clients=3)
    trainer = make_trainer(aggregation="fedsa_lora", clients=clients, eval_dataset=held_out(clients))
    trainer.train()
    entry = trainer.record["rounds"][-1]

    losses = {}
    for client in clients:
        with trainer.client_model(client):
            losses[client] = SFTTrainer.evaluate(trainer, held_out(clients)[client])["eval_loss"]
        with trainer.client_model("client_0" if client != "client_0" else "client_1"):
            assert SFTTrainer.evaluate(trainer, held_out(clients)[client])["eval_loss"] != losses[client]
    assert {name: figures["eval_loss"] for name, figures in entry["client_eval"].items()} == pytest.approx(losses)
    mean = (4 * losses["client_0"] + 6 * losses["client_1"] + 8 * losses["client_2"]) / 18
    assert entry["eval"]["eval_loss"] == pytest.approx(mean)


def test_a_client_that_has_not_trained_yet_has_the_initial_local_tensors(make_trainer, make_clients):
    clients = make_clients(num_clients=3)
    trainer = make_trainer(
        aggregation="fedsa_lora", clients=clients, clients_per_round=1, num_rounds=1, eval_dataset=held_out(clients)
    )
    start = trainer.federation.state
    trainer.train()
    (sampled,) = trainer.record["rounds"][0]["clients"]
    for client in clients.keys() - {sampled}:
        state = trainer.client_state(client)
        assert all(torch.equal(state[key], start[key]) for key in state if ".lora_B." in key)
        assert all(torch.equal(state[key], trainer.federation.state[key]) for key in state)


def test_the_model_of_a_client_can_be_saved(make_trainer, make_clients, tmp_path):
    trainer = make_trainer(aggregation="fedsa_lora", clients=make_clients(num_clients=3))
    trainer.train()
    trainer.save_client_model("client_2", tmp_path / "personal")
    assert same(weights_in(tmp_path / "personal"), trainer.client_state("client_2"))
    assert same(trainer._live_adapter.read(), trainer.federation.state)
    with pytest.raises(ValueError, match="There is no client 'client_9'"):
        trainer.save_client_model("client_9", tmp_path / "nobody")


def test_without_a_model_for_all_there_is_nothing_to_evaluate_on_common_data(make_trainer, make_clients):
    rows = make_clients(num_clients=1)["client_0"]
    with pytest.raises(
        ValueError, match=r"tensors stay with the clients .* `eval_dataset` is Dataset\. Give a dictionary"
    ):
        make_trainer(aggregation="fedsa_lora", eval_dataset=rows)
    with pytest.raises(
        ValueError, match=r"every client has a model of its own \(Ditto\).*`eval_dataset` is \['test'\]"
    ):
        make_trainer(local_objective="ditto", local_objective_kwargs={"mu": 0.1}, eval_dataset={"test": rows})


def test_fedper_keeps_the_head_with_the_client(make_classifier):
    trainer = make_classifier(tensor_roles={"local": ["classifier"]})
    start = trainer.federation.state
    trainer.train()
    heads = [kept_by(trainer, client)["local"] for client in trainer._clients]
    assert all(set(head) == {key for key in start if "classifier" in key} for head in heads)
    assert not same(heads[0], heads[1])
    assert all(torch.equal(trainer.federation.state[key], start[key]) for key in heads[0])
    assert any(not torch.equal(trainer.federation.state[key], start[key]) for key in start)


def test_fedbn_keeps_the_norms_with_the_client(make_classifier):
    from fed_trainer.state.roles import NORMS

    trainer = make_classifier(modules_to_save=["classifier", "LayerNorm"], tensor_roles={"local": [NORMS]})
    trainer.train()
    kept = kept_by(trainer, "client_0")["local"]
    assert kept and all("LayerNorm" in key for key in kept)


def test_a_frozen_head_neither_changes_nor_travels(make_classifier):
    trainer = make_classifier(tensor_roles={"frozen": ["classifier"]})
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "classifier" in name}
    trainer.train()
    assert not any("classifier" in key for key in trainer.federation.state)
    after = dict(trainer.model.named_parameters())
    assert before and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"local": ["no_such_tensor"]}, "'no_such_tensor' matches none of the"),
        (
            {"personal": ["classifier"]},
            r"`tensor_roles` has \['personal'\], but takes \['default', 'frozen', 'local', 'shared'\]",
        ),
        ({"default": "local"}, "No tensor of the adapter is shared"),
        ({"local": 5}, "`local` should be a tuple of patterns but the value passed is 5"),
        ({"local": ["lora"], "frozen": ["lora_A"]}, "is local and frozen at once"),
    ],
)
def test_roles_that_do_not_fit_are_refused(make_classifier, roles, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(tensor_roles=roles)


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        ({"aggregation": "fedsa_lora"}, True),
        ({"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}}, False),
    ],
)
def test_the_card_says_whose_metrics_these_are_and_what_stays_with_the_clients(
    make_trainer, make_clients, tmp_path, settings, stays
):
    clients = make_clients(num_clients=2)
    make_trainer(clients=clients, eval_dataset=clients, num_rounds=1, **settings).train()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Held-out metrics of the clients' own models" in card
    assert ("of the trained parameters stay with the clients" in card) == stays


def test_ditto_leaves_the_federation_as_it_is_and_pulls_personal_models_towards_it(make_trainer, make_clients):
    clients = make_clients(num_clients=3)
    settings = {"clients": clients, "eval_dataset": held_out(clients)}
    plain = make_trainer("plain", **settings)
    plain.train()
    distances = []
    for mu in (1e-3, 30.0):
        ditto = make_trainer(f"ditto-{mu}", local_objective="ditto", local_objective_kwargs={"mu": mu}, **settings)
        ditto.train()
        assert same(ditto.federation.state, plain.federation.state)
        personal = ditto.client_state("client_1")
        distances.append(sum(float((personal[key] - ditto.federation.state[key]).norm()) for key in personal))
        assert ditto.record["rounds"][-1]["client_eval"] != plain.record["rounds"][-1]["client_eval"]
    assert distances[0] > distances[1] > 0


# Clients that differ


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_a_client_of_a_smaller_rank_sends_and_trains_its_rank_only(make_trainer, monkeypatch, method):
    trainer = make_trainer(
        aggregation=method, client_settings={"client_0": {"r": 1}, "client_2": {"r": 2}}, num_rounds=2
    )
    updates = {}
    take = trainer.federation.server.take

    def watched(update, *args):
        updates[update.client] = update
        return take(update, *args)

    monkeypatch.setattr(trainer.federation.server, "take", watched)
    trainer.train()
    for client, rank in (("client_0", 1), ("client_1", 4), ("client_2", 2)):
        shapes = {key: tuple(tensor.shape) for key, tensor in updates[client].delta.items()}
        assert all(shape[0 if ".lora_A." in key else 1] == rank for key, shape in shapes.items()), client
        assert all(tensor.any() for tensor in updates[client].delta.values())
    numbers = 0 if method == "hetlora" else 8  # HetLoRA weights by norms
    rounds = trainer.record["rounds"][-1]["clients"]
    sent = {client: figures["bytes_up"] - numbers for client, figures in rounds.items()}
    assert sent["client_0"] * 4 == sent["client_2"] * 2 == sent["client_1"]


def test_rows_beyond_a_clients_rank_stay_zero_in_the_live_model(make_trainer, monkeypatch):
    trainer = make_trainer(aggregation="hetlora", client_settings={"client_0": {"r": 1}}, weight_decay=0.1)
    seen = []
    after_local_rounds(monkeypatch, trainer, lambda task, trained: seen.append(trained.state))
    trainer.train()
    for local in (seen[0], seen[3]):  # client_0 in both rounds
        for key, tensor in local.items():
            beyond = tensor[1:] if ".lora_A." in key else tensor[:, 1:]
            assert not beyond.any(), key
    assert any(tensor[1:].any() for key, tensor in seen[1].items() if ".lora_A." in key)


def test_hetlora_prunes_the_ranks_of_clients_that_do_not_need_them(make_trainer):
    trainer = make_trainer(
        aggregation="hetlora",
        local_objective="rank_pruning",
        local_objective_kwargs={"decay": 0.5, "penalty_weight": 100.0},
        num_rounds=3,
        optim="sgd",
        learning_rate=0.05,
    )
    trainer.train()
    rounds = trainer.record["rounds"]
    ranks = {client: int(kept_by(trainer, client)["objective"]["rank"]) for client in trainer._clients}
    assert min(ranks.values()) < 4
    assert rounds[-1]["bytes_up"] < rounds[0]["bytes_up"]


def test_a_client_trains_a_subset_of_the_layers(make_trainer):
    trainer = make_trainer(
        client_settings={"client_0": {"layers_to_transform": [0]}, "client_1": {"layers_to_transform": [0]}},
        num_rounds=1,
    )
    alone = make_trainer("alone", num_rounds=1)
    start = trainer.federation.state
    trainer.train()
    clients = trainer.record["rounds"][0]["clients"]
    assert (clients["client_0"]["bytes_up"] - 8) * 2 == clients["client_2"]["bytes_up"] - 8
    assert clients["client_0"]["bytes_down"] == clients["client_2"]["bytes_down"]  # it computes with all layers
    # layer 1 is the third client's alone
    local, _ = local_round(alone, start, alone.client.data.prepared("client_2"), seed=0)
    moved = [
        key for key in start if ".layers.1." in key and not torch.equal(trainer.federation.state[key], start[key])
    ]
    assert moved and all(not torch.equal(local[key], start[key]) for key in moved)


def test_the_mean_of_a_layer_is_over_the_clients_that_train_it(make_trainer, monkeypatch):
    trainer = make_trainer(client_settings={"client_0": {"layers_to_transform": [0]}}, num_rounds=1)
    start, ends = trainer.federation.state, []
    after_local_rounds(monkeypatch, trainer, lambda task, trained: ends.append(trained.state))
    trainer.train()
    for key, tensor in trainer.federation.state.items():
        chosen = ends if ".layers.0." in key else ends[1:]
        expected = sum(end[key].double() for end in chosen) / len(chosen)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
        if ".layers.1." in key:
            assert torch.equal(ends[0][key], start[key]), "the client trained a layer it should not"


def test_local_budgets_differ_and_fednova_hears_of_it(make_trainer, monkeypatch):
    trainer = make_trainer(aggregation="fednova", client_settings={"client_1": {"max_steps": 5}}, num_rounds=1)
    steps = {}
    add = trainer.federation.server.rule.add
    monkeypatch.setattr(
        trainer.federation.server.rule, "add", lambda u: steps.update({u.client: u.num_steps}) or add(u)
    )
    trainer.train()
    assert steps == {"client_0": 2, "client_1": 5, "client_2": 2}
    assert trainer.args.max_steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client_settings": {"client_0": {"r": 2}}}, "'fedavg' combines adapters of one rank. Use one of"),
        (
            {"aggregation": "flora", "client_settings": {"client_0": {"r": 8}}},
            "the rank 8, but the PEFT config has the rank 4",
        ),
        (
            {"aggregation": "median", "client_settings": {"client_0": {"layers_to_transform": [0]}}},
            "'median' compares or weights whole updates",
        ),
        (
            {"aggregation": "hetlora", "client_settings": {f"client_{c}": {"r": 2} for c in range(3)}},
            r"the largest of `client_settings` is 2: .* Set `r=2` in the PEFT config",
        ),
        ({"client_settings": {"nobody": {"max_steps": 2}}}, "names the client 'nobody'"),
        (
            {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1}, "peft_config": FederaConfig(**LORA)},
            "'slora' trains a sparse change .* the adapter is not a plain LoRA",
        ),
        (
            {
                "client_settings": {"client_0": {"layers_to_transform": [1]}},
                "tensor_roles": {"local": [r"\.layers\.1\."]},
            },
            r"Client 'client_0' would send nothing: no tensor of the layers \[1\] is shared",
        ),
        (
            {"aggregation": "fedex_lora", "local_objective": "ditto", "local_objective_kwargs": {"mu": 1.0}},
            "'fedex_lora' moves a part of it into the base",
        ),
        (
            {"aggregation": "flora", "client_settings": {"client_0": {"r": 2}}, "peft_config": FederaConfig(**LORA)},
            "start from the principal part of the base weight",
        ),
        ({"aggregation": "flora", "server_optimizer": "fedadam"}, "cannot follow 'flora'"),
        ({"aggregation": "flexlora", "server_lr": 0.5}, "cannot follow 'flexlora'"),
        ({"aggregation_kwargs": {"trim": 0.1}}, r"`aggregation_kwargs` has \['trim'\], which 'fedavg' does not take"),
        ({"aggregation": "norm_bounding"}, "`aggregation_kwargs` does not suffice: .*max_norm"),
        (
            {"server_optimizer_kwargs": {"beta": 0.9}},
            r"has \['beta'\], which 'sgd' does not take. It takes no options",
        ),
        ({"local_objective": "fedprox"}, "`local_objective_kwargs` does not suffice: .*mu"),
        (
            {"local_objective": "fedprox", "local_objective_kwargs": {"mu": "1e-3"}},  # what YAML makes of 1e-3
            "`mu` should be positive and finite but the value passed is '1e-3'",
        ),
        ({"local_objective_kwargs": {"mu": 1}}, "there is no `local_objective` for them"),
        ({"local_objective": "scaffold"}, "`optim` is 'adamw_torch"),
        (
            {"local_objective": "feddyn", "local_objective_kwargs": {"alpha": 1.0}, "aggregation": "median"},
            "all weighted alike, but `aggregation` is 'median'",
        ),
        (
            {"local_objective": "feddyn", "local_objective_kwargs": {"alpha": 1.0}, "server_optimizer": "fedadam"},
            "has a server step of its own",
        ),
        (
            {"local_objective": "rank_pruning", "local_objective_kwargs": {"decay": 0.5, "penalty_weight": 1.0}},
            "gives every client a rank of its own, but `aggregation` is 'fedavg'",
        ),
        ({"aggregation": "krum"}, "A round needs 5 usable updates .* but only 3 clients are sampled"),
        ({"min_clients": 4}, "A round needs 4 usable updates"),
        ({"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 2}}, "of 2 rounds leaves none for the LoRA"),
        (
            {
                "aggregation": "slora",
                "aggregation_kwargs": {"sparse_rounds": 1},
                "local_objective": "ditto",
                "local_objective_kwargs": {"mu": 1.0},
            },
            "trains other tensors in its second stage",
        ),
        (
            {
                "aggregation": "slora",
                "aggregation_kwargs": {"sparse_rounds": 1},
                "tensor_roles": {"shared": ["lora_A"], "default": "local"},
            },
            "the sparse change that 'slora' trains first has to be shared",
        ),
        (
            {"aggregation": "flora", "local_objective": "ditto", "local_objective_kwargs": {"mu": 1.0}},
            "moves a part of it into the base",
        ),
        (
            {
                "aggregation": "flora",
                "local_objective": "rank_pruning",
                "local_objective_kwargs": {"decay": 0.5, "penalty_weight": 1.0},
            },
            "moves a part of it into the base",
        ),
        (
            {
                "aggregation": "flexlora",
                "local_objective": "rank_pruning",
                "local_objective_kwargs": {"decay": 0.5, "penalty_weight": 1.0},
                "client_settings": {"client_0": {"layers_to_transform": [0]}},
            },
            "`layers_to_transform` of `client_settings` leaves some out",
        ),
        (
            {
                "local_objective": "feddyn",
                "local_objective_kwargs": {"alpha": 1.0},
                "client_settings": {"client_0": {"layers_to_transform": [0]}},
            },
            "`layers_to_transform` of `client_settings` leaves some out",
        ),
        (
            {
                "aggregation": "slora",
                "aggregation_kwargs": {"sparse_rounds": 1},
                "local_objective": "feddyn",
                "local_objective_kwargs": {"alpha": 1.0},
            },
            "all weighted alike, but `aggregation` is 'slora'",
        ),
        (
            {"aggregation": "flora", "peft_config": SclConfig(r=4, variant="bottleneck", task_type="CAUSAL_LM")},
            "acts on the input of the down projection|product of the two",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_the_run(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


# Clients that are left out


def breaks(trainer, monkeypatch, is_broken):
    """From `is_broken(round, client)` on, what the client sends is not finite."""
    original = trainer.client.turn
    turn = {}

    def remembered(packet):
        turn["now"] = (packet.meta["round"], packet.meta["client"])
        return original(packet)

    def break_it(task, trained):
        if is_broken(*turn["now"]):
            trained.state[min(trained.state)].view(-1)[0] = float("nan")

    monkeypatch.setattr(trainer.client, "turn", remembered)
    after_local_rounds(monkeypatch, trainer, break_it)


def test_a_round_goes_on_without_a_client_whose_update_is_not_finite(
    make_trainer, make_clients, tmp_path, monkeypatch
):
    clients = make_clients(num_clients=3)
    trainer = make_trainer("broken", clients=clients, num_rounds=1)
    breaks(trainer, monkeypatch, lambda round, client: client == "client_1")
    trainer.train()
    entry = trainer.record["rounds"][0]
    assert list(entry["clients"]) == ["client_0", "client_2"]
    assert list(entry["refused"]) == ["client_1"]
    assert "not finite" in entry["refused"]["client_1"]

    del clients["client_1"]
    without = make_trainer("without", clients=clients, num_rounds=1)
    without.train()
    assert same(weights_in(tmp_path / "broken"), weights_in(tmp_path / "without"))


@pytest.mark.parametrize(
    "settings",
    [
        {"local_objective": "scaffold", "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1},
        {"aggregation": "fedsa_lora"},
        {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}},
    ],
    ids=["scaffold", "fedsa_lora", "ditto"],
)
def test_a_client_that_is_left_out_keeps_what_it_had(make_trainer, monkeypatch, settings):
    trainer = make_trainer(num_rounds=2, **settings)
    breaks(trainer, monkeypatch, lambda round, client: (round, client) == (2, "client_1"))
    kept = {}
    settle = trainer.federation.server.settle
    monkeypatch.setattr(
        trainer.federation.server,
        "settle",
        lambda: (settle(), kept.setdefault("first", kept_by(trainer, "client_1")))[0],
    )
    trainer.train()
    assert list(trainer.record["rounds"][1]["refused"]) == ["client_1"]
    after = kept_by(trainer, "client_1")
    assert kept["first"] and after.keys() == kept["first"].keys()
    assert all(same(after[part], kept["first"][part]) for part in after)


def test_a_client_whose_own_model_diverges_is_left_out(make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=1, local_objective="ditto", local_objective_kwargs={"mu": 0.1})
    turns = []

    def diverge(task, trained):
        turns.append(task.objective)
        if len(turns) == 4:  # the own model of the second client
            trained.state[min(trained.state)].view(-1)[0] = float("inf")

    after_local_rounds(monkeypatch, trainer, diverge)
    trainer.train()
    refused = trainer.record["rounds"][0]["refused"]
    assert list(refused) == ["client_1"]
    assert re.search(
        r"lora_A.weight \(personal\), which stays with the client, has values that are not finite", refused["client_1"]
    )
    assert not kept_by(trainer, "client_1")


KEPT = {
    "local": {"aggregation": "fedsa_lora"},
    "personal": {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}},
    "objective": {"local_objective": "scaffold", "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1},
    "optimizer": {"keep_optimizer_state": True},
    "personal_optimizer": {
        "local_objective": "ditto",
        "local_objective_kwargs": {"mu": 0.1},
        "keep_optimizer_state": True,
    },
}


def spoils(trainer, monkeypatch, part, times):
    """What client_1 is to keep in `part`, and nothing that it sends, is infinite in its first `times` attempts."""
    whose, left = {}, [times]
    turn, check = trainer.client.turn, trainer.client._check_finite

    def remembered(packet):
        whose["turn"] = packet.meta["client"]
        return turn(packet)

    def spoilt(keeps):
        if whose["turn"] == "client_1" and left[0]:
            left[0] -= 1
            next(tensor for tensor in keeps[part].values() if tensor.numel() > 1).view(-1)[0] = float("inf")
        return check(keeps)

    monkeypatch.setattr(trainer.client, "turn", remembered)
    monkeypatch.setattr(trainer.client, "_check_finite", spoilt)


@pytest.mark.fast("local", "personal_optimizer")
@pytest.mark.parametrize("part", KEPT)
def test_what_a_client_keeps_is_checked_in_its_turn_and_the_turn_tried_again(make_trainer, monkeypatch, part):
    received = []
    for output, times in (("once", 1), ("twice", 2)):
        trainer = make_trainer(output, num_rounds=1, client_retries=1, **KEPT[part])
        spoils(trainer, monkeypatch, part, times)
        take = trainer.federation.server.take
        monkeypatch.setattr(
            trainer.federation.server, "take", lambda *args, take=take: received.append(args) or take(*args)
        )
        trainer.train()
        refused = trainer.record["rounds"][0]["refused"]
        if times == 1:
            assert refused == {} and kept_by(trainer, "client_1")[part]
        else:
            assert list(refused) == ["client_1"] and not kept_by(trainer, "client_1")
            assert refused["client_1"].startswith("its local round failed: ")
            assert f"({part}), which stays with the client, has values that are not finite" in refused["client_1"]
    assert [update.client for update, _ in received] == [*trainer._clients, "client_0", "client_2"]
    shared = {key for key in trainer.federation.state if key not in trainer._local_keys}
    for update, asked in received:  # all that the server is handed
        assert update.delta.keys() == asked.keys() == shared


def test_a_change_of_the_base_that_is_not_finite_ends_the_run(make_trainer, monkeypatch):
    trainer = make_trainer(aggregation="flora", num_rounds=1)
    finish = trainer.federation.server.rule.finish

    def overflowing():
        delta = finish()
        next(iter(trainer.federation.server.rule.base_change.values())).left.fill_(float("inf"))
        return delta

    monkeypatch.setattr(trainer.federation.server.rule, "finish", overflowing)
    with pytest.raises(ValueError, match="not finite in the change of .*_proj .left., although no update had"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_too_few_usable_updates_end_the_run_and_keep_the_last_round(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(min_clients=2, num_rounds=2)
    breaks(trainer, monkeypatch, lambda round, client: round == 2 and client != "client_0")
    with pytest.raises(TooFewClientsError, match="Only 1 of at least 2 clients.*'client_1': .*'client_2': "):
        trainer.train()
    assert same(trainer._live_adapter.read(include_frozen=True), weights_in(tmp_path / "out" / "checkpoint-1"))
    # with healthy clients it goes on from there
    resumed = make_trainer(min_clients=2, num_rounds=2)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.record["rounds"]) == 2


def test_a_run_can_be_resumed_with_fewer_usable_updates_per_round(make_trainer, monkeypatch):
    trainer = make_trainer(min_clients=3, num_rounds=2)
    breaks(trainer, monkeypatch, lambda round, client: (round, client) == (2, "client_1"))
    with pytest.raises(TooFewClientsError):
        trainer.train()
    resumed = make_trainer(min_clients=2, num_rounds=2)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.record["rounds"]) == 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("server_state.safetensors", {"server_optimizer": "fedadam"}),
        ("clients", {"aggregation": "fedsa_lora"}),
        ("clients", {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}}),
    ],
)
def test_a_checkpoint_that_lacks_what_the_run_depends_on_is_refused(make_trainer, tmp_path, name, settings):
    make_trainer(num_rounds=1, **settings).train()
    lost = tmp_path / "out" / "checkpoint-1" / name
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"is damaged .*{name}.* is missing"):
        make_trainer(num_rounds=2, **settings).train(resume_from_checkpoint=True)


def test_what_clients_keep_belongs_to_the_last_finished_round(make_trainer, monkeypatch):
    trainer = make_trainer(aggregation="fedsa_lora", min_clients=3, num_rounds=2)
    breaks(trainer, monkeypatch, lambda round, client: (round, client) == (2, "client_2"))
    finished = {}
    settle = trainer.federation.server.settle

    def end():
        counted = settle()
        finished.update({client: kept_by(trainer, client)["local"] for client in trainer._clients})
        return counted

    monkeypatch.setattr(trainer.federation.server, "settle", end)
    with pytest.raises(TooFewClientsError):
        trainer.train()
    assert finished and all(same(kept_by(trainer, client)["local"], finished[client]) for client in finished)


def test_absurd_values_are_left_out(make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=1)
    seen = []

    def become_absurd(task, trained):
        seen.append(1)
        if len(seen) == 2:
            trained.state[min(trained.state)].view(-1)[0] = 3e38

    after_local_rounds(monkeypatch, trainer, become_absurd)
    trainer.train()
    assert "values beyond 4.1e+03" in trainer.record["rounds"][0]["refused"]["client_1"]


def test_there_is_no_model_for_all_to_be_evaluated_later(make_trainer, make_clients):
    trainer = make_trainer(aggregation="fedsa_lora", num_rounds=1)
    trainer.train()
    with pytest.raises(ValueError, match="Every client has a model of its own"):
        trainer.evaluate(make_clients(num_clients=1)["client_0"])


def test_fednova_reads_the_momentum_of_the_local_optimiser(make_trainer):
    sgd = {"aggregation": "fednova", "optim": "sgd", "optim_args": "momentum=0.9"}
    assert make_trainer(**sgd).federation.server.rule.momentum == 0.9
    assert make_trainer(aggregation="fednova").federation.server.rule.momentum == 0
    with pytest.raises(ValueError, match="gives 'fednova' the momentum 0.5, but that of the local optimiser is 0.9"):
        make_trainer(**sgd, aggregation_kwargs={"momentum": 0.5})


def test_a_round_without_any_usable_update_never_passes(make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=1)
    breaks(trainer, monkeypatch, lambda round, client: True)
    with pytest.raises(TooFewClientsError, match="Only 0 of at least 1 clients"):
        trainer.train()


# Bytes


def test_a_client_downloads_what_it_missed_of_the_base(make_trainer, make_clients):
    trainer = make_trainer(
        aggregation="fedex_lora", clients=make_clients(num_clients=3), clients_per_round=2, num_rounds=4
    )
    trainer.train()
    rounds = trainer.record["rounds"]
    adapter_bytes = sum(4 * tensor.numel() for tensor in trainer.federation.state.values())
    last_seen = dict.fromkeys(trainer._clients, 0)
    for entry in rounds:
        for client, figures in entry["clients"].items():
            missed = [r["base_change_bytes"] for r in rounds[: entry["round"] - 1] if r["round"] >= last_seen[client]]
            assert figures["bytes_down"] == adapter_bytes + sum(missed)
            last_seen[client] = entry["round"]
    assert rounds[0]["base_change_bytes"] > 0


def test_flora_sends_no_factors_down_because_everybody_draws_them(make_trainer):
    trainer = make_trainer(aggregation="flora", num_rounds=2)
    trainer.train()
    first, second = trainer.record["rounds"]
    assert first["bytes_down"] == 0
    assert second["bytes_down"] == 3 * first["base_change_bytes"] == 3 * (first["bytes_up"] - 3 * 8)


def test_the_card_of_a_run_that_changed_the_base_shows_how_to_load_what_was_published(make_trainer, tmp_path):
    trainer = make_trainer(
        aggregation="fedex_lora",
        num_rounds=1,
        server_optimizer="sgd",
        peft_config=SclConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import peft_scl" not in card
    assert "| aggregation | `fedex_lora` |" in card
    fedadam = make_trainer("adam", num_rounds=1, server_optimizer="fedadam")
    fedadam.train()
    assert "| aggregation | `fedavg`, `fedadam` on the server |" in (tmp_path / "adam" / "README.md").read_text()
