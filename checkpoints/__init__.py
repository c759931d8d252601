"""Converts between published safetensors, Orbax checkpoints and models in memory. Each public name is loaded when it
is first used: a summary of a checkpoint needs no Orbax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints.files.progress import progress_bar as progress_bar
    from checkpoints.files.progress import progress_events as progress_events
    from checkpoints.jobs.convert import Report as Report
    from checkpoints.jobs.convert import convert as convert
    from checkpoints.jobs.export import Exported as Exported
    from checkpoints.jobs.export import export as export
    from checkpoints.jobs.inspect import summary as summary
    from checkpoints.jobs.inspect import summary_of_config as summary_of_config
    from checkpoints.jobs.sizes import Summary as Summary
    from checkpoints.jobs.sizes import summary_of_preset as summary_of_preset
    from checkpoints.jobs.sizes import table as table
    from checkpoints.jobs.verify import Verdict as Verdict
    from checkpoints.jobs.verify import verify as verify
    from checkpoints.loading import load as load
    from checkpoints.loading import load_head as load_head
    from checkpoints.published.safetensors import CheckpointError as CheckpointError
    from checkpoints.publishing import publish as publish

_HOMES = {
    "CheckpointError": "published.safetensors",
    "Exported": "jobs.export",
    "Report": "jobs.convert",
    "Summary": "jobs.sizes",
    "Verdict": "jobs.verify",
    "convert": "jobs.convert",
    "export": "jobs.export",
    "load": "loading",
    "load_head": "loading",
    "progress_bar": "files.progress",
    "progress_events": "files.progress",
    "publish": "publishing",
    "summary": "jobs.inspect",
    "summary_of_config": "jobs.inspect",
    "summary_of_preset": "jobs.sizes",
    "table": "jobs.sizes",
    "verify": "jobs.verify",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(f"checkpoints.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
