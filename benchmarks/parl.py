"""Trains the small digits model to work in parallel, by PARL (Kimi K2.5, arXiv 2602.02276), with its controls.

An orchestrator is told the names of 2 to 4 pictures, which it does not see, and can hand each to a sub-agent:
k25-digits as published, frozen, which reads the number in it. Then it lists the numbers. Calls in one answer run side
by side: one stage. A stage costs its own step and its longest sub-agent's, the last answer one step, and an episode
that costs more than 5 fails: two pictures can just be read one after another, three and four cannot.

It begins as a model that was taught to call one at a time in four of five cases. Rollouts come from the published INT4
form through the engine at temperature 1; log-probabilities from the training forward.

    python benchmarks/parl.py --out runs/parl            # all arms and seeds
    python benchmarks/parl.py --out runs/parl --arm parl --seed 0 --updates 60
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import checkpoints
from kimi_jax import small
from kimi_jax.engine import Engine, Request
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.text import chat
from kimi_jax.training import (
    Recipe,
    Rows,
    Trainer,
    as_published,
    critical_steps,
    group_advantages,
    kimi_rl_loss,
    label_logits,
    optimizer,
    parallel_reward,
    parl_reward,
    warmup_stable_decay,
)
from kimi_jax.training.masters import dense_masters
from kimi_jax.training.packing import Room
from kimi_jax.training.qk_clip import qk_clip
from kimi_jax.training.router_bias import update_router_bias
from kimi_jax.training.samples import documents
from kimi_jax.training.small import conversations, digits
from kimi_jax.training.small.batches import ahead, draw_rows

BUDGET = 5  # critical steps of an episode
GROUP, TASKS = 8, 4  # rollouts of a task, tasks of an update
LENGTH, LABELS = 352, 192  # tokens of an episode, and generated ones among them
SFT_STEPS, SFT_RATE, RATE, UNTIL = 150, 2.5e-3, 1e-3, 30
MEASURED = 64  # tasks on which an orchestrator is measured
# Whether episodes are bounded, and lam at the beginning.
ARMS = {"parl": (True, 0.1), "lam 0": (True, 0.0), "unbounded": (False, 0.1), "unbounded, lam 0": (False, 0.0)}


@dataclasses.dataclass(frozen=True)
class Task:
    """Pictures by name, and the numbers that they show."""

    pictures: dict[str, np.ndarray]
    numbers: tuple[str, ...]

    @classmethod
    def draw(cls, random: np.random.Generator, *, held_out: bool) -> "Task":
        numbers = tuple(conversations.number(random) for _ in range(random.integers(2, 5)))
        drawn = [digits.draw_number(text, digits.load(held_out), digits.PLAIN, random) for text in numbers]
        return cls({f"p{i + 1}": picture for i, picture in enumerate(drawn)}, numbers)


@dataclasses.dataclass
class Episode:
    """Holds what an orchestrator did: all tokens, those that it generated with their log-probabilities, its stages."""

    tokens: list[int]
    generated: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # column and log-probability
    stages: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)
    success: bool = False

    @property
    def one_stage(self) -> bool:
        """Tells whether everything was launched at once."""
        return sum(bool(launched) for _, launched in self.stages) == 1


class Reader:
    """The frozen sub-agent. What it reads in a picture is a function of the picture, and kept."""

    def __init__(self, folder: Path):
        self.processor = Processor.from_folder(folder)
        self.engine = Engine(checkpoints.load(folder), slots=8, prefill_chunk=64, max_length=256)
        self._read: dict[bytes, str] = {}

    async def read(self, picture: np.ndarray) -> str:
        key = picture.tobytes()
        if key not in self._read:
            self._read[key] = await self._ask(picture)
        return self._read[key]

    async def _ask(self, picture: np.ndarray) -> str:
        prompt = self.processor(conversations.READ[2], images=[picture], thinking=False)
        request = Request(prompt.tokens, 16, Sampling(temperature=0.0), media=prompt.media)
        ids = [token async for event in self.engine.submit(request) for token in event.tokens]
        return self.processor.parse(ids, thinking=False).content or ""


async def run_episode(
    engine: Engine, processor: Processor, reader: Reader, task: Task, seed: int, *, bounded: bool
) -> Episode:
    """Lets the model of `engine` orchestrate one task. An episode beyond its budget or of broken calls fails."""
    tools = [small.ASSIGN_TOOL]
    messages: list[dict[str, Any]] = [{"role": "user", "content": conversations.delegated(list(task.pictures))}]
    episode = Episode(chat.encode(processor.tokenizer, messages, tools, thinking=False))
    for turn in range(2 * len(task.pictures) + 2):
        room = min(128, LENGTH - len(episode.tokens), LABELS - len(episode.generated))
        if room < 1 or (bounded and critical_steps(episode.stages) + 1 > BUDGET):
            break
        request = Request(episode.tokens, room, Sampling(temperature=1.0), seed=seed + turn, top_logprobs=0)
        ids: list[int] = []
        finish = None
        async for event in engine.submit(request):
            columns = range(len(episode.tokens) + len(ids), len(episode.tokens) + len(ids) + len(event.tokens))
            logprobs = (one.logprob for one in event.logprobs)
            episode.generated += zip(columns, logprobs, strict=True)
            ids += event.tokens
            finish = event.finish_reason or finish
        episode.tokens += ids
        said = processor.parse(ids, thinking=False, tools=tools)
        if finish != "stop" or not said.tool_calls:
            episode.stages.append((1, []))
            episode.success = finish == "stop" and said.content == conversations.listed(task.numbers)
            break
        results = await asyncio.gather(*(_assign(call, task, reader) for call in said.tool_calls))
        episode.stages.append((1, [1] * len(results)))
        messages.append({"role": "assistant", "content": "", "tool_calls": said.tool_calls})
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": result}
            for call, result in zip(said.tool_calls, results, strict=True)
        ]
        told = chat.encode(processor.tokenizer, messages, tools, thinking=False)
        if told[: len(episode.tokens)] != episode.tokens:  # calls that the template writes otherwise are broken
            break
        episode.tokens = told
    return episode


async def _assign(call: dict[str, Any], task: Task, reader: Reader) -> str:
    try:
        asked = json.loads(call["function"]["arguments"])["prompt"]
        return await reader.read(task.pictures[asked])
    except (ValueError, KeyError, TypeError):
        return "error: no such picture"


def rows_of(episodes: Sequence[Episode]) -> tuple[Rows, np.ndarray]:
    """Returns an episode in each row, and the log-probabilities [b, LABELS] with which its tokens were generated."""
    shape = (len(episodes), LENGTH)
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    columns, labels = np.full((shape[0], LABELS), -1, np.int32), np.zeros((shape[0], LABELS), np.int32)
    old = np.zeros((shape[0], LABELS), np.float32)
    for row, episode in enumerate(episodes):
        here = episode.tokens[:LENGTH]
        tokens[row, : len(here)], positions[row, : len(here)] = here, np.arange(len(here))
        for place, (column, logprob) in enumerate(episode.generated):
            columns[row, place], labels[row, place], old[row, place] = column - 1, episode.tokens[column], logprob
    return Rows(tokens, positions, np.where(positions >= 0, 0, -1), columns, labels), old


class Orchestrator:
    """A policy in training: masters, optimizer, and its published form in an engine."""

    def __init__(self, trainer: Trainer, processor: Processor, folder: Path):
        self.trainer, self.processor, self.folder = trainer, processor, folder
        self.state = trainer.state
        self._update = jax.jit(self._rl_step, donate_argnums=0)

    def engine(self) -> Engine:
        """Returns an engine on the weights of this moment, as they would be published and loaded."""
        weights = self.trainer.model(self.state)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            out = checkpoints.publish(weights, small.path("k25-digits"), Path(scratch) / "published")
            model = checkpoints.load(out)
        return Engine(model, slots=TASKS * GROUP, prefill_chunk=64, max_length=LENGTH)

    def imitate(self, steps: int, seed: int) -> None:
        """Trains on conversations that call one at a time in four of five cases."""
        room, config = Room(LENGTH, LABELS, 3, 0), self.processor.config

        def draw(random: np.random.Generator) -> Any:
            return documents(conversations.delegate(random, together=0.2), self.processor)

        def batch(step: int) -> Rows:
            return draw_rows(draw, config, room, 8, np.random.default_rng((seed, step)))

        for step, rows in ahead(batch, range(steps)):
            self.state, metrics = self.trainer.step(self.state, rows)
            if step % 25 == 24:
                print(f"  imitation, step {step + 1}: loss {float(metrics.loss):.4f}", flush=True)

    def update(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> Any:
        """Makes one update by K2.5's loss, and returns its metrics."""
        rows, old = rows_of(episodes)
        self.state, metrics = self._update(self.state, rows, old, group_advantages(np.array(rewards), GROUP))
        return metrics

    def _rl_step(self, state: Any, rows: Rows, old: jax.Array, advantages: jax.Array) -> Any:
        trainer, config = self.trainer, self.trainer.recipe.config

        def loss_of(trained: Any) -> Any:
            model = nnx.merge(trainer.graph, as_published(trained, config), state.frozen)
            logits, seen = label_logits(model, rows)
            of_label = jnp.take_along_axis(logits, rows.labels[:, :, None], axis=-1)[:, :, 0]
            logp = of_label - jax.nn.logsumexp(logits, axis=-1)
            mask = rows.columns >= 0
            loss, metrics = kimi_rl_loss(logp, old, advantages, mask, alpha=-0.5, beta=0.5, tau=0.1)
            return loss, (metrics, seen)

        (_, (metrics, seen)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        updates, opt = trainer.optimizer.update(gradients, state.optimizer, state.trained)
        trained = jax.tree.map(lambda p, u: p + u, state.trained, updates)
        trained = qk_clip(trained, seen.max_logits, config, trainer.recipe.qk_threshold)
        frozen = update_router_bias(state.frozen, seen.expert_counts, 1e-3)
        return type(state)(state.step + 1, trained, frozen, opt), metrics


def orchestrator(folder: Path, rate: Any) -> Orchestrator:
    """Returns k25-digits as an orchestrator at its beginning, to be trained with a learning rate."""
    published = small.path("k25-digits")
    processor = Processor.from_folder(published)
    model = dense_masters(checkpoints.load(published, dtype=jnp.float32))
    make = functools.partial(optimizer, schedule=rate, adamw_schedule=rate, adamw_weight_decay=0.01)
    return Orchestrator(Trainer(model, make, Recipe(processor.config)), processor, folder)


def measured(policy: Orchestrator, reader: Reader, *, bounded: bool) -> dict[str, float]:
    """Measures an orchestrator on held-out tasks, at temperature 1."""
    random = np.random.default_rng(77)
    tasks = [Task.draw(random, held_out=True) for _ in range(MEASURED)]
    engine = policy.engine()
    episodes = asyncio.run(_episodes(engine, policy.processor, reader, tasks, 10_000, bounded=bounded))
    engine.close()
    return {
        "success": float(np.mean([episode.success for episode in episodes])),
        "one stage": float(np.mean([episode.one_stage for episode in episodes])),
        "critical steps": float(np.mean([critical_steps(episode.stages) for episode in episodes])),
    }


async def _episodes(
    engine: Engine, processor: Processor, reader: Reader, tasks: Sequence[Task], seed: int, *, bounded: bool
) -> list[Episode]:
    return await asyncio.gather(
        *(
            run_episode(engine, processor, reader, task, seed + 100 * number, bounded=bounded)
            for number, task in enumerate(tasks)
        )
    )


def train(arm: str, seed: int, updates: int, start: Any, reader: Reader, folder: Path) -> dict[str, Any]:
    """Trains one arm from the weights `start`, and returns what was measured before and after."""
    bounded, peak = ARMS[arm]
    policy = orchestrator(folder, RATE)
    trained, frozen = jax.tree.map(jnp.copy, start)
    policy.state = dataclasses.replace(policy.trainer.state, trained=trained, frozen=frozen)
    before, lines = measured(policy, reader, bounded=bounded), []
    for number in range(updates):
        random = np.random.default_rng((seed, number))
        tasks = [Task.draw(random, held_out=False) for _ in range(TASKS)]
        engine = policy.engine()
        every = [task for task in tasks for _ in range(GROUP)]
        episodes = asyncio.run(
            _episodes(engine, policy.processor, reader, every, int(random.integers(2**20)), bounded=bounded)
        )
        engine.close()
        rewards = [
            parl_reward(
                parallel_reward(episode.stages, len(task.pictures)),
                episode.success,
                1.0,
                number,
                peak=peak,
                until=UNTIL,
            )
            for episode, task in zip(episodes, every, strict=True)
        ]
        metrics = policy.update(episodes, rewards)
        lines.append(
            {
                "update": number,
                "reward": float(np.mean(rewards)),
                "success": float(np.mean([e.success for e in episodes])),
                "one stage": float(np.mean([e.one_stage for e in episodes])),
                "critical steps": float(np.mean([critical_steps(e.stages) for e in episodes])),
                "clipped": float(metrics.clipped_fraction),
                "mean l squared": float(metrics.mean_squared_log_ratio),
            }
        )
        print(f"  {arm}, seed {seed}: {json.dumps(lines[-1])}", flush=True)
    return {
        "arm": arm, "seed": seed, "before": before, "after": measured(policy, reader, bounded=bounded), "updates": lines
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--arm", choices=ARMS, action="append", help="train this one (repeat for more; default all)")
    parser.add_argument("--seed", type=int, action="append", help="of tasks and rollouts (default 0, 1 and 2)")
    parser.add_argument("--updates", type=int, default=60)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rate = warmup_stable_decay(SFT_RATE, 15, SFT_STEPS // 2 - 15, SFT_STEPS // 2, end=0.1, shape="linear")
    first = orchestrator(arguments.out, rate)
    first.imitate(SFT_STEPS, seed=0)
    start = (first.state.trained, first.state.frozen)
    reader = Reader(small.path("k25-digits"))
    for seed in arguments.seed or (0, 1, 2):
        for arm in arguments.arm or ARMS:
            result = train(arm, seed, arguments.updates, start, reader, arguments.out)
            with (arguments.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps({key: result[key] for key in ("arm", "seed", "before", "after")}), flush=True)
    reader.engine.close()


if __name__ == "__main__":
    main()
