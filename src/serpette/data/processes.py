"""What `observe` needs where several processes share the work: who they are, one error for all, one bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def progress_bar(total: int, description: str, shown: bool) -> Iterator[Callable[[], None]]:
    """A function that moves the bar on by one; there is no bar but on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    if not shown or total < 2 or not Console().is_terminal:
        yield lambda: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def processes() -> tuple[int, int]:
    """(rank, world size) under torchrun or accelerate; (0, 1) otherwise."""
    from accelerate import PartialState

    if not PartialState._shared_state and not torch.distributed.is_initialized():
        import os

        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
    accelerator = getattr(torch, "accelerator", torch.cuda).is_available()
    state = PartialState(cpu=not accelerator)  # it takes no note of ACCELERATE_USE_CPU by itself
    return state.process_index, state.num_processes


@contextmanager
def together(world: int) -> Iterator[None]:
    """An error in one process ends all of them, with its message, where the others would wait for ever."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages: list[str | None] = [None] * world
    if world > 1:
        torch.distributed.all_gather_object(messages, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")


def broadcast(value: Any, world: int) -> Any:
    """`value` of the first process, in all of them."""
    if world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
