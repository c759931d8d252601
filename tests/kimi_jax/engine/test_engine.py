"""The engine's answers are those of `generate`, whatever runs beside them, is cached, cancelled or refused."""

import asyncio
import threading

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle_engine import forget_all

import kimi_jax
from kimi_jax.engine import Engine, QueueFullError, Request
from kimi_jax.engine.pages import PagePool
from kimi_jax.model.context import PAGE

NAMES = ["k2.5", "kimi-linear"]
RANDOM = np.random.RandomState(0)
LENGTHS = (5, 150, 300, 400, 131, 128, 129, 256, 1)
PROMPTS = [RANDOM.randint(0, 500, length).astype(np.int32) for length in LENGTHS]
NEW = 12


@pytest.fixture(scope="module")
def engine(two_layer_model):
    """Maps a name to an engine of three slots, too few for all requests at once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = Engine(two_layer_model(name), slots=3, cache_memory="8MiB", prefill_chunk=64)
        return made[name]

    yield of
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def expected(two_layer_model):
    """Maps a name to the answers of `generate` to PROMPTS."""
    known = {}

    def of(name):
        if name not in known:
            tokens = np.zeros((len(PROMPTS), max(LENGTHS)), np.int32)
            for row, prompt in enumerate(PROMPTS):
                tokens[row, : len(prompt)] = prompt
            model, lengths = two_layer_model(name), np.array(LENGTHS)
            known[name] = kimi_jax.generate(model, tokens, NEW, lengths=lengths, stop_ids=()).tolist()
        return known[name]

    return of


async def read(engine, request):
    """Returns all tokens of a request, and its last event."""
    tokens = []
    async for event in engine.submit(request):
        tokens += event.tokens
    return tokens, event


def ask(prompt, **more):
    return Request(prompt, **({"max_new_tokens": NEW, "stop_ids": ()} | more))


@pytest.mark.parametrize("name", ["kimi-linear", pytest.param("k2.5", marks=pytest.mark.slow)])
def test_many_at_once_answer_as_each_alone(engine, expected, name):
    one = engine(name)
    programs = one.stats().compiled_programs

    async def everybody():
        quitters = [one.submit(ask(prompt, max_new_tokens=200)) for prompt in PROMPTS[1:4]]
        answers = asyncio.gather(*(read(one, ask(prompt, priority=i % 3)) for i, prompt in enumerate(PROMPTS)))
        for stream in quitters:
            await stream.__anext__()
            await stream.aclose()
        return await answers

    answers = asyncio.run(everybody())
    assert [tokens for tokens, _ in answers] == expected(name)
    for length, (_, last) in zip(LENGTHS, answers, strict=True):
        assert (last.finish_reason, last.error) == ("length", None)
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (length, NEW)
    stats = one.stats()
    assert (stats.free_pages, stats.free_slots, stats.waiting, stats.running) == (stats.pages, 3, 0, 0)
    assert stats.compiled_programs == programs


@pytest.mark.parametrize("name", [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def test_in_few_pages_answers_are_those_of_each_alone(engine, expected, monkeypatch, name):
    """Preempted, resumed and cancelled in a pool of six pages, where the prompts need up to four."""
    one, preempted = engine(name), []
    (shard,), preempt = one.scheduler.shards, one.scheduler._preempt
    forget_all(one)
    whole, shard.pages = shard.pages, PagePool(6)
    monkeypatch.setattr(one.scheduler, "_preempt", lambda sequence: (preempted.append(sequence), preempt(sequence)))
    random, programs = np.random.RandomState(5), one.stats().compiled_programs

    async def everybody():
        async def late(number, request):
            await asyncio.sleep(random.uniform(0, 0.2))
            return number, (await read(one, request))[0]

        async def quitter(prompt):
            stream = one.submit(ask(prompt, max_new_tokens=100, priority=2))
            await stream.__anext__()
            await stream.aclose()

        quitters = [quitter(PROMPTS[number]) for number in (1, 6)]
        asked = [late(number, ask(PROMPTS[number], priority=int(random.randint(3)))) for number in [*range(9)] * 2]
        return (await asyncio.gather(*asked, *quitters))[: len(asked)]

    answers = asyncio.run(everybody())
    for number, tokens in answers:
        assert tokens == expected(name)[number]
    stats = one.stats()
    assert preempted and stats.compiled_programs == programs
    assert (stats.free_pages, stats.free_slots, stats.waiting, stats.running) == (6, 3, 0, 0)
    forget_all(one)
    shard.pages = whole


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_in_the_cache_changes_no_token(engine, expected, name):
    one, (_, _, _, longest, *_) = engine(name), PROMPTS
    one.answer(ask(longest))
    assert one.prefix_ready(longest[: 3 * PAGE]) and not one.prefix_ready(longest[:100])
    again = one.answer(ask(longest))
    assert again.tokens == expected(name)[3] and again.usage.cached_tokens == 3 * PAGE
    drawn = [one.answer(ask(longest, sampling=kimi_jax.Sampling(1.0, top_p=0.9), seed=5)).tokens for _ in range(2)]
    other = np.concatenate([longest[: 2 * PAGE], PROMPTS[1]])
    one.answer(ask(other))
    assert drawn[0] == drawn[1] != again.tokens


@pytest.fixture
def answer_with_logits(engine, monkeypatch):
    """Returns a function from an engine's name and a request to the answer and the logits of its first token."""

    def answer(name, request):
        program, prompt_ends = engine(name).runner.program, []

        def step(cache, batch):
            if batch.phase == "prefill" and batch.segments is None and batch.choosing.any():
                prompt_ends.append((jax.tree.map(jnp.copy, cache), batch))
            return type(program).step(program, cache, batch)

        monkeypatch.setattr(program, "step", step)
        result = engine(name).answer(request)
        ((cache, batch),) = prompt_ends
        return result, np.asarray(program.logits(cache, batch)[1][0])

    return answer


