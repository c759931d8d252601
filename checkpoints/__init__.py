"""Published safetensors <-> Orbax <-> a model in memory."""

from checkpoints.convert import Report, convert
from checkpoints.inspect import Summary, summary, summary_of_config, table
from checkpoints.orbax import load
from checkpoints.progress import progress_bar, progress_events
from checkpoints.safetensors import CheckpointError

__all__ = [
    "CheckpointError",
    "Report",
    "Summary",
    "convert",
    "load",
    "progress_bar",
    "progress_events",
    "summary",
    "summary_of_config",
    "table",
]
