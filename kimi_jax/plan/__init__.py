"""Memory and traffic of a model on a slice of TPUs or GPUs, by arithmetic and by compiling its step without one."""

from kimi_jax.plan.compile import Compiled, DoesNotFitError, available, compiled, missing
from kimi_jax.plan.job import Job
from kimi_jax.plan.planner import Plan, plan

__all__ = ["Compiled", "DoesNotFitError", "Job", "Plan", "available", "compiled", "missing", "plan"]