@pytest.mark.parametrize("name", [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def test_a_prefix_of_every_kind_gives_the_tokens_and_logits_of_a_cold_run(engine, answer_with_logits, name):
    """The system prompt of another chat, a whole prompt, two that part from another where no message ends, an answer,
    and a tool's result after it. The last piece of each has 17 to 64 tokens, cold or not: one program."""
    one, random = engine(name), np.random.RandomState(3)
    (end, *_) = one.config.stop_ids

    def text(tokens):
        return random.randint(0, 500, tokens).tolist()

    system, question = [*text(299), end], [*text(139), end]
    placeholder = one.config.media_placeholder_token_id
    answer = [placeholder]
    while placeholder in answer:  # as part of a prompt it would need a picture
        first = [*system, *question, *text(3)]
        answer = one.answer(ask(first, max_new_tokens=200)).tokens
    answered = [*first, *answer, end]
    tools = [*answered, *text(50), end, *text(3)]
    # In a model with states, others have taken the answer's slot since; its last token was never computed
    computed = 5 * PAGE if name == "kimi-linear" else len(answered) - 2
    prompts = {  # and how many tokens of each are there, after all before it were asked in this order
        "the first": (first, 0),
        "the same again": (first, 3 * PAGE),
        "another question": ([*system, *text(144)], 2 * PAGE),
        "a question that parts in its text": ([*first[:390], *text(50)], 3 * PAGE),
        "a system prompt that parts in its text": ([*first[:200], *text(240)], PAGE),
        "an answer": ([*answered, *text(50)], computed),
        "results of tools": (tools, 5 * PAGE),
        "the turn after": ([*tools, *text(90)], 5 * PAGE),
    }
    cold = {}
    for kind, (prompt, _) in prompts.items():
        forget_all(one)
        cold[kind] = answer_with_logits(name, ask(prompt))
        assert cold[kind][0].usage.cached_tokens == 0
    forget_all(one)
    for kind, (prompt, cached) in prompts.items():
        result, logits = answer_with_logits(name, ask(prompt, max_new_tokens=200 if kind == "the first" else NEW))
        assert result.usage.cached_tokens == cached, kind
        assert result.tokens[:NEW] == cold[kind][0].tokens, kind
        np.testing.assert_allclose(logits, cold[kind][1], atol=1e-5, rtol=0, err_msg=kind)


@pytest.mark.parametrize("name", [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def test_a_beginning_that_nobody_named_is_found_by_the_second_request(engine, name):
    """1,500 tokens of all and 700 of each, without ends of messages: 11 of 11 full pages."""
    one, random = engine(name), np.random.RandomState(4)
    forget_all(one)
    shared = random.randint(0, 500, 1500)
    for cached in (0, 11 * PAGE, 11 * PAGE):
        result = one.answer(ask(np.concatenate([shared, random.randint(0, 500, 700)]), max_new_tokens=2))
        assert result.usage.cached_tokens == cached


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_one_prompt_at_once_prefill_it_once(engine, expected, name):
    one = engine(name)
    forget_all(one)

    async def siblings():
        return await asyncio.gather(*(read(one, ask(PROMPTS[3])) for _ in range(5)))

    answers = asyncio.run(siblings())
    assert [tokens for tokens, _ in answers] == [expected(name)[3]] * 5
    assert [last.usage.cached_tokens for _, last in answers] == [0] + [3 * PAGE] * 4


def test_pictures_of_one_size_are_no_prefix_of_each_other(engine):
    one = engine("k2.5")
    config = one.config
    grid = np.array([[1, 4, 4]], np.int32)
    count = 16 // int(np.prod(config.vision.merge_kernel_size))
    before, after = np.full(120, 3), np.full(60, 4)
    tokens = np.concatenate([before, np.full(count, config.media_placeholder_token_id), after]).astype(np.int32)
    pictures = [kimi_jax.Media(cases.media(grid[0]) * scale, grid) for scale in (1.0, -1.0)]
    programs = one.stats().compiled_programs
    answers = [one.answer(ask(tokens, media=picture)) for picture in (*pictures, *pictures)]
    assert one.stats().compiled_programs == programs
    expected = [kimi_jax.generate(one.model, tokens[None], NEW, media=p, stop_ids=())[0].tolist() for p in pictures]
    assert [answer.tokens for answer in answers] == expected * 2 and expected[0] != expected[1]
    assert [answer.usage.cached_tokens for answer in answers] == [0, 0, PAGE, PAGE]


def test_a_row_that_is_not_finite_ends_alone(engine, expected):
    one, grid = engine("k2.5"), np.array([[1, 4, 4]], np.int32)
    config = one.config
    count = 16 // int(np.prod(config.vision.merge_kernel_size))
    tokens = np.full(count, config.media_placeholder_token_id, np.int32)
    nan = kimi_jax.Media(np.full((16, 3, 14, 14), np.nan, np.float32), grid)

    async def both():
        return await asyncio.gather(read(one, ask(tokens, media=nan)), read(one, ask(PROMPTS[1])))

    (none, bad), (tokens, good) = asyncio.run(both())
    assert none == [] and bad.finish_reason == "error" and "not finite" in bad.error
    assert tokens == expected("k2.5")[1] and good.error is None


def test_stop_ids_end_an_answer_without_being_part_of_it(engine, expected):
    one, answer = engine("k2.5"), expected("k2.5")[2]
    stop = answer[4]
    result = one.answer(ask(PROMPTS[2], stop_ids=(stop,)))
    assert result.tokens == answer[: answer.index(stop)] and result.finish_reason == "stop"
    assert result.usage.completion_tokens == len(result.tokens) + 1


def test_a_stop_string_ends_an_answer_before_it(engine, expected, tiny_tokenizer_dir, monkeypatch):
    one, tokenizer = engine("k2.5"), kimi_jax.Tokenizer.from_folder(tiny_tokenizer_dir)
    monkeypatch.setattr(one, "tokenizer", tokenizer)
    answer = expected("k2.5")[2]
    texts = [tokenizer.decode([token]) for token in answer]
    place = next(i for i in range(3, NEW) if len(texts[i]) > 1 and texts[i] not in "".join(texts[:i]))
    result = one.answer(ask(PROMPTS[2], stop_strings=(texts[place],)))
    assert result.tokens == answer[:place] and result.finish_reason == "stop"
    assert one.answer(ask(PROMPTS[2], stop_strings=("\0" * 3,))).tokens == answer


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.zeros(0, np.int32)), "at least one token"),
        (Request([1, 10**6]), "vocabulary|token"),
        (Request([1], max_new_tokens=0), "at least 1 new token"),
        (Request([1], max_new_tokens=True), "whole number"),
        (Request([1] * 10, max_new_tokens=10**7), "in all"),
        (Request([1], seed=-1), "seeds"),
        (Request([1], seed=2**64), "seeds|integers"),
        (Request([1], stop_ids=(-3,)), "stop_ids"),
        (Request([1], stop_ids=range(40)), "at most 16"),
        (Request([1], stop_strings=("x",)), "with a tokenizer"),
        (Request([1], stop_strings=("x" * 10_000,)), "10,000 characters"),
        (Request([1], priority=True), "priority is True"),
        (Request([1], timeout=-1.0), "timeout is -1"),
        (Request([1], shared_prefixes=(True,)), "shared_prefixes is True"),
        (Request([1], media=kimi_jax.Media(np.zeros((4, 3, 14, 14), np.float32), np.array([[1, 2, 2]]))), "placehold"),
    ],
)
def test_a_bad_request_is_refused_in_words_and_alone(engine, expected, request_, message):
    with pytest.raises((ValueError, TypeError, OverflowError), match=message):
        engine("k2.5").answer(request_)
    assert engine("k2.5").answer(ask(PROMPTS[0])).tokens == expected("k2.5")[0]


