# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a run trains anything: an update of zeros only is none."""

from __future__ import annotations

from transformers.utils import logging


__all__ = ["Movement", "NothingTrainedError"]

logger = logging.get_logger(__name__)


class NothingTrainedError(RuntimeError):
    """No client has moved what it trains, although the learning rate was not zero."""


class Movement:
    """
    What clients have moved so far.

    Args:
        has_begun (`bool`, *optional*, defaults to `False`):
            Whether earlier rounds are known to have moved something, as those before a resumed one.
    """

    def __init__(self, has_begun: bool = False) -> None:
        self._has_begun = has_begun
        self._idle: list[str] = []  # clients of the round whose update is zero at a rate that is not
        self._moves = False

    def begin(self) -> None:
        """Start a round."""
        self._idle, self._moves = [], False

    def saw(self, client: str, moved: bool, has_rate: bool) -> None:
        """
        A client's update counts.

        Args:
            client (`str`):
                Its name.
            moved (`bool`):
                Whether it has changed anything of what it trains, whether that travels or stays.
            has_rate (`bool`):
                Whether the learning rate of some step was not zero.
        """
        self._moves |= moved
        if not moved and has_rate:
            self._idle.append(client)

    def end(self, round: int) -> None:
        """
        After the last client of a round whose update counts.

        Raises:
            NothingTrainedError: If no client has moved anything, in this round and before.
        """
        if self._moves or not self._idle:
            self._has_begun |= self._moves
            return
        what = (
            f"In round {round} no client has changed what it trains by a single bit "
            f"({', '.join(map(repr, self._idle[:3]))})"
        )
        causes = (
            "The optimiser may not hold what is trained, the loss may not depend on it (an adapter that is "
            "switched off, labels that are all masked, a loss of your own that is detached), the learning rate may "
            "be below the resolution of the weights (bfloat16: load the model in float32), or a callback or hook "
            "may clear the gradients."
        )
        if not self._has_begun:
            raise NothingTrainedError(
                f"{what}, although the learning rate is not 0: nothing would be learnt. {causes}"
            )
        logger.warning(f"{what}, although the learning rate is not 0. {causes}")
