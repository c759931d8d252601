"""Muon against optax's, against its own definition, and on meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kimi_jax.training import muon
from kimi_jax.training.newton_schulz import orthogonalize
from sharding import Partition, make_mesh

SHAPES = {"a": (24, 40), "b": (40, 24), "c": (24, 24), "experts": (8, 24, 40)}


def draw(seed, shapes=SHAPES):
    random = np.random.RandomState(seed)
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def run(optimizer, steps=4, params=None, shapes=SHAPES, place=lambda tree: tree):
    """Returns the parameters after some steps, each with gradients of its own."""
    params = place(draw(0, shapes) if params is None else params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(1, steps + 1):
        params, state = step(params, state, place(draw(seed, shapes)))
    return params, state


@pytest.fixture(scope="module")
def single_device():
    return run(muon(1.0, weight_decay=0.0))


def test_it_is_optax_s_muon(single_device):
    def scale_by_shape(updates, params=None):
        return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

    numbers = {name: optax.contrib.MuonDimensionNumbers(-1, -2) for name in SHAPES}
    theirs = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        optax.stateless(scale_by_shape),
        optax.scale_by_learning_rate(1.0),
    )
    expected, _ = run(theirs)
    for name, found in single_device[0].items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=2e-5 * np.abs(expected[name]).max())
        error = np.sqrt(np.mean((found - expected[name]) ** 2) / np.mean(expected[name] ** 2))
        assert error < 5e-6


def test_each_expert_is_a_matrix_of_its_own(single_device):
    apart = {str(i): (24, 40) for i in range(8)}
    params = {str(i): draw(0)["experts"][i] for i in range(8)}
    optimizer = muon(1.0, weight_decay=0.0)
    state = optimizer.init(params)
    for seed in range(1, 5):
        gradients = {name: draw(seed)["experts"][int(name)] for name in apart}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        jnp.stack([params[str(i)] for i in range(8)]), single_device[0]["experts"], rtol=0, atol=1e-6
    )


def test_a_transposed_problem_has_the_transposed_update():
    gradients = draw(3, {"wide": (24, 40)})
    gradients["tall"] = gradients["wide"].T
    optimizer = muon(1.0, weight_decay=0.0)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_array_equal(updates["tall"], updates["wide"].T)


@pytest.mark.parametrize("condition", [1, 10, 100, 300])
def test_singular_values_come_near_one(condition):
    random = np.random.RandomState(condition)
    left, right = (np.linalg.qr(random.standard_normal((n, n)))[0] for n in (16, 48))
    matrix = left @ np.diag(np.geomspace(1, 1 / condition, 16)) @ right[:16]
    (found,) = orthogonalize(jnp.asarray(matrix, jnp.float32)[None])
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.65 and values.max() < 1.25
    # In bf16 too, roughly
    (coarse,) = orthogonalize(jnp.asarray(matrix, jnp.float32)[None], dtype=jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    assert np.linalg.svd(coarse, compute_uv=False).max() < 1.3


def test_updates_have_the_size_of_adamw_s_and_decay_is_decoupled():
    shape = {"w": (64, 128)}
    params, gradients = draw(0, shape), draw(1, shape)
    without, decayed = (
        muon(0.5, weight_decay=decay).update(gradients, muon(0.5).init(params), params)[0]["w"] for decay in (0.0, 0.1)
    )
    assert 0.15 < float(jnp.sqrt(jnp.mean(without**2))) / 0.5 < 0.2
    np.testing.assert_allclose(decayed, without - 0.5 * 0.1 * params["w"], rtol=0, atol=1e-6)
    zeros = {"w": jnp.zeros((64, 128))}
    assert not np.any(muon(0.5).update(zeros, muon(0.5).init(zeros), zeros)[0]["w"])


def test_a_schedule_counts_updates():
    optimizer = muon(lambda count: jnp.where(count == 1, 1.0, 0.0), weight_decay=0.0)
    first, second, third = (run(optimizer, steps)[0]["a"] for steps in (1, 2, 3))
    np.testing.assert_array_equal(first, draw(0)["a"])
    assert np.abs(second - first).max() > 0.1
    np.testing.assert_array_equal(third, second)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"muon: bias has shape \(3,\), expected matrices"):
        muon(1.0).init({"bias": jnp.ones(3)})


# Shards of rows, columns, both and neither; one spec is not named. Stacks of 2, 1 and 8 matrices do not divide by 8.
SPECS = {
    "a": P("tensor", ("data", "expert")),
    "b": P(("data", "expert"), "tensor"),
    "experts": P(("data", "expert", "tensor"), None, None),
    "d": P(None, "expert"),
}
MESHED = SHAPES | {"d": (24, 40)}


def test_on_a_mesh_each_matrix_has_one_home():
    mesh = make_mesh("2x2x2x1")
    shardings = {name: NamedSharding(mesh, SPECS.get(name, P(None, None))) for name in MESHED}
    place = partial(jax.device_put, device=shardings)
    optimizer = muon(1.0, partition=Partition(mesh), specs=SPECS)
    found, state = run(optimizer, 2, shapes=MESHED, place=place)
    expected, _ = run(muon(1.0), 2, shapes=MESHED)
    for name in MESHED:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6 * np.abs(expected[name]).max())
        # Parameters and momentum stay sharded
        for array in (found[name], state[0].momentum[name]):
            assert array.sharding.is_equivalent_to(shardings[name], array.ndim)

    params = place(draw(0, MESHED))
    text = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile().as_text()
    gathered = [tuple(map(int, sizes.split(","))) for sizes in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)]
    # Stacks of "c", which eight devices have copies of, and of the halves of "d", which four have
    assert sorted(gathered) == [(8, 24, 20), (8, 24, 24)]
    assert len(re.findall(r" all-to-all\(", text)) == 4  # there and back: for "a" and "b", which lie alike, and "d"
    # Products are of matrices that are at home: one of "a" and "b", one expert, one of "d", one of "c"
    products = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)}
    assert products == {(3, 24, 24), (3, 24, 40), (24, 24)}
