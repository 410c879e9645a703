# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The workflow of an NVFlare job, which carries messages. NVFlare imports this module, nobody else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .messages import CONTENT, FIELDS, Message, message_of
from .needed import nvflare_module


__all__ = ["CourierController"]

TASK = "fed_trainer"
LONGEST = 7 * 24 * 3600  # seconds that a site has for a task; the run has limits of its own, which are shorter

_spec = nvflare_module("nvflare.apis.controller_spec")
_utils = nvflare_module("nvflare.app_common.utils.fl_model_utils")
_model = nvflare_module("nvflare.app_common.abstract.fl_model")
_workflows = nvflare_module("nvflare.app_common.workflows.model_controller")
_Base: Any = _workflows.ModelController


class CourierController(_Base):
    """A [`Courier`]: every message is a task for one site, of which NVFlare tells whether it was answered."""

    def __init__(self) -> None:
        super().__init__(persistor_id="", task_check_period=0.1)

    def clients(self) -> list[str]:
        return [client.name for client in self.engine.get_clients()]

    def give(
        self, client: str, message: Message, answered: Callable[[Message], None], failed: Callable[[str], None]
    ) -> Any:
        model = _model.FLModel(
            params_type=_model.ParamsType.FULL,
            params={CONTENT: message.content},
            meta={FIELDS: {**message.fields, "kind": message.kind}},
        )

        def came(client_task: Any, fl_ctx: Any) -> None:
            result, client_task.result = client_task.result, None
            if result.get_return_code() != "OK":
                failed(f"NVFlare reports {result.get_return_code()}: look into its log at the site")
                return
            try:
                model = _utils.FLModelUtils.from_shareable(result)
                answered(message_of(model.meta, model.params))
            except Exception as error:  # whatever somebody else's answer leads to
                failed(f"its answer cannot be read ({error})")

        def done(task: Any, fl_ctx: Any) -> None:
            if task.completion_status not in (_spec.TaskCompletionStatus.OK, _spec.TaskCompletionStatus.CANCELLED):
                failed(f"NVFlare has given the task up ({task.completion_status.value})")

        task = _spec.Task(
            name=TASK,
            data=_utils.FLModelUtils.to_shareable(model),
            timeout=LONGEST,
            result_received_cb=came,
            task_done_cb=done,
        )
        self.broadcast(task=task, fl_ctx=self.fl_ctx, targets=[client], min_responses=1)
        return task

    def take_back(self, given: Any) -> None:
        if not given.client_tasks:  # nobody has fetched it
            self.cancel_task(given)

    def why_over(self) -> str | None:
        return "it was aborted" if self.abort_signal.triggered else None

    def folder(self) -> Path:
        """That of the job's files on this machine."""
        return Path(self.get_app_dir())
