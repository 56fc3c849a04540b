"""What the stages of an unfinished arm leave on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json


class Stages:
    """The folder of an arm: `unfinished` in it goes when the arm is done.

    A stage is a JSON file, or a folder that is renamed into place when it is whole.
    """

    def __init__(self, folder: Path):
        self.folder, self.unfinished = folder, folder / "unfinished"

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, as JSON has it; read from disk if an earlier run did it."""
        path = self.unfinished / f"{name}.json"
        if not path.exists():
            write_json(path, work())
        return json.loads(path.read_text(encoding="utf-8"))

    def place(self, name: str) -> Path:
        """The folder of a stage that needs more than JSON."""
        return self.unfinished / name

    def keep(self, name: str, write: Callable[[Path], None]) -> None:
        """The folder `name`, as `write` fills it: whole, or absent."""
        part, place = self.unfinished / f".{name}.part", self.place(name)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(place)

    def finish(self) -> None:
        """Removes what only an unfinished arm needs."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
