"""Answers are the same beside a draft head as without, and the head's cache is right wherever a sequence's pages come
from."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from idle_engine import forget_all

import kimi_jax
from checkpoints import load_head
from checkpoints.toy import head_config, write_toy
from kimi_jax.config_json import ConfigError, from_dict
from kimi_jax.engine import Engine, Request, sizes
from kimi_jax.engine.dispatched import Dispatched
from kimi_jax.looking import look
from kimi_jax.runtime.batch import pages_in_order
from kimi_jax.runtime.drafts import DraftCounts
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.pools import pool_bytes
from kimi_jax.runtime.sampling import Sampling
from sharding import Partition, make_mesh

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
ENGINES = [("k2.5", "eagle3.1-mla"), slow("kimi-linear", "eagle3-llama"), slow("k3", "eagle3-mla")]
NEW, PAGES = 24, 6


@pytest.fixture(scope="module")
def head_folder(two_layer_checkpoint, tmp_path_factory):
    """Returns a function from a golden's name and a kind of head to the folder of a head for the two-layer model."""
    folder = tmp_path_factory.mktemp("heads_of_two_layers")

    @functools.cache
    def write(name, kind):
        config = json.loads((two_layer_checkpoint(name) / "config.json").read_text())
        return write_toy(folder / f"{name}-{kind}", head_config(config, kind), seed=1)

    return write


@pytest.fixture(scope="module")
def head_of(head_folder, two_layer_model):
    """Returns a function from a golden's name and a kind to the loaded head."""
    return lambda name, kind: load_head(head_folder(name, kind), two_layer_model(name).config, dtype=jnp.float32)


class Reading:
    """Notes what a head drafts after which tokens, as an engine reads it, and replaces it."""

    def __init__(self):
        self.noted, self.replace = {}, nothing

    def follow(self, read, step):
        for sequence, tokens, finish, logprobs, drafts in read(step):
            known = (*sequence.tokens, *tokens)
            if drafts:
                self.noted.setdefault(known, []).append(tuple(drafts))
            yield sequence, tokens, finish, logprobs, self.replace(known, drafts)

    def assert_drafts_depend_on_tokens_alone(self, twice):
        """Asserts that every draft after the same tokens is the same, and that at least `twice` of them occur twice."""
        assert all(len(set(drafts)) == 1 for drafts in self.noted.values())
        assert sum(len(drafts) > 1 for drafts in self.noted.values()) >= twice


def nothing(known, drafts):
    return []


def own(known, drafts):
    return drafts


class Answers:
    """Drafts tokens of known answers to prompts in place of what a head does."""

    def __init__(self, results, prompts):
        self.whole = [(*prompt, *result.tokens) for prompt, result in zip(prompts, results, strict=True)]
        self.random = np.random.RandomState(7)

    def right(self, known, drafts):
        found = next((whole for whole in self.whole if whole[: len(known)] == known), known)
        return list(found[len(known) :][: len(drafts)])

    def wrong(self, known, drafts):
        return [(token + 1) % 500 for token in self.right(known, drafts)]

    def sometimes_right(self, known, drafts):
        draft = self.right(known, drafts)[: self.random.randint(5)]
        if draft and self.random.rand() < 0.3:
            draft[self.random.randint(len(draft))] = 3
        return draft


@pytest.fixture(scope="module")
def reading():
    made, read = Reading(), Dispatched.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatched, "read", lambda step: made.follow(read, step))
        yield made


