"""Documents packed in a row are trained as alone, and as torch does, in both families, with images, and on a mesh."""

import dataclasses
import functools
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_models import drawn, structure
from flax import nnx
from safetensors.numpy import save_file

import checkpoints
from checkpoints.toy import toy_config, write_toy
from kimi_jax import Media
from kimi_jax.config_json import from_dict
from kimi_jax.model.param import weight_shardings
from kimi_jax.training.leaves import ROUTER_BIAS, map_leaves, named_leaves
from kimi_jax.training.loss import label_logits, sum_losses
from kimi_jax.training.packing import Room, make_rows
from kimi_jax.training.samples import Document
from sharding import TRAIN, Partition, expert_dispatch, make_mesh

CONFIGS = {name: toy_config(toy.like, **toy.overrides) for name, toy in cases.GRADIENTS.items()}
# At, before and after the borders of chunks of the delta rule, and of one token
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1)
ROOMS = {name: Room(tokens=256, labels=256, documents=8, patches=64 * ("k2" in name)) for name in CONFIGS}
ROOM = ROOMS["kimi-linear"]
GRADIENT_ERROR = 1e-5  # relative root mean square, of each array


def make_model(name):
    return nnx.merge(*drawn(from_dict(CONFIGS[name])))


def text(length, seed=0):
    tokens = np.random.default_rng((seed, length)).integers(0, 32, length).astype(np.int32)
    return Document(tokens, np.arange(length) > 0)


def trained_logits(logits, rows):
    return np.asarray(logits)[np.asarray(rows.columns) >= 0]


@functools.cache
def compiled(name):
    """Returns weights, the jitted loss of weights and rows with its gradients and what the layers saw, and the jitted
    logits. Kimi Linear's gradients keep what they need, the others' compute each layer again."""
    graph, params = drawn(from_dict(CONFIGS[name]))

    @jax.jit
    def gradients(params, rows):
        def loss(params):
            losses, statistics = sum_losses(nnx.merge(graph, params), rows, recompute=name != "kimi-linear")
            return losses.loss, statistics

        return jax.value_and_grad(loss, has_aux=True)(params)

    return params, gradients, jax.jit(lambda params, rows: label_logits(nnx.merge(graph, params), rows)[0])


def errors(found, expected):
    """Returns the relative root mean square error of each array that has one above the bound."""
    found, relative = named_leaves(found), {}
    for name, want in named_leaves(expected).items():
        if np.any(want):
            difference = np.asarray(found[name], np.float64) - want
            relative[name] = np.sqrt(np.mean(difference**2) / np.mean(np.square(want, dtype=np.float64)))
        else:
            assert not np.any(found[name])
    return {name: error for name, error in relative.items() if not error <= GRADIENT_ERROR}


