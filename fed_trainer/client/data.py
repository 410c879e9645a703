# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The training data of the clients, prepared when it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..config import joins_examples, local_batch
from ..data.client_datasets import recent
from ..federation.sampling import client_seed
from ..federation.validation import TooFewClientsError
from ..state.client_errors import ClientError, public_reason
from .agreement import UNPREPARED
from .token_counts import count_tokens


__all__ = ["ClientData"]

logger = logging.get_logger(__name__)

KEPT_PREPARED = 256  # datasets


class ClientData:
    """
    The clients' datasets, tokenised at their first local rounds and kept, until many others have come after them.

    Args:
        trainer ([`FederatedMixin`]):
            Prepares a dataset (`_prepare_client_dataset`), as the trainer underneath does.
        clients (`Mapping[str, Dataset]`):
            The datasets by client.
        num_sampled (`int`):
            Clients per round: at least as many stay in memory.
    """

    def __init__(self, trainer: Any, clients: Mapping[str, Dataset], num_sampled: int) -> None:
        self._trainer, self.clients = trainer, clients
        self._num_sampled = num_sampled
        self.num_tokens: dict[str, int] = {}
        """Tokens that carry a loss, of clients that have been counted, if the mean is weighted by them."""
        self._prepared: dict[str, Dataset] = {}

    def rename(self, name: str, clients: Mapping[str, Dataset]) -> None:
        """The data of the one client that there is gets its name."""
        self.clients = clients
        self._prepared = dict.fromkeys([name], self._prepared.popitem()[1]) if self._prepared else {}
        self.num_tokens = {}

    @property
    def num_kept(self) -> int:
        """How many prepared datasets stay in memory: all of a round."""
        return max(KEPT_PREPARED, self._num_sampled)

    def prepared(self, client: str) -> Dataset:
        """A client's dataset as it is trained on."""
        return recent(self._prepared, client, lambda: self._prepare(client), self.num_kept)

    def first_prepared(self) -> Dataset:
        """
        The data of the first client that can be prepared. The others before it are tried again in their turns.

        Raises:
            TooFewClientsError: If there is none, which is known before the first round then.
        """
        reasons: dict[str, str] = {}
        cause = None
        for client in self.clients:
            try:
                with self._trainer._failing_together(UNPREPARED):
                    return self.prepared(client)
            except Exception as error:
                cause = cause or error
                reasons[client] = public_reason(error)
                logger.warning(
                    f"Client {client!r} cannot be prepared and is tried again in its turn: {reasons[client]}"
                )
            self._trainer._all_have_stopped = False
        shown = "; ".join(f"{client!r}: {reason}" for client, reason in list(reasons.items())[:3])
        raise TooFewClientsError(
            f"None of the {len(reasons)} clients can be prepared, so there is nothing to train on. The first: {shown}"
        ) from cause

    def num_examples(self, client: str) -> int:
        """Examples that are trained on; preparation drops those without a label, and packing joins them."""
        if joins_examples(self._trainer.args):
            return len(self.clients[client])
        return len(self.prepared(client))

    def count(self, client: str) -> None:
        """Count the tokens of a client, unless they have been counted."""
        if client in self.num_tokens:
            return
        trainer = self._trainer
        rows: Any = trainer._remove_unused_columns(self.prepared(client), description="training")
        seed, size = client_seed(trainer.args.seed, 0, client), trainer.args.per_device_train_batch_size
        self.num_tokens[client] = count_tokens(rows, trainer.data_collator, size, trainer._loss_shifts_labels, seed)

    def _prepare(self, client: str) -> Dataset:
        raw = self.clients[client]
        prepared = self._trainer._prepare_client_dataset(raw, client)
        self._check_prepared(client, len(raw), len(prepared))
        return prepared

    def _check_prepared(self, client: str, num_raw: int, num_prepared: int) -> None:
        if num_prepared == 0:
            raise ClientError(
                f"Client {client!r} has {num_raw} examples, but none is left after preparation: no label of them "
                "is within `max_length`. Raise it (prompts may fill it), or leave the client out."
            )
        batch = local_batch(self._trainer.args)
        if num_prepared < batch and not joins_examples(self._trainer.args):
            raise ClientError(
                f"Client {client!r} has {num_raw} examples, but only {num_prepared} are left after preparation "
                f"(the others have no label within `max_length`), fewer than one local batch of {batch}. Raise "
                "`max_length` (prompts may fill it), lower the batch size, or leave the client out."
            )
