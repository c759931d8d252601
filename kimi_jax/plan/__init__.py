"""Memory and traffic of a model on a TPU slice, by arithmetic and by compiling its step without one."""

from kimi_jax.plan.compile import Compiled, DoesNotFitError, available, compiled
from kimi_jax.plan.job import Job
from kimi_jax.plan.planner import Plan, plan

__all__ = ["Compiled", "DoesNotFitError", "Job", "Plan", "available", "compiled", "plan"]
