"""Published safetensors <-> Orbax <-> a model in memory."""

from checkpoints.convert import Report, convert, progress_bar
from checkpoints.inspect import Summary, summary, summary_of_config, table
from checkpoints.orbax import load
from checkpoints.safetensors import CheckpointError

__all__ = [
    "CheckpointError",
    "Report",
    "Summary",
    "convert",
    "load",
    "progress_bar",
    "summary",
    "summary_of_config",
    "table",
]
