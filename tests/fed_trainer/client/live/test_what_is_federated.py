# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
FedPEFT: any small part of a model can be federated, or all of it. Adapters of many types, prompts, biases, whole
models.
"""

import re
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from fed_trainer import FederatedTaskConfig, FederatedTaskTrainer, invite, join, read_record
from fed_trainer.client.live import live_state
from fed_trainer.federation.sampling import client_seed
from helpers.comparison import same
from helpers.data import token_rows
from helpers.local_rounds import local_round
from helpers.runs import Dies
from helpers.trainers import QUICK_TEXT
from peft_scl import FederaConfig, SclConfig


TOKENS = torch.arange(4, 20).unsqueeze(0)
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
LOCAL = QUICK_TEXT
TASK = {"task_type": "CAUSAL_LM"}
QV = {"target_modules": ["q_proj", "v_proj"], **TASK}
PROMPT = {"num_virtual_tokens": 3, **TASK}
PROJECTED = {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 16}
LSTM = {**PROMPT, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_dropout": 0.1}

# class of the config and its fields
TYPES = {
    "lora": ("LoraConfig", {"r": 4, "lora_dropout": 0.1, **QV}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, **QV}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True, **QV}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", **QV}),
    "lora_bias_all": ("LoraConfig", {"r": 4, "bias": "all", **QV}),
    "lora_head": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"], **QV}),
    "lora_tokens": ("LoraConfig", {"r": 4, "trainable_token_indices": "of the data", **QV}),
    "scl": ("SclConfig", {"r": 4, **TASK}),
    "federa": ("FederaConfig", {"r": 4, **QV}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], **TASK}),
    "loha": ("LoHaConfig", {"r": 4, **QV}),
    "lokr": ("LoKrConfig", {"r": 4, **QV}),
    "oft": ("OFTConfig", {"oft_block_size": 4, **QV}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **TASK, "target_modules": ["q_proj"]}),
    "vera": ("VeraConfig", {"r": 8, **TASK, "target_modules": ["q_proj"]}),
    "vera_by_seed": ("VeraConfig", {"r": 8, "save_projection": False, **TASK, "target_modules": ["q_proj"]}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, **QV}),
    "randlora": ("RandLoraConfig", {"r": 4, **TASK, "target_modules": ["q_proj"]}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, **QV}),
    "hra": ("HRAConfig", {"r": 4, **QV}),
    "c3a": ("C3AConfig", {"block_size": 4, **QV}),
    "lily": ("LilyConfig", {"r": 4, **TASK, "target_modules": ["q_proj"]}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"], **TASK}),
    "miss": ("MissConfig", {"r": 4, **QV}),
    "miss_bat": ("MissConfig", {"r": 4, "init_weights": "bat", **QV}),
    "tokens": (
        "TrainableTokensConfig",
        {"token_indices": "of the data", "target_modules": ["embed_tokens"], **TASK},
    ),
    "prompt": ("PromptTuningConfig", PROMPT),
    "prompt_head": ("PromptTuningConfig", {**PROMPT, "modules_to_save": ["lm_head"]}),
    "prefix": ("PrefixTuningConfig", PROMPT),
    "prefix_projection": ("PrefixTuningConfig", PROJECTED),
    "p_tuning_mlp": ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 8}),
    "p_tuning_lstm": ("PromptEncoderConfig", LSTM),
}


@pytest.fixture(scope="module")
def biased_dir(tiny_model_dir, tmp_path_factory):
    """The tiny Llama with biases in its attention, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama-bias"
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.attention_bias = True
    set_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied_dir(tiny_model_dir, tmp_path_factory):
    """The tiny Llama with its head tied to the embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama-tied"
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.tie_word_embeddings = True
    set_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_trainer(make_trainer, biased_dir, make_clients):
    clients = make_clients(num_clients=2, rows=12)
    clients["client_1"] = clients["client_1"].select(range(8))  # unequal weights
    return partial(make_trainer, adapter=None, model=biased_dir, clients=clients, num_rounds=1)


def make_config(kind, folder):
    name, fields = TYPES[kind]
    ids = AutoTokenizer.from_pretrained(folder)("What is 0 plus 0?")["input_ids"]
    fields = {key: sorted(set(ids)) if value == "of the data" else value for key, value in fields.items()}
    return {"SclConfig": SclConfig, "FederaConfig": FederaConfig}.get(name, getattr(peft, name, None))(**fields)


def trained_parameters(model):
    """Under the names they have in a travelling state."""
    names = {"prompt_encoder.default.": "prompt_encoder.", ".modules_to_save.default.": "."}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for long, short in names.items():
        trained = {name.replace(long, short): parameter for name, parameter in trained.items()}
    return trained


@pytest.mark.parametrize("kind", list(TYPES))
def test_a_round_is_the_mean_in_float64_and_stock_peft_loads_it(make_trainer, biased_dir, tmp_path, kind):
    trainer = make_trainer(peft_config=make_config(kind, biased_dir))
    model, start = trainer.model, trainer._live_adapter.read()
    assert sum(tensor.numel() for tensor in start.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in trained}

    mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in start.items()}
    for client, weight in (("client_0", 0.6), ("client_1", 0.4)):
        seed = client_seed(42, 1, client)
        local, _ = local_round(trainer, start, trainer.client.data.prepared(client), seed)
        assert not any(torch.equal(local[key], start[key]) for key in start), "a tensor that travels was not trained"
        for key in mean:
            mean[key] += weight * local[key].double()
    trainer.train()
    state = trainer._live_adapter.read()
    for key in mean:
        torch.testing.assert_close(state[key].double(), mean[key], rtol=1e-5, atol=1e-6)
    assert same({name: model.state_dict()[name] for name in rest}, rest), "something that does not travel has changed"

    model.eval()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased_dir), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (("AdaLoraConfig", {"total_step": 10, **QV}), "type ADALORA cannot be federated: it moves ranks .* Use LORA"),
        (
            ("LoraConfig", {"velora_config": peft.VeloraConfig(), **QV}),
            "`velora_config` keeps what it has seen or drawn",
        ),
        (("LoraConfig", {"monteclora_config": peft.MontecloraConfig(), **QV}), "`monteclora_config` keeps"),
        (
            ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4, "save_only_topk_weights": True, **QV}),
            "VBLORA makes it when it is saved.* Set `save_only_topk_weights=False`",
        ),
        (("ShiraConfig", {"r": 4, **QV}), "shira_indices is no parameter or buffer .* Use another type, such as LORA"),
        (
            ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1, **TASK}),
            r"\(`fused_lm_head`\), which ADAPTION_PROMPT does not give.* Train it with `FederatedTaskTrainer`",
        ),
        (
            ("CPTConfig", {"cpt_token_ids": [5], "cpt_mask": [1], "cpt_tokens_type_mask": [1], **TASK}),
            "which CPT does not give: .* Use PROMPT_TUNING",
        ),
    ],
)
def test_types_that_cannot_be_federated_say_why(make_trainer, peft_config, message):
    name, fields = peft_config
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=getattr(peft, name)(**fields))


# Prompts


@pytest.mark.parametrize(
    ("peft_config", "settings", "message"),
    [
        (
            PrefixTuningConfig(**PROMPT),
            {"gradient_checkpointing": True},
            "PREFIX_TUNING .* `gradient_checkpointing=False`",
        ),
        (
            PromptTuningConfig(**PROMPT),
            {"padding_free": True, "max_length": None},
            "`padding_free=True` joins .* PROMPT_TUNING",
        ),
        (
            PromptTuningConfig(**PROMPT),
            {"packing": True, "packing_strategy": "wrapped"},
            "`packing=True` joins examples",
        ),
    ],
)
def test_settings_that_would_drop_a_prompt_are_refused(make_trainer, peft_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=peft_config, **settings)


def test_a_prompt_trains_under_gradient_checkpointing_as_without(make_trainer):
    states = []
    for checkpointing in (False, True):
        config = PromptEncoderConfig(**PROMPT, encoder_hidden_size=8)
        trainer = make_trainer(str(checkpointing), peft_config=config, gradient_checkpointing=checkpointing)
        trainer.train()
        states.append(trainer._live_adapter.read())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_published_prompt_is_a_start(make_trainer, biased_dir, tmp_path, kind):
    trainer = make_trainer(peft_config=make_config(kind, biased_dir))
    trainer.train()
    again = make_trainer("more", initial_adapter=str(tmp_path / "out"))
    assert same(again._live_adapter.read(), trainer._live_adapter.read())
    again.train()


@pytest.mark.parametrize(
    "peft_config",
    [PromptEncoderConfig(**PROMPT, encoder_hidden_size=8), PrefixTuningConfig(**PROJECTED)],
    ids=["p_tuning", "prefix_projection"],
)
def test_a_published_prompt_without_its_encoder_is_no_start(make_trainer, tmp_path, peft_config):
    make_trainer(peft_config=peft_config).train()
    with pytest.raises(ValueError, match="holds the prompts that were computed but not what computes them"):
        make_trainer("more", initial_adapter=str(tmp_path / "out"))


@pytest.mark.fast("p_tuning")
@pytest.mark.parametrize(
    "peft_config",
    [PromptEncoderConfig(**PROMPT, encoder_hidden_size=8), PrefixTuningConfig(**PROJECTED)],
    ids=["p_tuning", "prefix_projection"],
)
def test_a_run_of_prompts_resumes_with_the_encoder_that_computes_them(make_trainer, peft_config):
    whole = make_trainer("whole", peft_config=peft_config, num_rounds=2)
    whole.train()
    make_trainer("half", peft_config=peft_config, num_rounds=1).train()
    resumed = make_trainer("half", peft_config=peft_config, num_rounds=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed._live_adapter.read(), whole._live_adapter.read())


def test_a_client_joins_with_the_encoder_of_the_server(biased_dir):
    models = []
    for seed in (0, 1):
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(biased_dir)
        models.append(get_peft_model(base, PromptEncoderConfig(**PROMPT, encoder_hidden_size=8)).eval())
    server, client = models
    assert not torch.equal(server(TOKENS).logits, client(TOKENS).logits)
    join(client, invite(server), "a")
    assert same(live_state(server).read(), live_state(client).read())
    assert torch.equal(server(TOKENS).logits, client(TOKENS).logits)


# Against fresh trainers


BIASES = r"\.bias$"


def plain_model(folder, trained=""):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.search(trained, name) is not None
    return model


@pytest.mark.fast("full", "prefix_projection")
@pytest.mark.parametrize("kind", ["full", "tied", "bitfit", "prompt", "prefix_projection", "p_tuning_lstm"])
def test_rounds_equal_fresh_trl_trainers_averaged_in_float64(make_trainer, biased_dir, tied_dir, tmp_path, kind):
    folder = tied_dir if kind == "tied" else biased_dir

    def model():
        set_seed(0)
        plain = plain_model(folder, BIASES if kind == "bitfit" else "")
        return get_peft_model(plain, make_config(kind, folder)) if kind in TYPES else plain

    trainer = make_trainer(model=model(), num_rounds=2)
    state = trainer._live_adapter.read()
    trainer.train()
    for round in (1, 2):
        mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
        for client, weight in (("client_0", 0.6), ("client_1", 0.4)):
            config = SFTConfig(
                output_dir=str(tmp_path / "local"),
                bf16=False,
                save_strategy="no",
                lr_scheduler_type="constant",
                **LOCAL,
            )
            local = SFTTrainer(model(), args=config, train_dataset=trainer._clients[client])
            parameters = trained_parameters(local.model)
            assert parameters.keys() == state.keys()
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(state[key])
            set_seed(client_seed(42, round, client))
            local.train()
            for key, parameter in parameters.items():
                mean[key] += weight * parameter.detach().double()
        state = {key: tensor.float() for key, tensor in mean.items()}
    for key, tensor in trainer._live_adapter.read().items():
        # a step is 1e-2; where a gradient is next to nothing Adam magnifies its rounding error
        torch.testing.assert_close(tensor, state[key], rtol=1e-4, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.fast("prompt")
@pytest.mark.parametrize(
    "peft_config",
    [
        PromptTuningConfig(num_virtual_tokens=2),
        PrefixTuningConfig(num_virtual_tokens=2),
        PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8),
    ],
    ids=["prompt", "prefix", "p_tuning"],
)
def test_a_prompt_and_the_head_of_a_classifier_equal_fresh_trainers(tmp_path, peft_config):
    peft_config.task_type = "SEQ_CLS"

    def model():
        set_seed(0)
        config = BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
        )
        return BertForSequenceClassification(config)

    clients = {"a": token_rows(0, 12), "b": token_rows(1, 8)}
    args = FederatedTaskConfig(output_dir=str(tmp_path / "out"), num_rounds=1, **COMMON)
    trainer = FederatedTaskTrainer(model(), args, clients, peft_config=peft_config)
    start = trainer._live_adapter.read()
    assert {"base_model.classifier.weight", "prompt_encoder.embedding.weight"} <= start.keys()
    trainer.train()

    mean = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in start.items()}
    for client, weight in (("a", 0.6), ("b", 0.4)):
        config = TrainingArguments(
            output_dir=str(tmp_path / "local"), save_strategy="no", lr_scheduler_type="constant", **COMMON
        )
        local = Trainer(
            get_peft_model(model(), trainer.model.active_peft_config), config, train_dataset=clients[client]
        )
        parameters = trained_parameters(local.model)
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(start[key])
        set_seed(client_seed(42, 1, client))
        local.train()
        for key in mean:
            mean[key] += weight * parameters[key].detach().double()
    for key, tensor in trainer._live_adapter.read().items():
        assert not torch.equal(tensor, start[key])
        torch.testing.assert_close(tensor.double(), mean[key], rtol=1e-4, atol=1e-6)

    trainer.model.eval()
    loaded = PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    tokens = torch.arange(8).reshape(2, 4)
    torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits)


# Whole models


def test_a_whole_model_is_saved_recorded_and_loaded_as_the_card_says(make_trainer, tied_dir, tmp_path, make_clients):
    held_out = make_clients(num_clients=1, rows=8)["client_0"]
    trainer = make_trainer(model=str(tied_dir), eval_dataset=held_out)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())  # the tied matrix once
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    record = read_record(tmp_path / "out")
    assert record["peft_type"] is None and record["base_digest"] is None
    assert record["num_trainable_parameters"] == size
    assert record["rounds"][0]["bytes_up"] == 2 * (4 * size + 8)
    assert record["start"]["eval"]["eval_loss"] == loss > record["rounds"][0]["eval"]["eval_loss"]

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    namespace = {}
    exec(example.replace("path/to/this/folder", str(tmp_path / "out")), namespace)
    trainer.model.eval()
    assert torch.equal(namespace["model"].eval()(TOKENS).logits, trainer.model(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


@pytest.mark.fast("full")
@pytest.mark.parametrize("kind", ["full", "tied", "bitfit"])
def test_a_run_of_a_whole_model_that_died_resumes_to_the_same_model(
    make_trainer, biased_dir, tied_dir, tmp_path, kind
):
    def make(output, callbacks=None):
        model = plain_model(tied_dir if kind == "tied" else biased_dir, BIASES if kind == "bitfit" else "")
        return make_trainer(output, model=model, num_rounds=3, callbacks=callbacks)

    make("whole").train()
    with pytest.raises(KeyboardInterrupt):
        make("died", [Dies()]).train()
    make("died").train(resume_from_checkpoint=True)
    whole, died = (load_file(Path(tmp_path, name, "model.safetensors")) for name in ("whole", "died"))
    assert same(whole, died)


def test_bitfit_changes_and_sends_the_biases_alone(make_trainer, biased_dir, tmp_path):
    trainer = make_trainer(model=plain_model(biased_dir, BIASES))
    trainer.train()
    before, after = load_file(biased_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # a bias of the keys moves no score, so its gradient is rounding error or nothing
    assert {key for key in before if re.search(r"[qvo]_proj\.bias$", key)} <= changed
    assert changed <= trainer.federation.state.keys() == {key for key in before if key.endswith(".bias")}


@pytest.mark.parametrize("aggregation", ["ffa_lora", "fedsa_lora", "rolora", "slora", "flora"])
def test_methods_for_factors_of_adapters_refuse_a_whole_model(make_trainer, biased_dir, aggregation):
    options = {"sparse_rounds": 1} if aggregation == "slora" else None
    with pytest.raises(
        ValueError, match=f"'{aggregation}'.* about the two factors of adapters, but a LlamaForCausalLM"
    ):
        make_trainer(model=plain_model(biased_dir), aggregation=aggregation, aggregation_kwargs=options)


def test_a_whole_model_is_published_with_its_tokenizer(make_trainer, hub):
    trainer = make_trainer(push_to_hub=True, hub_model_id="user/whole")
    trainer.train()
    _, _, files = hub.commits("user/whole")[-1]
    assert {"model.safetensors", "config.json", "tokenizer.json", "federation.json", "README.md"} <= files.keys()
    loaded = AutoModelForCausalLM.from_pretrained("user/whole").eval()
    trainer.model.eval()
    assert torch.equal(loaded(TOKENS).logits, trainer.model(TOKENS).logits)
