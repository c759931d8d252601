"""Empties an engine between tests."""

from kimi_jax.engine.pages import PagePool
from kimi_jax.engine.snapshots import SnapshotPool


def forget_all(engine):
    """Gives an idle engine empty pools."""
    for shard in engine.scheduler.shards:
        shard.pages = PagePool(shard.pages.pages, shard.pages.parts)
        if shard.snapshots is not None:
            shard.snapshots = SnapshotPool(shard.snapshots.places)
            shard.left.clear()
