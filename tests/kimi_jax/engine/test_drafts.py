"""Answers are the same with drafts and without, whatever is drafted, and wherever an answer ends."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from idle_engine import forget_all

import kimi_jax
from kimi_jax.engine import Engine, Request
from kimi_jax.runtime.drafts import PromptLookup
from kimi_jax.runtime.sampling import Sampling
from sharding import make_mesh

NAMES = ["kimi-linear", pytest.param("k2.5", marks=pytest.mark.slow), pytest.param("k3", marks=pytest.mark.slow)]
NEW = 24


class Nothing:
    """Drafts nothing, as if there were no drafter: the steps are those of other engines."""

    def propose(self, tokens, count):
        return ()


class Whim:
    """Names the drafter of the requests to come."""

    drafter = Nothing


class Guesser:
    """Drafts what answers are to be, now and then with a token changed or fewer tokens, by whims of its own."""

    answers: ClassVar = {}  # by prompt

    def __init__(self):
        self.random = np.random.RandomState(7)

    def propose(self, tokens, count):
        for prompt, answer in self.answers.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                draft = answer[len(tokens) - len(prompt) :][: self.random.randint(count + 1)]
                if draft and self.random.rand() < 0.3:
                    draft[self.random.randint(len(draft))] = 3
                return draft
        return ()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return kimi_jax.Tokenizer.from_folder(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def engines(two_layer_model, tokenizer):
    """Maps a name to an engine of three slots whose drafter is `Whim.drafter`."""
    made = {}

    def of(name):
        if name not in made:
            options = {"cache_memory": "8MiB", "prefill_chunk": 64, "tokenizer": tokenizer}
            made[name] = Engine(two_layer_model(name), slots=3, **options, draft=lambda: Whim.drafter(), draft_tokens=4)
        return made[name]

    yield of
    for one in made.values():
        one.close()


def answers(engine, requests, drafter=Nothing):
    """Returns the answers to requests that come at one time, for which a drafter drafts."""
    Whim.drafter = drafter
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(engine.answer, requests))


def repetitive(seed, length):
    """Returns a prompt that repeats a part of itself."""
    random = np.random.RandomState(seed)
    part = random.randint(0, 500, random.randint(3, 30))
    return np.tile(part, -(-length // len(part)))[:length].tolist()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 270), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    new=st.integers(1, NEW),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_the_same_answers(engines, name, lengths, seed, new, temperature):
    # Given prompts that repeat themselves, of which each stops somewhere in its answer
    sampling = Sampling(temperature=temperature, top_p=0.95)
    prompts = [repetitive(seed + i, length) for i, length in enumerate(lengths)]
    ask = functools.partial(Request, max_new_tokens=NEW, stop_ids=(), sampling=sampling, seed=seed)
    engine = engines(name)
    whole = answers(engine, [ask(prompt) for prompt in prompts])
    Guesser.answers = {tuple(prompt): result.tokens for prompt, result in zip(prompts, whole, strict=True)}
    ends = [(result.tokens[seed % NEW],) for result in whole]
    requests = [ask(prompt, max_new_tokens=new) for prompt in prompts]
    requests += [ask(prompt, stop_ids=end) for prompt, end in zip(prompts, ends, strict=True)]

    # Then drafts change nothing, with beginnings found in the cache and without
    expected = answers(engine, requests)
    for drafter in (PromptLookup, Guesser):
        forget_all(engine)
        for found, result in zip(answers(engine, requests * 2, drafter), expected * 2, strict=True):
            assert found.tokens == result.tokens and found.finish_reason == result.finish_reason
            assert found.usage.completion_tokens == result.usage.completion_tokens


def drafted_alike(engine, request):
    """Answers a request without drafts and with guesses of its answer. Returns the answer with them, after asserting
    that it is the one without; and what `Stats` say was drafted and accepted, and the number of steps."""
    (expected,), before = answers(engine, [request]), engine.stats()
    Guesser.answers = Guesser.answers | {tuple(request.tokens): expected.tokens}
    steps = engine.scheduler.step
    (found,) = answers(engine, [request], Guesser)
    assert (found.tokens, found.finish_reason, found.logprobs) == (
        expected.tokens,
        expected.finish_reason,
        expected.logprobs,
    )
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    after = engine.stats()
    assert after.compiled_programs == before.compiled_programs
    counts = (getattr(after, name) - getattr(before, name) for name in ("drafted_tokens", "accepted_tokens"))
    return found, *counts, engine.scheduler.step - steps


def test_drafts_are_counted_and_right_ones_save_steps(engines):
    request = Request(repetitive(5, 40), max_new_tokens=64, stop_ids=())
    _, drafted, accepted, steps = drafted_alike(engines("kimi-linear"), request)
    assert 20 < accepted < drafted < 200 and steps < 70 - accepted / 2


def test_a_stop_string_inside_a_draft(engines, tokenizer):
    engine, prompt = engines("kimi-linear"), repetitive(8, 60)
    whole, *_ = drafted_alike(engine, Request(prompt, max_new_tokens=NEW, stop_ids=()))
    for at in range(5, 12):
        text = tokenizer.decode(whole.tokens[at : at + 2])
        Guesser.answers = {tuple(prompt): whole.tokens}
        expected = Request(prompt, max_new_tokens=NEW, stop_ids=(), stop_strings=(text,))
        assert drafted_alike(engine, expected)[0].finish_reason == "stop"
    # and who goes on from there finds sound pages and states
    drafted_alike(engine, Request(prompt + whole.tokens[:9], max_new_tokens=NEW, stop_ids=()))


@pytest.mark.parametrize("more", [{"top_logprobs": 1}, {"sampling": Sampling(presence_penalty=1.5)}])
def test_requests_whose_tokens_depend_on_one_another_get_no_drafts(engines, more):
    request = Request(repetitive(9, 50), max_new_tokens=NEW, stop_ids=(), **more)
    assert drafted_alike(engines("kimi-linear"), request)[1:3] == (0, 0)


def test_generate_drafts_too(two_layer_model):
    prompts = np.array([repetitive(1, 40), repetitive(2, 40)], np.int32)
    lengths = np.array([40, 23])
    options = {"lengths": lengths, "stop_ids": (), "temperature": 0.5, "seed": 3}
    expected = kimi_jax.generate(two_layer_model("kimi-linear"), prompts, 30, **options)
    Guesser.answers = {
        tuple(row[:n].tolist()): new.tolist() for row, n, new in zip(prompts, lengths, expected, strict=True)
    }
    for draft in (PromptLookup, Guesser):
        found = kimi_jax.generate(two_layer_model("kimi-linear"), prompts, 30, **options, draft=draft, draft_tokens=4)
        np.testing.assert_array_equal(found, expected)


def test_a_number_of_drafts_that_no_step_takes_is_refused(two_layer_model):
    with pytest.raises(ValueError, match="draft_tokens is 8, expected 1 to 7"):
        Engine(two_layer_model("kimi-linear"), slots=1, draft=PromptLookup, draft_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("k2.5", "2x2x2x1"), ("kimi-linear", "2x2x2x1"), ("k3", "1x2x4x1")])
def test_drafts_on_a_mesh(two_layer_checkpoint, two_layer_model, name, shape):
    prompts = np.array([repetitive(seed, 140) for seed in range(4)], np.int32)
    options = {"lengths": np.array([140, 126, 23, 1]), "stop_ids": ()}
    expected = kimi_jax.generate(two_layer_model(name), prompts, 12, **options)
    model = kimi_jax.load(two_layer_checkpoint(name), dtype=jnp.float32, mesh=make_mesh(shape))
    rows = zip(prompts, options["lengths"], expected, strict=True)
    Guesser.answers = {tuple(row[:length].tolist()): new.tolist() for row, length, new in rows}
    found = kimi_jax.generate(model, prompts, 12, **options, draft=Guesser)
    np.testing.assert_array_equal(found, expected)
