# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which tensors of an adapter are shared, which stay with a client, which nobody trains: one setting, by name patterns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from peft_scl.patterns import PLACES, check_pattern

from .adapter_state import AdapterState


__all__ = ["A_FACTORS", "B_FACTORS", "NORMS", "Role", "SplitState", "TensorRoles"]

Role = Literal["shared", "local", "frozen"]

A_FACTORS = r"\.(lora_A|lora_embedding_A|scl_A|scl_delta_A)(\.|$)"
"""Pattern of the factors that read the input, under the names PEFT saves them."""

B_FACTORS = r"\.(lora_B|lora_embedding_B|scl_B|scl_delta_B)(\.|$)"
"""Pattern of the factors that write the output."""

NORMS = r"(?i)\.[a-z_]*(norm|bn|ln)[a-z_0-9]*\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
"""Pattern of normalisation layers in `modules_to_save`, to keep them local as FedBN does."""


class SplitState(NamedTuple):
    """An adapter by roles."""

    shared: AdapterState
    local: AdapterState
    frozen: AdapterState


@dataclass(frozen=True)
class TensorRoles:
    r"""
    The role of every tensor, by regular expressions searched in the names PEFT saves the tensors under.

    - *shared*: trained by the clients, sent up, aggregated, sent down;
    - *local*: trained, but never leaves the client, which finds it again in its next round;
    - *frozen*: not trained in this round, the same on the server and on all clients. It travels once.

    The methods are settings of it: FFA-LoRA is `TensorRoles(frozen=(A_FACTORS,))`, FedSA-LoRA
    `TensorRoles(shared=(A_FACTORS,), default="local")`, RoLoRA freezes either factor in turn, FedPer is
    `TensorRoles(local=(r"\.classifier\.",))`, FedBN `TensorRoles(local=(NORMS,))`. BitFit, a head, any PEFT type
    and full fine-tuning (FedPEFT) need none of it: what is trainable is shared.

    Args:
        shared, local, frozen (`tuple[str, ...]`):
            Patterns per role.
        default (`str`, *optional*, defaults to `"shared"`):
            Role of a tensor that no pattern matches.

    Raises:
        ValueError: For a role that does not exist, a string in the place of a tuple, a pattern that is no regular
            expression, or one that could match for hours.
    """

    shared: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    default: Role = "shared"

    def __post_init__(self) -> None:
        if self.default not in ("shared", "local", "frozen"):
            raise ValueError(
                f"`default` should be 'shared', 'local' or 'frozen' but the value passed is {self.default!r}"
            )
        for role, patterns in (("shared", self.shared), ("local", self.local), ("frozen", self.frozen)):
            if not isinstance(patterns, (tuple, list)):  # of a string, every character would count as a pattern
                raise ValueError(
                    f"`{role}` should be a tuple of patterns but the value passed is {patterns!r}. Put a single "
                    "pattern in a tuple."
                )
        for pattern in (*self.shared, *self.local, *self.frozen):
            if not isinstance(pattern, str):
                raise ValueError(
                    f"The pattern {pattern!r} is not a regular expression: it is no string. Put it in quotes."
                )
            check_pattern(pattern, "The pattern", factor=PLACES)  # it is searched from every place of a name

    def joined(self, other: TensorRoles) -> TensorRoles:
        r"""
        The patterns of both, for a method's roles with those of a user: FFA-LoRA with a head per client is
        `TensorRoles(frozen=(A_FACTORS,)).joined(TensorRoles(local=(r"\.classifier\.",)))`.

        Raises:
            ValueError: If both have a default other than `"shared"`, and not the same.
        """
        if "shared" not in (self.default, other.default) and self.default != other.default:
            raise ValueError(
                f"Tensors that no pattern matches cannot be {self.default} by one setting and {other.default} by "
                "the other. Leave `default` at 'shared' in one of them, and name the tensors by patterns."
            )
        return TensorRoles(
            shared=(*self.shared, *other.shared),
            local=(*self.local, *other.local),
            frozen=(*self.frozen, *other.frozen),
            default=self.default if other.default == "shared" else other.default,
        )

    def role(self, key: str) -> Role:
        """
        The role of the tensor `key`.

        Raises:
            ValueError: If patterns of several roles match it.
        """
        patterns: dict[Role, tuple[str, ...]] = {"shared": self.shared, "local": self.local, "frozen": self.frozen}
        roles = [role for role in patterns if any(re.search(pattern, key) for pattern in patterns[role])]
        if len(roles) > 1:
            raise ValueError(
                f"The tensor {key} is {' and '.join(roles)} at once by the patterns given. Make them exclude each "
                "other."
            )
        return roles[0] if roles else self.default

    def split(self, state: AdapterState) -> SplitState:
        """
        The adapter by roles, with the tensors themselves, not copies.

        Raises:
            ValueError: If a pattern matches no tensor, or nothing is shared.
        """
        for pattern in (*self.shared, *self.local, *self.frozen):
            if not any(re.search(pattern, key) for key in state):
                raise ValueError(
                    f"The pattern {pattern!r} matches none of the {len(state)} tensors of the adapter (the first: "
                    f"{next(iter(sorted(state)), None)}). Patterns are searched in the names PEFT saves tensors under."
                )
        split = SplitState({}, {}, {})
        for key, tensor in state.items():
            getattr(split, self.role(key))[key] = tensor
        if not split.shared:
            raise ValueError(
                "No tensor of the adapter is shared, so the clients would have nothing in common. Share at least one."
            )
        return split