@pytest.fixture(scope="module")
def engines(two_layer_checkpoint, head_of, reading):
    """Maps a golden's name and a kind of head to an engine of four slots, for text, with fewer pages than they need.

    That of K2.5 takes prompts in rows of one length, and decodes all slots, since each shape is a program to compile.
    """
    made = {}

    def of(name, kind):
        if (name, kind) not in made:
            model = kimi_jax.load(two_layer_checkpoint(name), dtype=jnp.float32, only=("model", "lm_head"))
            head = head_of(name, kind)
            page = pool_bytes(model.config, model.dtype, Partition()).page + EagleDrafter(head, model).page_bytes
            slot = pool_bytes(model.config, model.dtype, Partition()).slot
            options = {"cache_memory": PAGES * page + 12 * slot, "draft": head, "draft_tokens": 4, "max_length": 320}
            with pytest.MonkeyPatch.context() as patch:
                if name == "k2.5":
                    patch.setattr(sizes, "decode_row_counts", lambda slots, data: (slots,))
                made[name, kind] = Engine(model, slots=4, prefill_chunk=16 if name == "k2.5" else 64, **options)
        reading.noted, reading.replace = {}, nothing
        return made[name, kind]

    yield of
    for one in made.values():
        one.close()


def answers(engine, requests):
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(engine.answer, requests))


def prompts_of(lengths, seed):
    return [np.random.RandomState(seed + i).randint(0, 500, length).tolist() for i, length in enumerate(lengths)]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        assert one.usage.completion_tokens == other.usage.completion_tokens


