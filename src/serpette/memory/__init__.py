"""What fine-tuning holds in memory: predicted at the true shapes, and measured."""

from .recompute import recompute
from .steps import StepMemory, floor_memory, inference_memory, step_memory
from .tracker import LiveBytes, saved_bytes

__all__ = [
    "LiveBytes", "StepMemory", "floor_memory", "inference_memory", "recompute", "saved_bytes", "step_memory",
]  # fmt: skip
