"""From a sentence to an answer: the tokens are `generate`'s, and their text falls into reasoning and content."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

import checkpoints
import kimi_jax
from checkpoints.toy import toy_config, write_toy
from kimi_jax import Answer, Processor, Prompt, Sampling, answer, answering
from kimi_jax.answering import checked_max_new_tokens
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.drafts import PromptLookup
from kimi_jax.runtime.generate import Column
from kimi_jax.runtime.generate import stream as real_stream
from kimi_jax.runtime.program import Program

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "first_k_dense_replace": 0, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vt_num_hidden_layers": 1, "vt_intermediate_size": 32, "max_position_embeddings": 256,
}  # fmt: skip
SECTION = "<|tool_calls_section_begin|>"
IM_END, CALLS, THINK, END_THINK, PAD = 514, 523, 534, 535, 767
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a K2.5 of one layer of experts in the published layout."""
    return write_toy(tmp_path_factory.mktemp("answer") / "k2.5", toy_config("k2.5", **SIZES))


@pytest.fixture(scope="module")
def kimi(folder):
    return kimi_jax.load(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_folder(folder)


def tokens_of(kimi, prompt, **options):
    """Returns `generate`'s answer, up to its end."""
    new = kimi_jax.generate(kimi, prompt.tokens, media=prompt.media, **options)[0].tolist()
    end = next((place for place, token in enumerate(new) if token in kimi.config.stop_ids), len(new))
    return tuple(new[: end + 1])


def test_a_folder_a_model_and_a_processor_give_the_same_answer(folder, kimi, processor):
    # Given the folder alone, the model alone, which knows its folder, and both with the processor
    answers = [answer(str(folder), "Hello", max_new_tokens=6), answer(kimi, "Hello", max_new_tokens=6)]
    answers += [answer(kimi, [{"role": "user", "content": "Hello"}], max_new_tokens=6, processor=processor)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].token_ids == tokens_of(kimi, processor("Hello"), max_new_tokens=6)


def test_every_argument_reaches_the_model(kimi, processor, monkeypatch):
    asked = []

    def stream(model, tokens, **options):
        asked.append((tokens, options))
        yield Column(np.array([IM_END], np.int32), np.array([Finish.STOP]))

    monkeypatch.setattr(answering, "stream", stream)
    picture = np.random.RandomState(0).randint(0, 256, (56, 84, 3)).astype(np.uint8)
    drawn = Sampling(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01)
    for of_prompt in ({}, {"thinking": False}, {"tools": TOOLS}, {"images": [picture]}):
        drafts = {"draft": PromptLookup, "draft_tokens": 3}
        answer(kimi, "Hello", processor=processor, sampling=drawn, seed=7, max_new_tokens=3, **drafts, **of_prompt)
        expected, (tokens, options) = processor("Hello", **of_prompt), asked[-1]
        np.testing.assert_array_equal(tokens, expected.tokens)
        media = options.pop("media")
        assert (media is None) == (expected.media is None)
        if media is not None:
            np.testing.assert_array_equal(media.patches, expected.media.patches)
        assert options == {"sampling": drawn, "seed": 7, "max_new_tokens": 3, **drafts}
    assert len({tokens.shape for tokens, _ in asked}) == 4


def test_a_seed_draws_the_tokens_that_generate_draws(kimi, processor):
    drawn, found = Sampling(temperature=1.5), []
    for seed in (7, 8):
        new = answer(kimi, "Hello", max_new_tokens=6, processor=processor, sampling=drawn, seed=seed).token_ids
        assert new == tokens_of(kimi, processor("Hello"), max_new_tokens=6, sampling=drawn, seed=seed)
        found.append(new)
    assert found[0] != found[1]


def test_a_sampling_and_its_values_are_two_spellings_of_one_call(kimi, processor):
    prompt = processor("Hello").tokens
    short = kimi_jax.generate(kimi, prompt, 6, 1.5, top_k=50)
    np.testing.assert_array_equal(kimi_jax.generate(kimi, prompt, 6, sampling=Sampling(1.5, 50)), short)
    for values in ({"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        with pytest.raises(ValueError, match=r"both sampling=Sampling\(.*\) and values of another"):
            kimi_jax.generate(kimi, prompt, sampling=Sampling(), **values)


@pytest.mark.parametrize(
    ("thinking", "new", "reasoning", "content"),
    [
        (True, ["let me", END_THINK, "Yes.", IM_END], "let me", "Yes."),
        (True, [THINK, "let me", END_THINK, "Yes.", IM_END], "let me", "Yes."),
        (True, [END_THINK, "Yes."], None, "Yes."),
        (True, ["let me"], "let me", ""),
        (True, ["let me", IM_END], "let me", ""),
        (True, ["a", CALLS, "x", IM_END], "a", ""),
        (True, ["a</think>", END_THINK, "b", END_THINK, "c"], "a</think>", "bc"),
        (False, ["Yes.", IM_END], None, "Yes."),
        (False, ["a", END_THINK, "b"], None, "ab"),
        (False, [THINK, "a", END_THINK, "b"], "a", "b"),
    ],
)
def test_reasoning_lies_between_special_tokens(kimi, processor, monkeypatch, thinking, new, reasoning, content):
    ids: list[int] = []
    for part in new:
        ids += [part] if isinstance(part, int) else processor.tokenizer.encode(part, allow_special=False)
    says(monkeypatch, ids, Finish.STOP if ids[-1] == IM_END else Finish.LENGTH)
    expected = Answer(content, reasoning, tuple(ids), "stop" if ids[-1] == IM_END else "length")
    assert answer(kimi, "Hello", thinking=thinking, processor=processor) == expected


def test_calls_of_tools_are_parsed_and_go_into_the_next_prompt(kimi, processor, monkeypatch):
    spell = processor.tokenizer.encode
    call = f"{SECTION}<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    ids = [*spell("Look." + call), IM_END]
    says(monkeypatch, ids, Finish.STOP)
    called = answer(kimi, "Hello", TOOLS, thinking=False, processor=processor)
    calls = [{"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert called == Answer("Look.", None, tuple(ids), "tool_calls", calls)
    message = {"role": "assistant", "content": called.content, "tool_calls": called.tool_calls}
    prompt = processor([{"role": "user", "content": "Hello"}, message], TOOLS).tokens[0].tolist()
    assert processor.tokenizer.decode(prompt).count(call) == 1
    # Cut off, or its number alone where one tool is declared
    says(monkeypatch, ids[:-2], Finish.LENGTH)
    assert answer(kimi, "Hello", TOOLS, processor=processor).finish_reason == "length"
    says(monkeypatch, [*spell(call.replace("functions.f:0", "0")), IM_END], Finish.STOP)
    assert answer(kimi, "Hello", TOOLS, processor=processor).tool_calls == calls
    assert answer(kimi, "Hello", processor=processor).tool_calls == []


def test_logits_that_are_not_finite_are_no_answer(kimi, processor, monkeypatch):
    says(monkeypatch, [5, 6, PAD], Finish.NOT_FINITE)
    with pytest.raises(ValueError, match=r"the logits after 2 new tokens are not finite \(NaN or infinity\)"):
        answer(kimi, "Hello", processor=processor)


def says(monkeypatch, ids, end):
    """Makes the model give the tokens `ids` from here on, the last of them with the reason `end`."""

    def stream(model, tokens, **_):
        for place, token in enumerate(ids):
            yield Column(np.array([token], np.int32), np.array([end if place + 1 == len(ids) else Finish.NOT_YET]))

    monkeypatch.setattr(answering, "stream", stream)


def test_none_samples_as_generation_config_says(folder, kimi, processor, tmp_path, monkeypatch):
    asked = []

    def stream(model, tokens, *, sampling, **options):
        asked.append(sampling)
        return real_stream(model, tokens, sampling=sampling, **options)

    monkeypatch.setattr(answering, "stream", stream)
    answer(kimi, "Hello", max_new_tokens=1, processor=processor)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95}))
    moved = dataclasses.replace(processor, folder=tmp_path)
    answer(kimi, "Hello", max_new_tokens=1, processor=moved)
    answer(kimi, "Hello", max_new_tokens=1, processor=moved, sampling=Sampling(1.0))
    assert asked == [Sampling(), Sampling(0.6, top_p=0.95), Sampling(1.0)]


def test_what_is_wrong_is_said_before_weights_are_read(folder, kimi, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("weights are read"))
    for arguments, message in [
        (("gs://bucket/kimi", "Hello"), "the tokenizer is read from a folder on this machine"),
        ((folder, []), "messages is list, expected a list of at least one message"),
        ((folder, [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]), "may not name local"),
        ((folder, "1 " * 200), r"a prompt of \d+ tokens and 1 new ones: .* max_position_embeddings = 256 in all"),
    ]:
        with pytest.raises(ValueError, match=message):
            answer(*arguments)
    with pytest.raises(FileNotFoundError, match=r"none/tiktoken\.model: no such file"):
        answer(tmp_path / "none", "Hello")


def test_a_model_made_by_hand_needs_a_processor(kimi, processor):
    made = nnx.clone(kimi)
    made.config = dataclasses.replace(kimi.config, folder=None)
    with pytest.raises(ValueError, match=r"not loaded from a folder, so that answer\(\) needs processor="):
        answer(made, "Hello")
    assert answer(made, "Hello", max_new_tokens=2, processor=processor).finish_reason == "length"


def test_where_a_model_was_found_compiles_nothing(folder, kimi, tmp_path):
    # Given the same model in another folder
    other = kimi_jax.load(shutil.copytree(folder, tmp_path / "other"))
    assert (kimi.config.folder, other.config.folder) == (str(folder), str(tmp_path / "other"))
    assert other.config == kimi.config and hash(other.config) == hash(kimi.config)
    first, compiled = answer(kimi, "Hello", max_new_tokens=6), Program(kimi).compiled
    assert answer(other, "Hello", max_new_tokens=6) == first and Program(other).compiled == compiled > 0


def test_no_length_is_a_short_answer_or_what_the_positions_leave(processor):
    for room, expected in [(5000, 1024), (1024, 1024), (100, 100), (1, 1)]:
        prompt = Prompt(np.ones((1, 10), np.int32), None)
        text = dataclasses.replace(processor.config.text, max_position_embeddings=10 + room)
        assert checked_max_new_tokens(dataclasses.replace(processor.config, text=text), prompt, None) == expected
