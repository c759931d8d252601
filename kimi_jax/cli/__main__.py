"""Lets `python -m kimi_jax.cli` do what `kimi-jax` does."""

import sys

from kimi_jax.cli import main

sys.exit(main())
