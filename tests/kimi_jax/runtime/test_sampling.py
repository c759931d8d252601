"""The filters against a plain float64 reading of their definitions, and the draw against its probabilities."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config_json import ConfigError
from kimi_jax.runtime import draw
from kimi_jax.runtime.sampling import Sampling, checked_seeds, sampling_rows

sample, filtered_weights = jax.jit(draw.sample), jax.jit(draw.filtered_weights)
LOGITS = np.random.RandomState(0).normal(size=(4, 50)).astype(np.float32) * 2


def expected(row, sampling):
    """Returns the probabilities of all tokens after the filters, one token at a time."""
    p = np.exp(row.astype(np.float64) / sampling.temperature)
    best_first = sorted(range(len(p)), key=lambda i: -p[i])
    if sampling.top_k:
        for i in best_first[sampling.top_k :]:
            p[i] = 0
    total, reached = p.sum(), 0.0
    for i in best_first:
        if reached >= sampling.top_p * total:
            p[i] = 0
        reached += p[i]
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def rows(sampling, n, seeds=0):
    """Returns the same values for n rows."""
    return sampling_rows([sampling] * n, checked_seeds(seeds, n))


SETTINGS = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.0, top_k=5),
    Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.1),
    Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=1000),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_filters_keep_what_their_definitions_keep(sampling):
    weights = np.asarray(filtered_weights(jnp.asarray(LOGITS), rows(sampling, 4)))
    for row, got in zip(LOGITS, weights, strict=True):
        np.testing.assert_allclose(got / got.sum(), expected(row, sampling), rtol=2e-6, atol=1e-9)


def test_filters_keep_what_a_stable_sort_keeps_among_many_equals():
    # Given logits of a few values each, infinite ones of masked words among them, and settings drawn at random
    random = np.random.RandomState(1)
    logits = (random.randint(-6, 6, (400, 50)) / 2).astype(np.float32)
    logits[::3, ::5] = -np.inf
    logits[(logits == 0) & (np.arange(50) % 2 == 1)] = -0.0
    settings = [
        Sampling(
            float(random.choice([0.3, 1.0, 2.0])),
            top_k=int(random.choice([0, 1, 7, 25, 49, 50, 1000])),
            top_p=float(random.choice([1.0, random.uniform()])),
            min_p=float(random.choice([0.0, random.uniform(0, 0.5)])),
        )
        for _ in logits
    ]
    weights = filtered_weights(jnp.asarray(logits), sampling_rows(settings, checked_seeds(0, len(logits))))
    for row, sampling, got in zip(logits, settings, np.asarray(weights), strict=True):
        want = expected(row, sampling)
        np.testing.assert_array_equal(got > 0, want > 0, err_msg=f"{sampling} of {row}")


def test_places_are_ordered_as_floats_are():
    floats = np.array([-np.inf, -3e38, -1.5, -1e-30, -0.0, 0.0, 1e-30, 1.5, 3e38, np.inf], np.float32)
    places = np.asarray(draw.float_places(jnp.asarray(floats)[None])[0]).astype(np.int64)
    np.testing.assert_array_equal(np.sign(np.diff(places)), np.sign(np.diff(floats.astype(np.float64))))


@pytest.mark.parametrize("words", [1, 2, 31, 32, 33])
def test_a_draw_never_takes_a_token_without_weight(words):
    random = np.random.RandomState(words)
    weights = random.randint(0, 3, (50, words)).astype(np.float32)
    weights[weights.sum(1) == 0, 0] = 1
    total, draws = weights.sum(1), np.concatenate([[0.0, 0.0, 1.0, 1.0], random.uniform(size=46)]).astype(np.float32)
    found = np.asarray(draw.index_of(jnp.asarray(weights), jnp.asarray(draws * total)))
    for row, token, target in zip(weights, found, draws * total, strict=True):
        assert row[token] > 0 and row[:token].sum() <= target
        assert row[: token + 1].sum() > target or not row[token + 1 :].any()


def test_rows_of_one_batch_have_values_of_their_own():
    # Given each setting in another row of one batch, with a greedy row among them
    mixed = [Sampling(), *SETTINGS]
    logits = jnp.asarray(np.resize(LOGITS, (len(mixed), 50)))
    batched = sampling_rows(mixed, checked_seeds(np.arange(len(mixed)), len(mixed)))
    at = jnp.arange(len(mixed), dtype=jnp.int32)
    drawn = sample(logits, batched, at)
    assert drawn[0] == logits[0].argmax()
    # Then each row draws the token that it draws in a batch of its own
    for i, one in enumerate(mixed):
        single = sample(logits[i : i + 1], rows(one, 1, i), at[i : i + 1])
        assert single[0] == drawn[i]


def test_top_k_keeps_exactly_k_of_equals():
    weights = filtered_weights(jnp.zeros((1, 10)), rows(Sampling(1.0, top_k=3), 1))
    assert np.flatnonzero(weights[0]).tolist() == [0, 1, 2]


def test_draws_have_the_right_frequencies():
    sampling, n = Sampling(1.0, top_k=6), 4000
    logits, positions = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (n, 50)), jnp.zeros(n, jnp.int32)
    drawn = np.asarray(sample(logits, rows(sampling, n, np.arange(n)), positions))
    # draws of one seed at successive positions are as independent
    later = np.asarray(sample(logits, rows(sampling, n), jnp.arange(n, dtype=jnp.int32)))
    p = expected(LOGITS[0], sampling)
    for found in (drawn, later):
        counts = np.bincount(found, minlength=50)
        assert counts[p == 0].sum() == 0
        # chi-square with 5 degrees of freedom stays under 20.5 with probability 0.999; the seeds are fixed
        assert (((counts - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum() < 20.5
    assert (drawn != later).any()


def test_all_64_bits_of_a_seed_count():
    seeds = [0, 1, 2**31, 2**32, 2**62, 2**63 - 1]
    drawn = [
        tuple(np.asarray(sample(jnp.zeros((9, 500)), rows(Sampling(1.0), 9, seed), jnp.arange(9, dtype=jnp.int32))))
        for seed in seeds
    ]
    assert len(set(drawn)) == len(seeds)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "seeds lie between -1 and -1, expected 0 to 2..63 - 1"),
        (2**63, "seeds lie between"),
        (10**20, "seeds are object, expected integers of at most 64 bits"),
        (1.0, "seeds are float64"),
        (True, "seeds are bool"),
        ([1, 2], "seeds have shape .2,., expected one seed, or one for each of 3 rows"),
    ],
)
def test_bad_seeds_are_refused(seed, message):
    with pytest.raises(ValueError, match=message):
        checked_seeds(np.asarray(seed), 3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30, float("inf")])
def test_no_temperature_makes_a_token_of_nothing(temperature):
    # The coldest are greedy except for ties, the hottest uniform, and none is NaN
    drawn = np.asarray(sample(jnp.asarray(LOGITS), rows(Sampling(temperature), 4), jnp.zeros(4, jnp.int32)))
    if temperature < 1:
        np.testing.assert_array_equal(drawn, LOGITS.argmax(-1))
    else:
        assert len(set(drawn)) > 1 or (drawn != LOGITS.argmax(-1)).any()


def test_greedy_is_the_best_token_whatever_the_filters():
    greedy = sample(jnp.asarray(LOGITS), rows(Sampling(0.0, top_k=3, min_p=0.5), 4), jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(greedy, LOGITS.argmax(-1))


def test_nothing_is_sorted_and_greedy_rows_alone_draw_nothing():
    values = rows(Sampling(), 4)
    jaxpr = jax.make_jaxpr(draw.sample)(jnp.asarray(LOGITS), values, jnp.zeros(4, jnp.int32))
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count("cond") == 1 and not {"exp", "scan", "random_bits"} & set(names)
    assert "sort" not in str(jaxpr) and "top_k" not in str(jaxpr)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, Sampling()),
        ({"eos_token_id": 5}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.95}, Sampling(0.6, top_p=0.95)),
        ({"do_sample": True, "top_k": 20, "min_p": 0.01, "top_p": None}, Sampling(1.0, top_k=20, min_p=0.01)),
        ({"do_sample": False, "temperature": 0.6}, Sampling()),
        ({"top_p": 0.95}, Sampling()),
        ({"temperature": 0}, Sampling()),
    ],
)
def test_generation_config_says_how_answers_are_drawn(tmp_path, said, expected):
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert Sampling.from_folder(tmp_path) == expected


def test_the_default_holds_where_generation_config_says_nothing(tmp_path):
    drawn = Sampling.recommended(thinking=False)
    assert (drawn.temperature, drawn.top_p) == (0.6, 0.95) and Sampling.recommended(thinking=True).temperature == 1.0
    said = {
        None: drawn,
        '{"max_length": 9}': drawn,
        '{"do_sample": false}': Sampling(),
        '{"temperature": 2}': Sampling(2.0),
    }
    for text, expected in said.items():
        if text is not None:
            (tmp_path / "generation_config.json").write_text(text)
        assert Sampling.from_folder(tmp_path, drawn) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"temperature": -1}', r"temperature is -1, expected a number from 0"),
        ('{"temperature": "hot"}', r"temperature is 'hot', expected a number"),
        ('{"temperature": NaN}', r"holds NaN"),
        ('{"do_sample": 1}', r"do_sample is 1, expected true or false"),
        ('{"do_sample": true, "top_k": 1.5}', r"top_k is 1\.5, expected an integer"),
        ('{"do_sample": true, "top_p": 0}', r"top_p is 0, expected a number above 0 to 1"),
        ('{"do_sample": true, "min_p": 1.5}', r"min_p is 1\.5, expected a number from 0 to 1"),
        ("[]", r"expected a JSON object"),
    ],
)
def test_a_generation_config_that_says_nonsense_is_named(tmp_path, said, message):
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ConfigError, match=rf"generation_config\.json.*{message}"):
        Sampling.from_folder(tmp_path)