@pytest.mark.slow  # the next test has the same engine's answers, with drafts that are right and wrong
@pytest.mark.parametrize(("name", "kind"), ENGINES)
@settings(max_examples=1, deadline=None)
@example(lengths=[250, 250, 126], seed=1, new=NEW, temperature=0.0)  # which outgrow the pages together
@given(
    lengths=st.lists(st.integers(1, 270), min_size=2, max_size=4),
    seed=st.integers(0, 10**6),
    new=st.integers(1, NEW),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_the_same_answers(engines, reading, name, kind, lengths, seed, new, temperature):
    # Given prompts, of which each stops somewhere in its answer, in fewer pages than all need
    engine, prompts = engines(name, kind), prompts_of(lengths, seed)
    forget_all(engine)
    ask = functools.partial(Request, stop_ids=(), sampling=Sampling(temperature=temperature, top_p=0.95), seed=seed)
    whole = answers(engine, [ask(prompt, max_new_tokens=NEW) for prompt in prompts])
    requests = [ask(prompt, max_new_tokens=new) for prompt in prompts]
    ends = [(result.tokens[seed % NEW],) for result in whole]
    requests += [ask(prompt, max_new_tokens=NEW, stop_ids=end) for prompt, end in zip(prompts, ends, strict=True)]
    expected = answers(engine, requests)

    # Then drafts change nothing, with beginnings found in the cache and without
    for replace in (own, Answers(whole, prompts).sometimes_right):
        reading.replace = replace
        forget_all(engine)
        same(answers(engine, requests), expected)
    # and after tokens that came to the head in other steps and pages it drafts the same
    reading.assert_drafts_depend_on_tokens_alone(twice=new - 1)
    stats = engine.stats()
    assert stats.free_pages == stats.pages and stats.free_slots == 4


@pytest.mark.parametrize(("name", "kind"), ENGINES)
def test_right_drafts_are_accepted_in_full_and_wrong_ones_cost_no_token(engines, reading, name, kind):
    engine, prompts = engines(name, kind), prompts_of((130, 40), 5)
    requests = [Request(prompt, max_new_tokens=NEW, stop_ids=()) for prompt in prompts]
    expected = answers(engine, requests)
    programs, whole = engine.stats().compiled_programs, Answers(expected, prompts)
    for replace, share in ((whole.right, 1), (whole.wrong, 0)):
        before, steps, reading.replace = engine.stats(), engine.scheduler.step, replace
        same(answers(engine, requests), expected)
        after = engine.stats()
        drafts, tokens, accepted = (
            getattr(after, field) - getattr(before, field) for field in ("drafts", "drafted_tokens", "accepted_tokens")
        )
        assert tokens > 12 and accepted == share * tokens and drafts >= tokens / 4
        assert engine.scheduler.step - steps < 24 if share else drafts > 30
        assert after.acceptance_rate == after.accepted_tokens / after.drafted_tokens
        assert after.accepted_length == after.accepted_tokens / after.drafts
    assert engine.stats().compiled_programs == programs


@pytest.mark.parametrize(("name", "kind"), ENGINES)
def test_drafts_are_those_of_the_head_beside_one_pass(engines, reading, name, kind):
    # Given what is drafted in the steps of an answer, some of which take in several right tokens
    engine, (prompt,) = engines(name, kind), prompts_of((37,), 11)
    forget_all(engine)
    request = Request(prompt, max_new_tokens=NEW, stop_ids=())
    expected = answers(engine, [request])
    reading.replace = Answers(expected, [prompt]).sometimes_right
    same(answers(engine, [request]), expected)

    # When the head takes in the outputs of the target's layers in one pass, for eight of the drafts
    drafter, width = engine.runner.program.drafter, 64
    known = sorted(reading.noted, key=len)[-8:]
    tokens = np.zeros((8, width + 1), np.int32)
    for row, each in enumerate(known):
        tokens[row, : len(each)] = each
    hidden = look(engine.model, tokens[:, :width], what=("hidden",)).hidden
    aux = np.concatenate([hidden[layer] for layer in drafter.aux_layers], axis=-1)
    columns, lengths = np.arange(width, dtype=np.int32), np.array([len(each) - 1 for each in known])
    positions = np.where(columns < lengths[:, None], columns, -1)
    table = pages_in_order(8, 128)
    _, drafts = drafter.propose(drafter.cache(table.size), aux, tokens[:, 1:], positions, table, 4)

    # Then it drafts the same
    assert [reading.noted[each][0] for each in known] == [tuple(row) for row in np.asarray(drafts).tolist()]


class Forced:
    """Forces three tokens after the third, and forbids the most likely token before that."""

    def __init__(self, likely):
        self.likely = likely

    def next_mask(self, tokens):
        mask = np.full(24, -1, np.int32)
        if len(tokens) < 3:
            mask[self.likely // 32] ^= np.int32(1 << self.likely % 32)
        return mask

    def forced(self, tokens):
        return [5, 6, 7] if len(tokens) == 3 else []

    def stopped(self, tokens):
        return False


@pytest.mark.slow
def test_masked_and_forced_tokens_beside_drafts(engines, reading):
    # Given a request whose tokens are masked and forced, beside one that drafts
    engine, (prompt, other) = engines("k2.5", "eagle3.1-mla"), prompts_of((50, 60), 3)
    plain = Request(other, max_new_tokens=NEW, stop_ids=())
    likely = answers(engine, [Request(prompt, max_new_tokens=1, stop_ids=())])[0].tokens[0]
    masked = Request(prompt, max_new_tokens=90, stop_ids=(), mask_provider=Forced(likely))
    expected = answers(engine, [masked, plain])
    assert expected[0].tokens[3:6] == [5, 6, 7] and likely not in expected[0].tokens[:3]
    reading.replace = Answers(expected, [prompt, other]).sometimes_right
    same(answers(engine, [masked, plain]), expected)

    # Then who goes on from its answer drafts the same, whether the head took it in then or as a prompt
    goes_on = Request(prompt + expected[0].tokens, max_new_tokens=9, stop_ids=())
    found = answers(engine, [goes_on])
    assert found[0].usage.cached_tokens >= 128
    forget_all(engine)
    same(answers(engine, [goes_on]), found)
    reading.assert_drafts_depend_on_tokens_alone(twice=8)


def test_the_head_s_cache_is_part_of_the_memory(engines):
    cache = engines("k2.5", "eagle3.1-mla").runner.cache
    of_a_page = {array.nbytes // len(array) for array in jax.tree.leaves(cache)}
    assert len(cache.head.pages) == cache.pages == PAGES and len(of_a_page) == 1


def test_a_head_of_another_model_is_refused(two_layer_model, tmp_path):
    folder = write_toy(tmp_path / "head", cases.eagle_config("eagle3-mla"))
    head = load_head(folder, from_dict(cases.EAGLE_TARGET), dtype=jnp.float32)
    with pytest.raises(ConfigError, match="draft head: target_hidden_size is 64, but that of its target is 128"):
        Engine(two_layer_model("k2"), slots=1, draft=head)


def biased(module, rows):
    """Returns a module with the same arrays, in which a direction is added to these rows of weights, by their names."""
    changed = nnx.merge(*nnx.split(module))
    for name, row in rows.items():
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, changed)
        weight = getattr(owner, last)
        setattr(owner, last, weight.replace(weight.get_value().at[row].add(2.0)))
    return changed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("k2.5", "eagle3-llama")])
