"""The poll of a sweep: what clock, pruner and Ctrl-C ask for between two turns."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from jgd.tuning.events import Cut, Report
from jgd.tuning.folder import Folder
from jgd.tuning.loop import Decision, Sweep
from jgd.tuning.plan import Plan

__all__ = ["NO_PRUNING", "Clock", "CtrlC", "Prune"]

# a pruner: (plan, events of a turn) -> settings to cut
Prune = Callable[[Plan, list[Report | Cut]], Iterable[int]]
NO_PRUNING: Prune = lambda plan, events: ()


class CtrlC:
    """Context in which Ctrl-C sets a flag for the next poll. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.interrupt = False
        self._before = list[Any]()  # several, since each sweep of a search enters the same context

    def __enter__(self) -> "CtrlC":
        if threading.current_thread() is threading.main_thread():
            self._before.append(signal.signal(signal.SIGINT, self._set))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.signal(signal.SIGINT, self._before.pop())

    def _set(self, *_: object) -> None:
        if self.interrupt:
            raise KeyboardInterrupt
        self.interrupt = True

    @contextlib.contextmanager
    def interrupts(self) -> Generator[None]:
        """Treat a KeyboardInterrupt of the user's code in this context as Ctrl-C."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupt = True


class Clock:
    """Poll of a sweep: its time limit, checkpoints that are due, its pruner, and Ctrl-C."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Folder | None = None,
        ctrl_c: CtrlC | None = None,
        prune: Prune = NO_PRUNING,
    ) -> None:
        self.schedule, self.plan, self.ledger = sweep.schedule, sweep.plan, sweep.ledger
        self.folder, self.ctrl_c, self.prune = folder, ctrl_c, prune
        self.last_checkpoint = time.monotonic()
        self.start = self.last_checkpoint - self.schedule.elapsed

    def __call__(self, events: list[Report | Cut]) -> Decision:
        now, plan, folder = time.monotonic(), self.plan, self.folder
        self.schedule.elapsed = now - self.start
        over = plan.seconds is not None and self.schedule.elapsed > plan.seconds
        due = now - self.last_checkpoint > plan.checkpoint_every
        if due := due and folder is not None and not folder.busy():
            self.last_checkpoint = now
        interrupt = self.ctrl_c is not None and self.ctrl_c.interrupt
        cuts = plan.lanes_of(np.array(list(self.prune(plan, events)), int)).ravel()
        cuts = tuple(cuts[self.ledger.alive[cuts]].tolist())
        return Decision(checkpoint=due, cuts=cuts, stop=over, interrupt=interrupt)