# (Goldens, too, are of documents alone.)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi-linear", "k2.5"])
def test_packed_documents_are_those_alone(name):
    # Given eight documents in one row, and each in a row of its own
    params, compute, _ = compiled(name)
    config = from_dict(CONFIGS[name])
    documents = [text(length) for length in LENGTHS]
    if config.vision is not None:
        documents[-1] = picture_document(config, 3)
    packed = make_rows([documents, *[[]] * 7], config, ROOMS[name])
    alone = make_rows([[document] for document in documents], config, ROOMS[name])

    # When loss and gradients are computed of both
    (loss, seen), gradients = compute(params, packed)
    (expected_loss, expected_seen), expected_gradients = compute(params, alone)

    # Then they are equal
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for (path, found), (_, want) in zip(
        nnx.to_flat_state(gradients), nnx.to_flat_state(expected_gradients), strict=True
    ):
        want = np.asarray(want)
        np.testing.assert_allclose(found, want, rtol=0, atol=5e-6 * max(np.abs(want).max(), 1e-3), err_msg=str(path))
    assert not errors(gradients, expected_gradients)
    # And so is what the layers saw: every token chose two experts, and padding none
    np.testing.assert_array_equal(seen.expert_counts, expected_seen.expert_counts)
    tokens = sum(len(document.tokens) for document in documents)
    assert np.asarray(seen.expert_counts).sum(axis=1).tolist() == [2 * tokens] * len(seen.expert_counts)
    np.testing.assert_allclose(seen.max_logits, expected_seen.max_logits, rtol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_packed_documents_are_those_of_torch(name, tmp_path):
    # Given a checkpoint, and in one row the documents that transformers ran one by one (tests/golden/gradients_make.py)
    folder = write_toy(tmp_path / "toy", CONFIGS[name], seed=cases.GRADIENTS[name].seed)
    documents = []
    for tokens, grids in cases.gradient_documents(name):
        patches = np.concatenate([cases.media(grid) for grid in grids]) if len(grids) else None
        documents.append(Document(tokens, np.ones(len(tokens), bool), patches, grids if len(grids) else None))
    rows = make_rows([documents, *[[]] * 7], from_dict(CONFIGS[name]), ROOMS[name])
    # When loss and gradients are computed
    params, compute, _ = compiled(name)
    found = named_leaves(nnx.state(checkpoints.load(folder, dtype=jnp.float32)))
    given = map_leaves(lambda key, _: np.asarray(found[key]), params)  # (placed arrays would compile again)
    (loss, _), gradients = compute(given, rows)
    # Then they are those of torch in float64, whose gradients are read as a checkpoint's weights are
    golden = cases.gradients(name)
    labels = sum(len(document.labels) for document in documents)
    assert float(loss) == pytest.approx(labels * golden.pop("loss").item(), rel=1e-6)
    (tmp_path / "torch").mkdir()
    save_file(golden, tmp_path / "torch" / "model.safetensors")
    (tmp_path / "torch" / "config.json").write_text(json.dumps(CONFIGS[name]))
    expected = nnx.state(checkpoints.load(tmp_path / "torch", dtype=jnp.float32))
    assert all(np.any(want) for key, want in named_leaves(expected).items() if not key.endswith(ROUTER_BIAS))
    assert not errors(gradients, jax.tree.map(lambda want: labels * want, expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_models_own_call(name):
    # (the model's own call is compared with transformers)
    params, _, compute = compiled(name)
    documents, config = [text(length) for length in LENGTHS], from_dict(CONFIGS[name])
    packed = make_rows([documents], config, ROOM)
    found = trained_logits(compute(params, packed), packed)
    padded = np.stack([np.pad(document.tokens, (0, 65 - len(document.tokens))) for document in documents])
    own = np.asarray(make_model(name)(padded))
    expected = np.concatenate([row[: length - 1] for row, length in zip(own, LENGTHS, strict=True)])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def picture_document(config, seed, pictures=1):
    """Makes a document with pictures of 4 x 4 and 2 x 6 patches in turn, four and three tokens each."""
    random = np.random.default_rng(seed)
    grids = np.array([(1, 4, 4), (1, 2, 6)] * pictures, np.int32)[:pictures]
    patches = random.standard_normal((int(grids.prod(axis=1).sum()), 3, 14, 14)).astype(np.float32)
    counts = grids[:, 1] * grids[:, 2] // 4
    tokens = [5, *(token for count in counts for token in ([config.media_placeholder_token_id] * count + [7])), 9, 11]
    tokens = np.array(tokens, np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(tokens) - 2, patches, grids)


PICTURES = Room(tokens=32, labels=32, documents=3, patches=64)


@pytest.fixture(scope="module")
def pictures():
    """Returns documents with four pictures among them, and their rows."""
    config = from_dict(CONFIGS["k2.5"])
    documents = [picture_document(config, 0), text(4), picture_document(config, 1, 2)]
    return documents, make_rows([documents, [picture_document(config, 2)]], config, PICTURES)


def test_pictures_belong_to_their_document_and_row(pictures):
    documents, rows = pictures
    params, _, compute = compiled("k2.5")
    model, config = make_model("k2.5"), from_dict(CONFIGS["k2.5"])
    expected = []
    for document in (documents[0], documents[2], picture_document(config, 2)):
        own = model(document.tokens[None], Media(document.patches, document.grids))
        expected.append(np.asarray(own)[0, document.labels])
    found = trained_logits(compute(params, rows), rows)
    found = np.concatenate([found[:2], found[5:]])  # (without the text between)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=3e-6 * np.abs(expected).max())


def test_a_rows_broken_picture_breaks_no_other_rows_logits(pictures):
    _, rows = pictures
    params, _, compute = compiled("k2.5")
    patches = rows.patches.copy()
    patches[1] = np.nan
    before, after = compute(params, rows), compute(params, dataclasses.replace(rows, patches=patches))
    assert np.isnan(after[1]).any()
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=3e-6 * np.abs(before[0]).max())


@pytest.mark.slow  # quick beside it: test_training_on_meshes.py
@pytest.mark.parametrize(
    ("name", "shape", "dispatches"),
    [("k2.5", "2x2x2x1", True), ("kimi-linear", "1x2x2x2", False)],
)
def test_the_loss_and_what_layers_saw_on_a_mesh(monkeypatch, pictures, name, shape, dispatches):
    config = from_dict(CONFIGS[name])
    texts, room = [[text(20), text(11)], [text(31)]], dataclasses.replace(PICTURES, patches=0)
    rows = pictures[1] if name == "k2.5" else make_rows(texts, config, room)
    (params, _, _), mesh = compiled(name), make_mesh(shape)
    graph, _ = structure(config)
    expected, expected_seen = jax.jit(lambda params: sum_losses(nnx.merge(graph, params), rows))(params)
    if dispatches:
        monkeypatch.setattr(expert_dispatch, "MIN_BYTES_SAVED", -1e9)
    placed = jax.device_put(params, weight_shardings(params, mesh, TRAIN))

    @jax.jit
    def compute(params):
        return sum_losses(nnx.merge(graph, params), rows, Partition(mesh, TRAIN))

    losses, seen = compute(placed)
    assert float(losses.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert int(losses.correct) == int(expected.correct)
    np.testing.assert_array_equal(seen.expert_counts, expected_seen.expert_counts)
    np.testing.assert_allclose(seen.max_logits, expected_seen.max_logits, rtol=3e-6)
    assert seen.max_logits.shape == ({"k2.5": 2, "kimi-linear": 1}[name], 4)
