"""Training only the rows that matter, as a peft adapter: `RowConfig`, `rank_rows`, `to_lora`.

Importing this package makes the method known to peft, which loading an adapter of it needs.
"""

from .config import RowConfig
from .export import to_lora
from .layer import RowLayer
from .ranking import rank_rows
from .tuner import RowModel, register

register()

__all__ = ["RowConfig", "RowLayer", "RowModel", "rank_rows", "to_lora"]
