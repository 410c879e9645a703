# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A job as NVFlare runs one, in this process: a site works at one task at a time, and errors are reported by site."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from fed_trainer.federation.transport.nvflare.messages import LostError, Message


@dataclass
class Task:
    site: str
    message: Message
    answered: Callable[[Message], None]
    failed: Callable[[str], None]
    is_fetched: bool = False


class Job:
    """A [`Courier`], whose sites have attachments."""

    def __init__(self, sites: str) -> None:
        self.sites, self.tasks = list(sites), []  # type: ignore[var-annotated]
        self.at_work: dict[str, Task] = {}
        self.aborted: str | None = None
        self.changed = threading.Condition()

    def clients(self) -> list[str]:
        return self.sites

    def give(self, client: str, message: Message, answered: Callable, failed: Callable) -> Task:
        with self.changed:
            self.tasks.append(Task(client, message, answered, failed))
            self.changed.notify_all()
            return self.tasks[-1]

    def take_back(self, given: Task) -> None:
        with self.changed:
            if not given.is_fetched and given in self.tasks:
                self.tasks.remove(given)

    def why_over(self) -> str | None:
        return self.aborted

    def fetch(self, site: str) -> Task | None:
        """The site's next task: the one that it works at first, then in their order."""
        for task in self.tasks:
            if task.site == site and site not in self.at_work and not task.is_fetched:
                task.is_fetched = True
                self.at_work[site] = task
                return task
        return None

    def finish(self, site: str) -> Task:
        task = self.at_work.pop(site)
        self.tasks.remove(task)
        return task

    def loses(self, site: str) -> None:
        """NVFlare notices that the process of a site is gone."""
        with self.changed:
            if site in self.at_work:
                self.finish(site).failed("EXECUTION_EXCEPTION")

    def waiting(self, site: str) -> list[str]:
        """The kinds of messages that the site has not answered."""
        return [task.message.kind for task in self.tasks if task.site == site]


class Attached:
    """An [`Attachment`] of a site's process."""

    def __init__(self, job: Job, site: str) -> None:
        self.job, self.site, self.task = job, site, None  # type: ignore[var-annotated]
        self.is_lost = self.is_closed = False

    def open(self, wait: float) -> None:
        if self.is_lost:
            raise LostError("there is none")

    def receive(self, wait: float) -> Message | None:
        with self.job.changed:
            if self.task is not None:  # as NVFlare does until it is answered
                return self.task.message
            task = self.job.fetch(self.site)
            if task is None and not self.is_lost:
                self.job.changed.wait(min(wait, 0.01))
                task = self.job.fetch(self.site)
            if self.is_lost or self.job.aborted:
                raise LostError("its job is over")
            self.task = task
            return None if task is None else task.message

    def answer(self, message: Message) -> None:
        with self.job.changed:
            if self.is_lost or self.job.at_work.get(self.site) is not self.task:
                raise LostError("another process is attached")
            self.task = None
            self.job.finish(self.site).answered(message)
            self.job.changed.notify_all()

    def close(self) -> None:
        self.is_closed = True
