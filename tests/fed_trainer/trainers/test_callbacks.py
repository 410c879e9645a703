# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every callback of transformers and trl in a federation: it works, or is refused in a sentence before training."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
from transformers import DefaultFlowCallback, EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import BEMACallback, RichProgressCallback

from helpers.trainers import make


MODULES = (
    "transformers.trainer_callback",
    "transformers.trainer_jit_checkpoint",
    "transformers.integrations.integration_utils",
    *(["transformers.utils.notebook"] if importlib.util.find_spec("IPython") else []),
    "trl.trainer.callbacks",
    "trl.experimental.bema_for_ref_model.callback",
    "trl.experimental.merge_model_callback",
)
# events of the run: a round is a step of it
OF_THE_RUN = {
    *("on_init_end", "on_train_begin", "on_train_end", "on_evaluate", "on_predict", "on_save", "on_log"),
    *("on_prediction_step", "on_push_begin"),
}


def callbacks_of_the_libraries() -> list[type[TrainerCallback]]:
    found = [
        kind
        for module in MODULES
        for kind in vars(importlib.import_module(module)).values()
        if isinstance(kind, type) and issubclass(kind, TrainerCallback) and kind.__module__ == module
    ]
    return [
        kind
        for kind in found
        if kind.__name__ not in ("TrainerCallback", "CallbackHandler", "CallbackHandlerWithRefModel")
    ]


def follows_a_training_run(kind: type[TrainerCallback]) -> bool:
    """By what it listens to, or, for the one that asks for a schedule of evaluations, by name."""
    events = {name for name in dir(TrainerCallback) if name.startswith("on_")}
    heard = {name for name in events if getattr(kind, name) is not getattr(TrainerCallback, name)}
    return not heard <= OF_THE_RUN or kind in (EarlyStoppingCallback,)


ALL = callbacks_of_the_libraries()
REFUSED = [kind for kind in ALL if follows_a_training_run(kind) and kind is not DefaultFlowCallback]


@pytest.fixture(scope="module")
def make_trainer(tiny_model_dir, tmp_path_factory):
    """Of the module, so that one trainer can hear all callbacks."""

    def make_one(callbacks: list[Any] | None = None, **settings: Any) -> Any:
        given = {"adapter": {"r": 2}, "num_clients": 2, "eval_rows": 16, "callbacks": callbacks, **settings}
        return make(tmp_path_factory.mktemp("out"), tiny_model_dir, **given)

    return make_one


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer()


def test_the_list_is_whole() -> None:
    names = {kind.__name__ for kind in ALL}
    assert {
        "EarlyStoppingCallback",
        "DefaultFlowCallback",
        "WandbCallback",
        "BEMACallback",
        "MergeModelCallback",
    } <= names
    assert len(names) > 20 and ProgressCallback in REFUSED and RichProgressCallback in REFUSED


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}")
def test_a_callback_that_follows_a_training_run_is_refused_however_it_comes(trainer, kind) -> None:
    child = type("Mine", (kind,), {"__module__": "mine", "__del__": lambda self: None})
    if kind not in REFUSED:
        trainer.add_callback(object.__new__(child))  # many need packages that are not here
        trainer.callback_handler.callbacks.pop()
        return
    sentence = rf"^`{kind.__name__}` .+(Use|Leave|leave) .+\.$"
    for callback in (kind, object.__new__(kind)):
        with pytest.raises(ValueError, match=sentence):
            trainer.add_callback(callback)
    for callback in (child, object.__new__(child)):
        with pytest.raises(ValueError, match=f"`Mine`, which extends `{kind.__name__}`, "):
            trainer.add_callback(callback)


@pytest.mark.parametrize(
    "callback", [EarlyStoppingCallback, EarlyStoppingCallback(1), BEMACallback, ProgressCallback()]
)
def test_refused_by_the_constructor_and_by_train(make_trainer, trainer, callback) -> None:
    with pytest.raises(ValueError, match="Use a callback that sets|Leave it out|leave the callback out"):
        make_trainer([PrinterCallback, callback])
    trainer.callback_handler.add_callback(callback)  # behind the back of the trainer
    with pytest.raises(ValueError, match="Use a callback that sets|Leave it out|leave the callback out"):
        trainer.train()
    trainer.callback_handler.callbacks.pop()


def test_a_callback_of_the_user_with_a_name_of_the_libraries(trainer) -> None:
    mine = type("ProgressCallback", (TrainerCallback,), {"__module__": "mine"})
    trainer.add_callback(mine)
    trainer.remove_callback(mine)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_printer_and_flow_of_the_user_stay(make_trainer, disable_tqdm: bool, capsys) -> None:
    class Flow(DefaultFlowCallback):
        seen: list[str] = []  # noqa: RUF012

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append("step")
            return super().on_step_end(args, state, control, **kwargs)

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.seen.append("epoch begin")

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seen.append("epoch end")

    trainer = make_trainer([PrinterCallback(), Flow], disable_tqdm=disable_tqdm, num_rounds=1, eval_on_start=False)
    assert [type(callback) for callback in trainer.callback_handler.callbacks].count(PrinterCallback) == 1
    assert not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert "bytes_up" in capsys.readouterr().out
    assert Flow.seen == ["epoch begin", "step", "step", "epoch end"] * 2  # of two clients


def test_rich_bar_is_refused_before_it_draws(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr("trl.trainer.callbacks.is_rich_available", lambda: True)
    with pytest.raises(ValueError, match="`RichProgressCallback` counts the steps of one training run"):
        make_trainer([RichProgressCallback()])
