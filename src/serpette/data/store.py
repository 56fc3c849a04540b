"""Observations on disk, in chunks that are either whole or absent, so that a killed run goes on.

A chunk is written beside its place, synced, and renamed; its presence is its completeness. Without a
folder the same chunks live in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomic, write_json


class ChunkStore:
    """Numbered chunks {name: tensor}, each with a small JSON `meta`.

    Args:
        folder: where they lie; None keeps them in memory.
        fingerprint: what determines the chunks. A folder that was begun with another one is refused;
            None only reads.

    Raises:
        ValueError: `folder` holds the chunks of another model, data set or setting.
    """

    def __init__(self, folder: Path | None, fingerprint: dict[str, Any] | None = None):
        self.folder = folder
        self._memory: dict[int, tuple[dict[str, Tensor], dict]] = {}
        if folder is None or fingerprint is None:
            return
        manifest = folder / "manifest.json"
        if manifest.exists():
            found = json.loads(manifest.read_text())
            changed = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
            if changed:
                raise ValueError(
                    f"out={str(folder.parent)!r} holds the scores of another run (differs in: "
                    f"{', '.join(changed)}); give another folder, or delete this one to start afresh"
                )
        else:
            write_json(manifest, fingerprint)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        return number in self._memory if self.folder is None else self._path(number).exists()

    def write(self, number: int, tensors: dict[str, Tensor], meta: dict) -> None:
        if self.folder is None:
            self._memory[number] = tensors, meta
        else:
            contiguous = {name: t.contiguous() for name, t in tensors.items()}
            write_atomic(self._path(number), save(contiguous, {"meta": json.dumps(meta)}))

    def read(self, number: int, names: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict]:
        """The chunk's tensors (only `names`, if given) and its meta."""
        if self.folder is None:
            return self._memory[number]
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                held = [k for k in file.keys() if names is None or k in names]  # noqa: SIM118 - not a dict
                return {k: file.get_tensor(k) for k in held}, json.loads(file.metadata()["meta"])
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete that file and run again") from error

    def clear(self) -> None:
        """Forgets every chunk."""
        self._memory = {}
        for path in sorted(self.folder.glob("*[0-9].safetensors")) if self.folder is not None else ():
            path.unlink()

    def exchange(self, numbers: range, world_size: int) -> None:
        """Gives every process the chunks of the others, where they do not share a folder."""
        if self.folder is not None or world_size == 1:
            return
        import torch.distributed as dist

        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, self._memory)
        for memory in gathered:
            self._memory.update(memory)
        missing = [n for n in numbers if n not in self._memory]
        assert not missing, f"chunks {missing} came from no process"