def test_a_dropped_stream_a_timeout_and_a_full_queue(engine):
    one = engine("k2.5")

    async def impatient():
        async for _ in one.submit(ask(PROMPTS[0], max_new_tokens=2000)):
            break
        late = await read(one, ask(PROMPTS[1], max_new_tokens=2000, timeout=0.2))
        one.max_waiting = 0
        try:
            with pytest.raises(QueueFullError):
                one.submit(ask(PROMPTS[0]))
        finally:
            one.max_waiting = 1024
        return late

    _, last = asyncio.run(impatient())
    assert last.finish_reason == "cancelled" and "0.2 s" in last.error
    assert one.answer(ask(PROMPTS[0])).finish_reason == "length"
    assert one.stats().running == 0


def test_a_closed_or_failed_engine_tells_everyone(two_layer_model):
    def waits(engine, results):
        results.append(engine.answer(ask(PROMPTS[0], max_new_tokens=5000)))

    for failure in (False, True):
        one = Engine(two_layer_model("k2.5"), slots=3, cache_memory="8MiB", prefill_chunk=64)
        results = []
        thread = threading.Thread(target=waits, args=(one, results))
        if failure:
            one.runner.run = lambda step: 1 / 0
        thread.start()
        while not failure and not one.stats().running:
            pass
        if not failure:
            one.close()
        thread.join()
        assert results[0].finish_reason == ("error" if failure else "cancelled")
        with pytest.raises(RuntimeError, match="has failed: division" if failure else "closed"):
            one.answer(ask(PROMPTS[0]))
        one.close()
