"""Stages of an episode in which an orchestrator launches sub-agents, and the steps of its longest chain (Kimi K2.5,
arXiv 2602.02276)."""

from collections.abc import Sequence

# Steps of the orchestrator, and those of each sub-agent launched in the stage.
Stage = tuple[int, Sequence[int]]


def critical_steps(stages: Sequence[Stage]) -> int:
    """Returns the steps of an episode's longest chain: each stage's own, and those of its longest sub-agent."""
    return sum(main + max(launched, default=0) for main, launched in stages)
