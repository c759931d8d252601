"""Holds the parts of `kimi-jax chat`: the conversation, who answers in it, the keyboard and the screen."""
