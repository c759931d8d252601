"""Swarms and Heavy on a real engine of random weights: they find what is computed already, and it changes nothing."""

import asyncio

import pytest
from agent_engine import ForcedCalls, compare, long_role, run_heavy

from kimi_jax.engine import Engine
from kimi_jax.processor import Processor


@pytest.fixture(scope="module", params=[pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def model(request, two_layer_checkpoint, two_layer_model):
    name = request.param
    with Engine(two_layer_model(name), slots=3, cache_memory="8MiB", prefill_chunk=64) as engine:
        yield ForcedCalls(engine, Processor.from_folder(two_layer_checkpoint(name)), calls=2)


def test_sub_agents_say_the_same_with_the_prefix_cache_and_without(model):
    found = compare(model, 3, 385)
    assert found["messages"] == 3 * 3
    # Three pages of first prompts, of 479 tokens, are shared; of later ones all but a result was computed, where no
    # other agent's turn took the slot with the state
    later = 0.85 if model.processor.config.text.linear_attn is None else 0.7
    assert found["cached_share_first"] > 0.8 and found["cached_share_later"] > later, found


def test_runs_of_one_task_compute_its_pages_once(model):
    found = asyncio.run(run_heavy(model, long_role(model.processor, 385).replace("Rule", "Law"), 3))
    # The first run finds perhaps the declaration of the tool, the others all full pages
    assert 0.5 < found["prefill"] <= 1 + 2 * (found["prompt_tokens"] % 128) / found["prompt_tokens"] + 1e-3
