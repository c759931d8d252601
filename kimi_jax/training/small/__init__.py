"""Makes the trained models of `kimi_jax.small` from nothing, on a laptop: `python -m kimi_jax.training.small`."""
