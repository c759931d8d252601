"""Drawn answers do not depend on what runs beside them; logprobs, penalties and masks change only whose they are."""

import asyncio

import jax
import numpy as np
import pytest

import kimi_jax
from kimi_jax.engine import Engine, Request
from kimi_jax.engine.sequence import Status
from kimi_jax.model.context import PAGE

NAMES = ["k2.5", pytest.param("kimi-linear", marks=pytest.mark.slow)]
RANDOM = np.random.RandomState(0)
LENGTHS = (5, 150, 300, 131)
PROMPTS = [RANDOM.randint(0, 500, length).astype(np.int32) for length in LENGTHS]
NEW = 12
DRAWN = kimi_jax.Sampling(1.0, top_p=0.9, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def engine(two_layer_model):
    """Maps a name to an engine of three slots, of the shapes of test_engine.py, so that programs are shared."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = Engine(two_layer_model(name), slots=3, cache_memory="8MiB", prefill_chunk=64)
        return made[name]

    yield of
    for one in made.values():
        one.close()


def ask(prompt, **more):
    return Request(prompt, **({"max_new_tokens": NEW, "stop_ids": ()} | more))


async def read(engine, request):
    """Returns all tokens of a request, and its last event."""
    tokens = []
    async for event in engine.submit(request):
        tokens += event.tokens
    return tokens, event


def together(engine, *requests):
    """Returns tokens and last event of each of these requests, which run at one time."""

    async def everybody():
        return await asyncio.gather(*(read(engine, request) for request in requests))

    return asyncio.run(everybody())


class Provider:
    """Allows tokens that leave the remainder `len(answer) % 3` by 3, after the tokens of `begin`, which it forces or,
    where `steps`, masks; ends after `length` tokens."""

    def __init__(self, words, begin=(), steps=False, length=None):
        self.words, self.begin, self.steps, self.length = words, list(begin), steps, length

    def next_mask(self, tokens):
        allowed = np.arange(-(-self.words // 32) * 32) % 3 == len(tokens) % 3
        if len(tokens) < len(self.begin):
            allowed[:] = False
            allowed[self.begin[len(tokens)]] = True
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def forced(self, tokens):
        return [] if self.steps else self.begin[len(tokens) :]

    def stopped(self, tokens):
        return len(tokens) == self.length


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_is_the_same_alone_beside_others_preempted_and_cached(engine, name, monkeypatch):
    one = engine(name)
    programs = one.stats().compiled_programs
    requests = [ask(prompt, sampling=DRAWN, seed=i, max_new_tokens=20) for i, prompt in enumerate(PROMPTS)]
    alone = [one.answer(request).tokens for request in requests]
    # Given greedy neighbours and prompts in the cache, and later a sequence that gives up its pages every few steps
    plan = one.scheduler.plan

    def preempting():
        decoding = [s for s in one.scheduler.running if s.status is Status.DECODE]
        if one.scheduler.step % 7 == 0 and decoding:
            one.scheduler._preempt(decoding[-1])
        return plan()

    for planned in (plan, preempting):
        monkeypatch.setattr(one.scheduler, "plan", planned)
        answers = together(one, *requests, *(ask(prompt) for prompt in PROMPTS))
        assert [tokens for tokens, _ in answers[: len(requests)]] == alone
    assert answers[2][1].usage.cached_tokens == 2 * PAGE
    assert one.stats().compiled_programs == programs
    # Then `generate` draws these tokens too
    if name == NAMES[0]:
        tokens = np.zeros((len(PROMPTS), max(LENGTHS)), np.int32)
        for row, prompt in enumerate(PROMPTS):
            tokens[row, : len(prompt)] = prompt
        seeds, lengths = np.arange(len(PROMPTS)), np.array(LENGTHS)
        drawn = kimi_jax.generate(one.model, tokens, 20, lengths=lengths, stop_ids=(), seed=seeds, sampling=DRAWN)
        assert drawn.tolist() == alone


def test_a_repetition_penalty_holds_for_prompt_and_answer_of_its_own_row(engine):
    one, known = engine("k2.5"), set(PROMPTS[1].tolist())
    settings = [kimi_jax.Sampling(repetition_penalty=penalty) for penalty in (100.0, 0.01, 1.0)]
    others, again, plain = (
        tokens for tokens, _ in together(one, *(ask(PROMPTS[1], sampling=sampling) for sampling in settings))
    )
    assert len({*others, *known}) == NEW + len(known) and known.issuperset(again)
    assert plain == one.answer(ask(PROMPTS[1])).tokens


def test_banned_tokens_are_chosen_by_no_step_of_their_own_row(engine):
    one = engine("k2.5")
    programs, plain = one.stats().compiled_programs, one.answer(ask(PROMPTS[2])).tokens
    banned = tuple(sorted({plain[0], plain[-1]}))
    (held, _), (free, _) = together(one, ask(PROMPTS[2], banned=banned), ask(PROMPTS[2]))
    assert free == plain and not set(banned) & set(held)
    prompt = np.concatenate([PROMPTS[2], held])[None].astype(np.int32)
    logits = np.array(one.model(prompt)[0, len(PROMPTS[2]) - 1 : -1])
    logits[:, list(banned)] = -np.inf
    assert logits.argmax(-1).tolist() == held
    assert one.stats().compiled_programs == programs


def test_logprobs_come_with_the_tokens_of_who_asks(engine):
    one = engine("k2.5")
    programs, plain = one.stats().compiled_programs, one.answer(ask(PROMPTS[1]))
    assert plain.logprobs == []
    drawn = ask(PROMPTS[0], sampling=DRAWN, top_logprobs=0)
    (tokens, _), (other, _) = together(one, ask(PROMPTS[1], top_logprobs=3), drawn)
    found = one.answer(ask(PROMPTS[1], top_logprobs=3))
    assert found.tokens == tokens == plain.tokens and len(found.logprobs) == NEW
    logits = one.model(np.concatenate([PROMPTS[1], tokens])[None].astype(np.int32))[0, len(PROMPTS[1]) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for row, token, logprobs in zip(expected, tokens, found.logprobs, strict=True):
        np.testing.assert_allclose(logprobs.logprob, row[token], atol=1e-4)
        assert logprobs.top[0] == (token, logprobs.logprob) and len(logprobs.top) == 3
        np.testing.assert_allclose([value for _, value in logprobs.top], np.sort(row)[:-4:-1], atol=1e-4)
    assert other == one.answer(ask(PROMPTS[0], sampling=DRAWN)).tokens and one.answer(drawn).logprobs[0].top == ()
    assert one.stats().compiled_programs == programs


@pytest.mark.parametrize("name", NAMES)
def test_masks_hold_for_their_own_row_and_forced_tokens_are_taken_in(engine, name):
    one = engine(name)
    words, programs = one.config.text.vocab_size, one.stats().compiled_programs
    plain = one.answer(ask(PROMPTS[1])).tokens
    begin = RANDOM.randint(0, 500, PAGE + 20).tolist()
    room = {"max_new_tokens": len(begin) + NEW}
    stepped, forced, short, beside = (
        ask(PROMPTS[3], mask_provider=Provider(words, begin, steps=True), **room),
        ask(PROMPTS[3], mask_provider=Provider(words, begin), sampling=kimi_jax.Sampling(), **room),
        ask(PROMPTS[0], mask_provider=Provider(words, length=7)),
        ask(PROMPTS[1]),
    )
    answers = together(one, stepped, forced, short, beside, beside)
    (by_steps, _), (at_once, last), (few, stopped), (other, _), _ = answers
    assert by_steps == at_once and by_steps[: len(begin)] == begin and len(at_once) == len(begin) + NEW
    assert all(token % 3 == place % 3 for place, token in enumerate(at_once) if place >= len(begin))
    assert last.finish_reason == "length" and last.usage.completion_tokens == len(at_once)
    assert [token % 3 for token in few] == [0, 1, 2, 0, 1, 2, 0] and stopped.finish_reason == "stop"
    assert other == plain and one.stats().compiled_programs == programs
    # Then penalties and stop ids see forced tokens too
    penalized = {"sampling": DRAWN, "seed": 3, **room}
    steps, once = (ask(PROMPTS[3], mask_provider=Provider(words, begin, s), **penalized) for s in (True, False))
    assert one.answer(steps).tokens == one.answer(once).tokens
    cut = one.answer(ask(PROMPTS[3], mask_provider=Provider(words, begin), stop_ids=(begin[9],), **room))
    assert cut.tokens == begin[: begin.index(begin[9])] and cut.finish_reason == "stop"
    with_logprobs = one.answer(ask(PROMPTS[0], mask_provider=Provider(words, begin[:4]), top_logprobs=1))
    assert with_logprobs.tokens[:4] == begin[:4] and len(with_logprobs.logprobs) == NEW


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("next_mask", lambda self, tokens: {}[1] if len(tokens) == 3 else None, "3 new tokens .* failed: KeyError: 1"),
        ("stopped", lambda self, tokens: exit(), "the mask provider failed: SystemExit"),
        ("next_mask", lambda self, tokens: np.zeros(24, np.uint32), "allows no token"),
        ("next_mask", lambda self, tokens: np.ones(24), r"mask is float64 \[24\], expected 32-bit integers \[24\]"),
        ("next_mask", lambda self, tokens: np.ones(3, np.int32), r"int32 \[3\]"),
        ("forced", lambda self, tokens: [10**6], "forces tokens 1000000 to 1000000"),
        ("forced", lambda self, tokens: "abc", "something else than a list"),
        ("stopped", lambda self, tokens: None, "NoneType for stopped"),
    ],
)
def test_a_provider_that_fails_ends_its_own_request_alone(engine, method, answer, message):
    one = engine("k2.5")
    assert one.config.text.vocab_size == 24 * 32
    provider = type("Broken", (Provider,), {method: answer})(one.config.text.vocab_size)
    (_, bad), (_, good) = together(one, ask(PROMPTS[0], mask_provider=provider), ask(PROMPTS[1]))
    assert bad.finish_reason == "error" and good.finish_reason == "length"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(bad.error)
    stats = one.stats()
    assert (stats.free_pages, stats.free_slots, stats.running) == (stats.pages, 3, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20, or None"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"banned": (-1, 5)}, r"banned are \[-1, 5\], expected token ids from 0 to"),
        ({"banned": (1, 2, 3, 4, 5)}, "5 banned, expected at most 4"),
        ({"top_logprobs": True}, "top_logprobs is True, expected a whole number"),
    ],
)
def test_bad_wishes_are_refused_in_words(engine, values, message):
    with pytest.raises(ValueError, match=message):
        engine("k2.5").answer(ask(PROMPTS[0], **values))


def test_what_is_no_mask_provider_is_refused(engine):
    request = ask(PROMPTS[0])
    object.__setattr__(request, "mask_provider", object())  # (the types of fields are checked only in tests)
    with pytest.raises(ValueError, match="mask_provider is object, expected the methods of MaskProvider"):
        engine("k2.5").answer(request)
