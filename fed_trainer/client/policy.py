# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a client takes part in, and what may leave it: the decision of those who own the data."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .outgoing import held_back
from .policy_checks import CHECKS, checked_later
from .policy_fields import MayLeave, PolicyFields, built
from .run_request import RunRequest


__all__ = ["MayLeave", "Policy", "check_policy"]

MOST_BYTES = 2**20


@dataclass(frozen=True)
class Policy(PolicyFields):
    """
    A policy: the fields of [`PolicyFields`], and what it says of a run and of what leaves.
    """

    @classmethod
    def load(cls, path: str | os.PathLike) -> Policy:
        """
        The policy in a YAML file.

        Args:
            path (`str` or `os.PathLike`):
                The file. `{}` is a policy without bounds.

        Raises:
            ValueError: Naming the file and the field: if it cannot be read, is empty or no YAML, or has an unknown
                field, one that occurs twice or one of the wrong type.
        """
        try:
            return built(cls, _read(Path(path)), "the policy")
        except ValueError as error:
            raise ValueError(f"The policy {os.fspath(path)!r} cannot be used: {error}") from error

    def violations(
        self,
        run: Mapping[str, Any],
        num_examples: int | None = None,
        client: str | None = None,
        world_size: int = 1,
        is_plan: bool = False,
    ) -> list[str]:
        """
        In what a run asks for more than the policy allows.

        Args:
            run (`Mapping[str, Any]`):
                What the coordinator says of the run; it may say anything. `trainer`, `base_model`, `base_digest`,
                `num_rounds`, `num_sampled`, `settings` (fields of the config as JSON has them), `upload_bytes` (the
                largest update of a client), `signed`, `encrypted`, `weights` (`"examples"`, `"tokens"` or
                `"uniform"`).
            num_examples (`int`, *optional*):
                Training examples of the client, for a local budget in epochs.
            client (`str`, *optional*):
                Its name, for a budget of its own in `client_settings`. If not given, the largest budget counts.
            world_size (`int`, *optional*, defaults to `1`):
                Processes of the client.
            is_plan (`bool`, *optional*, defaults to `False`):
                Whether the run has not begun, so that what it cannot say yet is no violation.

        Returns:
            `list[str]`: Sentences, each of which names a field of the policy; empty if the run may come.
        """
        request = RunRequest(run, num_examples, client, world_size, is_plan)
        return [sentence for check in CHECKS for sentence in check(self, request)]

    def tightened(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """
        The dictionary of an outgoing packet without what may not leave; see [`held_back`].

        Args:
            meta (`Mapping[str, Any]`):
                As the client would send it; not changed.
        """
        return held_back(meta, self.may_leave.closed)


def check_policy(
    policy: Policy,
    run: Mapping[str, Any],
    num_examples: int | None = None,
    client: str | None = None,
    world_size: int = 1,
) -> tuple[int, str]:
    """
    What `fed-trainer policy check` says of a run that has not begun.

    Args:
        policy ([`Policy`]):
            The policy.
        run (`Mapping[str, Any]`):
            As of [`planned_run`].
        num_examples, client, world_size:
            As in [`Policy.violations`].

    Returns:
        `tuple[int, str]`: The exit code, 0 or 2, and what to print.
    """
    refused = policy.violations(run, num_examples, client, world_size, is_plan=True)
    if refused:
        head = f"The policy refuses this run, for {len(refused)} reason{'s' if len(refused) > 1 else ''}:"
        return 2, "\n".join([head, *(f"- {sentence}" for sentence in refused)])
    closed = ", ".join(sorted(policy.may_leave.closed)) or "nothing"
    lines = [f"The policy allows this run. It holds back: {closed} (`may_leave`)."]
    if later := checked_later(policy, RunRequest(run, is_plan=True)):
        lines.append(f"Checked when the client joins, as it is not known before: {', '.join(later)}.")
    return 0, "\n".join(lines)


class _EachOnce(yaml.SafeLoader):
    """As `yaml.safe_load`, which of a field that occurs twice would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"`{name}` occurs more than once. Leave the one that holds.")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    """
    Raises:
        ValueError: In words that follow the name of the file.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {MOST_BYTES} that a policy can have.")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachOnce)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())}).") from error
    if content is None:
        raise ValueError("it is empty. Write the bounds into it, or `{}` for none.")
    return content
