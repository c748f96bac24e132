"""Progress of a long run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_RECENT = 300.0  # seconds that the speed is judged by


class RunProgress(Progress):
    """rich's progress bar on standard error; where that is no terminal, such as a log file, a line
    a minute.

    Args:
        console: None: standard error.
        every: seconds between lines.
    """

    def __init__(self, console: Console | None = None, every: float = 60.0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = console or Console(stderr=True)
        super().__init__(
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_RECENT,
        )
        self._every, self._next = every, time.monotonic() + every

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """So many more steps of a task are done."""
        super().advance(task_id, advance)
        if self.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self.console.print(self._line(task_id), highlight=False, markup=False, soft_wrap=True)

    def _line(self, task_id: TaskID) -> str:
        task = self._tasks[task_id]
        took = timedelta(seconds=round(task.elapsed or 0.0))
        left = "" if task.time_remaining is None else f", about {timedelta(seconds=round(task.time_remaining))} left"
        return f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f} in {took}{left}"
