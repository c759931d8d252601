"""Published safetensors <-> Orbax <-> a model in memory."""

from checkpoints.convert import Report, convert
from checkpoints.export import Exported, export
from checkpoints.inspect import Summary, summary, summary_of_config, table
from checkpoints.orbax import load
from checkpoints.progress import progress_bar, progress_events
from checkpoints.safetensors import CheckpointError
from checkpoints.verify import Verdict, verify

__all__ = [
    "CheckpointError",
    "Exported",
    "Report",
    "Summary",
    "Verdict",
    "convert",
    "export",
    "load",
    "progress_bar",
    "progress_events",
    "summary",
    "summary_of_config",
    "table",
    "verify",
]
