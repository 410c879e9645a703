# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Callbacks that count steps or evaluations of one training run, where a federation has many short ones."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


__all__ = ["refuse_callback", "refuse_callbacks", "remove_last"]


_BAR = (
    "counts the steps of one training run, but a client's local round is a short run of its own. The bar over "
    "rounds is shown unless `disable_tqdm=True`: leave the callback out"
)
_MOVING = (
    "averages over the steps of one training run, but those of a federation belong to different clients, which all "
    "start from the global model. Leave it out"
)
# those of transformers and trl, by the name of the class
_REFUSED = {
    "EarlyStoppingCallback": "follows evaluations within a training run, and a client makes none. Use a callback "
    "that sets `control.should_training_stop` in `on_evaluate`, which is called once per evaluated round",
    "ProgressCallback": _BAR,
    "NotebookProgressCallback": _BAR,
    "RichProgressCallback": _BAR,
    "KubeflowCallback": "reports the progress of a client's local round as that of the run. Leave it out of "
    "`report_to` and `callbacks`",
    "JITCheckpointCallback": "would save in the middle of a client's local round. A checkpoint is written after "
    "each round (`save_rounds`): leave `enable_jit_checkpoint` off",
    "LogCompletionsCallback": "generates in the middle of a client's local round, with its model. Use a callback "
    "that generates in `on_evaluate`, which is called once per evaluated round with the global model",
    "SyncRefModelCallback": "moves the reference in the middle of a client's local round, so that it would go on "
    "from client to client. Use `reference='round'` of `FederatedDPOConfig`",
    "BEMACallback": f"{_MOVING}; `server_optimizer='fedavgm'` has a memory over rounds",
    "PEFTAdapterEMACallback": f"{_MOVING}; `server_optimizer='fedavgm'` has a memory over rounds",
}


def refuse_callback(callback: type[TrainerCallback] | TrainerCallback) -> None:
    """
    Refuse a callback of transformers or trl that cannot work in a federation, or one that extends it.

    Args:
        callback ([`~transformers.TrainerCallback`] or its class):
            As `Trainer` takes it.

    Raises:
        ValueError: Saying why, and what to use instead.
    """
    given = callback if isinstance(callback, type) else type(callback)
    for kind in given.__mro__:
        if kind.__name__ in _REFUSED and kind.__module__.partition(".")[0] in ("transformers", "trl"):
            name = f"`{given.__name__}`" if given is kind else f"`{given.__name__}`, which extends `{kind.__name__}`,"
            raise ValueError(f"{name} {_REFUSED[kind.__name__]}.")


def refuse_callbacks(callbacks: Iterable[type[TrainerCallback] | TrainerCallback] | None) -> None:
    """As `refuse_callback`, for all of them."""
    for callback in callbacks or ():
        refuse_callback(callback)


def remove_last(handler: CallbackHandler, kinds: tuple[type[TrainerCallback], ...]) -> None:
    """Remove the bar over steps, or the printer, that `Trainer` has added behind the user's callbacks."""
    for position in reversed(range(len(handler.callbacks))):
        if type(handler.callbacks[position]) in kinds:
            del handler.callbacks[position]
            return
