"""The planner's count of a cache is what an engine allocates, and the pools that it foretells are the engine's."""

import dataclasses
import math

import jax
import pytest

from kimi_jax import config_json, plan
from kimi_jax.engine import sizes
from kimi_jax.model.kimi import abstract
from kimi_jax.plan import analytic
from kimi_jax.plan.job import pool_sizes, shortened
from kimi_jax.runtime.cache import states_alone
from kimi_jax.runtime.pools import pools_within
from kimi_jax.runtime.program import Program
from sharding import make_mesh, mesh_sizes
from sharding.topologies import topology

MESHES = ("data=2,tensor=2,sequence=2", "expert=2,tensor=4")


def nbytes(cache):
    """Counts the bytes of a cache on one device, by the shardings of its arrays."""
    arrays = jax.tree.leaves(cache)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("preset", ["kimi-k2.5", "kimi-linear-48b"])
def test_plan_and_engine_agree(preset, mesh):
    # Given the published widths, and a layer of each kind
    config = shortened(config_json.preset(preset)).config
    job = plan.Job(config, topology("v5e:2x4"), mesh_sizes(mesh), "decode", 32, 8000)
    model = abstract(config, mesh=make_mesh(mesh))
    program = Program(model)

    # Then the cache that is allocated for the job has the plan's bytes
    pages, slots = pool_sizes(job.batch, job.context, job.partition)
    assert nbytes(program.cache_shapes(pages, slots)) == analytic.cache_bytes(job) == analytic.memory(job).cache

    # and an engine's pools are as foretold, and fill its memory but for less than a page
    foretold = analytic.engine_pools(job)
    assert foretold is not None
    found = sizes.pool_sizes(model, job.batch, foretold.cache_memory, 512, None)
    assert (found.pages, found.places, foretold.slots) == (foretold.pages, foretold.places, 32)
    whole = job.context <= found.max_length and found.pages // job.mesh["data"] * job.mesh["data"] >= pages
    assert (foretold.sequences == 32) is whole
    for memory in (2**30, 2**31, 3 * 2**30, 2**40):
        pools = pools_within(config, memory, 32, program.dtype, program.mesh)
        copies = states_alone(program.cache_shapes(0, pools.places))
        assert pools.nbytes == nbytes(program.cache_shapes(pools.pages, 32)) + nbytes(copies) <= memory


def test_memory_that_holds_fewer_sequences():
    # Given all layers of K2.5 on four chips of tpu7x: 64 rows of the longest context are more than is left
    job = plan.Job(
        config_json.preset("kimi-k2.5"), topology("tpu7x:2x2x1"), mesh_sizes("sequence=8"), "decode", 64, 8192
    )
    engine = analytic.engine_pools(dataclasses.replace(job, context=262_144))
    assert engine is not None
    page = 61 * 576 * 128 * 2
    assert engine.pages == 8 * (engine.cache_memory // page)
    assert engine.sequences == engine.pages // (262_144 // 128) < 64
    # and none is left on a slice that the model alone fills
    assert (
        analytic.engine_pools(plan.Job(job.config, topology("v5e:4x4"), mesh_sizes("sequence=16"), "decode", 64, 128))
        is None
    )
