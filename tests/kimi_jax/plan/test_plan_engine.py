"""The planner's count of a cache is what an engine allocates, and the pools that it foretells are the engine's."""

import dataclasses
import math

import jax
import pytest

from checkpoints.toy import head_config, toy_config
from kimi_jax import config_json, plan
from kimi_jax.engine import sizes
from kimi_jax.model.eagle import abstract_head
from kimi_jax.model.kimi import abstract
from kimi_jax.plan import analytic
from kimi_jax.plan.job import Drafting, pool_sizes, shortened
from kimi_jax.runtime.cache import states_alone
from kimi_jax.runtime.eagle import EagleDrafter
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


@pytest.mark.parametrize(
    ("kind", "mesh"), [("eagle3-mla", "data=2,tensor=2,sequence=2"), ("eagle3-llama", "data=2,expert=2,tensor=2")]
)
def test_a_draft_head_is_counted_with_its_cache(kind, mesh):
    # Given a head of the published widths
    config = shortened(config_json.preset("kimi-k2.5")).config
    fields = head_config(toy_config("kimi-k2.5"), kind, eagle_aux_hidden_state_layer_ids=[1, 2, 2])
    drafting = Drafting(3, config_json.fit_target(config_json.eagle_from_dict(fields), config))
    job = plan.Job(config, topology("v5e:2x4"), mesh_sizes(mesh), "decode", 32, 8000, 4, drafting)
    devices = make_mesh(mesh)
    model = abstract(config, mesh=devices)
    drafter = EagleDrafter(abstract_head(drafting.head, mesh=devices), model)
    program = Program(model, drafter, 3)

    # Then its weights and its cache have the plan's bytes, and so have the pages of an engine
    memory, without = analytic.memory(job), analytic.memory(dataclasses.replace(job, draft=None))
    assert memory.draft_head == nbytes(drafter.arrays) > 0
    assert memory.cache == nbytes(program.cache_shapes(*pool_sizes(job.batch, job.context, job.partition)))
    assert memory.headroom == without.headroom - nbytes(drafter.arrays) - (memory.cache - without.cache)
    foretold = analytic.engine_pools(job)
    assert foretold.pages == sizes.pool_sizes(model, job.batch, foretold.cache_memory, 512, None, drafter).pages


def test_a_llama_head_takes_no_mesh_that_splits_a_row():
    config = shortened(config_json.preset("kimi-k2.5")).config
    fields = head_config(toy_config("kimi-k2.5"), "eagle3-llama", eagle_aux_hidden_state_layer_ids=[1, 2, 2])
    job = plan.Job(
        config, topology("v5e:2x4"), mesh_sizes("tensor=4,sequence=2"), "decode", 32, 8000, 4,
        Drafting(3, config_json.eagle_from_dict(fields)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="in the Llama form it takes no mesh with a sequence axis, which is 2"):
        analytic.memory(job)


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
