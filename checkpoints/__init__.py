"""Converts between published safetensors, Orbax checkpoints and models in memory."""

from checkpoints.files.progress import progress_bar, progress_events
from checkpoints.jobs.convert import Report, convert
from checkpoints.jobs.export import Exported, export
from checkpoints.jobs.inspect import Summary, summary, summary_of_config, table
from checkpoints.jobs.verify import Verdict, verify
from checkpoints.load import load
from checkpoints.publish import publish
from checkpoints.published.safetensors import CheckpointError

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
    "publish",
    "summary",
    "summary_of_config",
    "table",
    "verify",
]