def test_generate_beside_heads_that_are_always_right_or_wrong(two_layer_checkpoint, head_of, name, kind):
    # Given a model that answers with one word, and heads that draft this word, and another one
    model = kimi_jax.load(two_layer_checkpoint(name), dtype=jnp.float32, only=("model", "lm_head"))
    head = head_of(name, kind)
    right, wrong = (int(head.target_ids(jnp.array(word))) for word in (3, 4))
    model = biased(model, {"model.embed_tokens.weight": slice(None), "lm_head.weight": right})
    weight = head.fc.weight
    width = model.config.text.hidden_size
    head.fc.weight = weight.replace(jnp.eye(*weight.shape, k=2 * width))
    prompts, counts = np.array(prompts_of((126, 126), 8), np.int32), {}
    for word in (3, 4):
        counts[word] = DraftCounts()
        options = {"lengths": np.array([126, 31]), "stop_ids": (), "max_new_tokens": 11, "draft_tokens": 3}
        made = biased(head, {"lm_head.weight": word})
        columns = list(kimi_jax.stream(model, prompts, **options, draft=made, draft_counts=counts[word]))
        assert np.array_equal([column.tokens for column in columns], np.full((11, 2), right))
    # Then right drafts are taken in full: one row's are cut short by the ends of its page and its answer
    assert counts[3] == DraftCounts(drafts=5, tokens=12, accepted=12) and counts[3].rate == 1
    assert counts[4].accepted == 0 and counts[4].tokens > 30 and right != wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("k2.5", "eagle3-llama", "2x2x2x1"),
        ("k2.5", "eagle3.1-mla", "1x2x2x2"),
        ("kimi-linear", "eagle3.1-mla", "2x2x2x1"),
        ("k3", "eagle3-mla", "1x2x4x1"),
    ],
)
def test_heads_on_a_mesh(two_layer_checkpoint, two_layer_model, head_folder, name, kind, shape):
    prompts = np.array(prompts_of((140,) * 4, 2), np.int32)
    options = {"lengths": np.array([140, 126, 23, 1]), "stop_ids": ()}
    expected = kimi_jax.generate(two_layer_model(name), prompts, 12, **options)
    mesh = make_mesh(shape)
    model = kimi_jax.load(two_layer_checkpoint(name), dtype=jnp.float32, mesh=mesh)
    head = load_head(head_folder(name, kind), model.config, mesh, jnp.float32)
    np.testing.assert_array_equal(kimi_jax.generate(model, prompts, 12, **options, draft=head), expected)


def test_a_head_on_other_devices_is_refused(two_layer_model, head_of):
    model, head = two_layer_model("kimi-linear"), head_of("kimi-linear", "eagle3-llama")
    graph, params = nnx.split(head)
    elsewhere = jax.sharding.NamedSharding(make_mesh("1x1x2x1", jax.devices()[:2]), jax.sharding.PartitionSpec())
    with pytest.raises(ValueError, match="the draft head is on other devices than its target"):
        kimi_jax.generate(model, [[1]], 1, draft=nnx.merge(graph, jax.device_put(params, elsewhere)))
