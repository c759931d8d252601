"""Runs `python -m kimi_jax.training.small NAME --out DIR`: trains a small model, publishes and measures it."""

import argparse
import json
import time
from pathlib import Path

import jax

from kimi_jax.small import NAMES
from kimi_jax.training.small import k25_digits, kimi_linear
from kimi_jax.training.small.make import make
from kimi_jax.training.small.measure import measure
from kimi_jax.training.step import Metrics

RECIPES = {"k25-digits": k25_digits.recipe, "kimi-linear-small": kimi_linear.recipe}


def main() -> None:
    """Makes one model, and prints and writes `measured.json` beside it."""
    parser = argparse.ArgumentParser(
        "python -m kimi_jax.training.small",
        description="Train a small Kimi from nothing (half an hour on two cores), publish it in DIR/NAME, and measure "
        "what it writes in conversations that are held out.",
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data (default 0)")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="conversations to measure of each kind")
    parser.add_argument("--measure-only", type=Path, metavar="FOLDER", help="measure a model that is made already")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    recipe, began = RECIPES[arguments.name](), time.monotonic()

    def show(step: int, metrics: Metrics) -> None:
        if (step + 1) % 25 == 0:
            seconds = time.monotonic() - began
            left = seconds / (step + 1) * (recipe.steps - step - 1)
            print(
                f"step {step + 1}/{recipe.steps}  loss {float(metrics.loss):.4f}  {float(metrics.accuracy):.1%}  "
                f"{seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )

    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.measure_only or make(recipe, arguments.out, seed=arguments.seed, progress=show)
    shares = measure(recipe, folder, arguments.count)
    for name, share in shares.items():
        print(f"{share:7.1%}  {name}")
    (arguments.out / "measured.json").write_text(json.dumps(shares, indent=2) + "\n")


if __name__ == "__main__":
    main()
