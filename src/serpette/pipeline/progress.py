"""What a run says while it works."""

from __future__ import annotations

from typing import Any


class Sayer:
    """One line a stage, and a bar for the steps of what runs."""

    def __init__(self, shown: bool):
        from rich.console import Console

        self.shown = shown
        self._terminal = Console().is_terminal
        self._bar: Any = None

    def __call__(self, line: str) -> None:
        self.done()
        if self.shown:
            print(f"==> {line}", flush=True)

    def step(self, step: int, total: int, what: str = "tuning") -> None:
        """Moves the bar of `what` on; it ends with step `total`, or where `done` is called before."""
        if not (self.shown and self._terminal):
            return
        if self._bar is None:
            from rich.progress import Progress

            self._bar = Progress(transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=step, total=total, description=what)
        if step >= total:
            self.done()

    def done(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
