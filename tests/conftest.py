"""Fixtures of more than one test folder; eight CPU devices; shapes and types checked at run time."""

import functools
import gc
import os
import types
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands would keep programs in the cache of who runs the tests
# Tests compile far more than they run: without LLVM's costly passes compiling takes a quarter of the time. A program in
# one part takes an eighth less than in 32, each with costs of its own.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # newer versions do not have the flag
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
QUICK_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK_COMPILE]
)
gc.set_threshold(20_000, 20, 20)  # tracing makes and keeps millions of objects; the collector scans them less often so


Wrap = Callable[[Any], Any]


def takes_arrays(function: Callable[..., Any]) -> bool:
    """Returns True where an annotation of a function names an array's shape, however deep, or is a string still."""
    waiting = list(getattr(function, "__annotations__", {}).values())
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, str) or hasattr(annotation, "dim_str"):
            return True
        waiting += typing.get_args(getattr(annotation, "__value__", annotation))
    return False


def checked_as_needed(*, typechecker: Wrap, check: Callable[..., Wrap] = jaxtyping.jaxtyped) -> Wrap:
    """Returns `jaxtyping.jaxtyped(typechecker=...)` at a fraction of its price, for the hook.

    A function without arrays among its annotations has no shapes to bind, so that the type checker alone checks the
    same: two thirds of ours, whose wrapping took most of the imports, and whose calls a tenth of every trace. Local
    functions stay as they are: wrapping takes milliseconds at each definition.
    """
    with_shapes = check(typechecker=typechecker)

    def wrap(made: Any) -> Any:
        if "<locals>" in getattr(made, "__qualname__", ""):
            return made
        if not isinstance(made, types.FunctionType) or takes_arrays(made):
            return with_shapes(made)
        checked = typechecker(made)

        @functools.wraps(made)
        def call(*args: Any, **kwargs: Any) -> Any:
            # `checks_arguments` marks it later: the hook's decorator is the innermost
            return (made if hasattr(call, "__no_type_check__") else checked)(*args, **kwargs)

        return call

    return wrap


jaxtyping.jaxtyped = checked_as_needed  # the import hook looks the function up here
jaxtyping.install_import_hook(["kimi_jax", "pallas_kernels", "sharding", "checkpoints"], "beartype.beartype")


# Started first, so that the last of two processes does not end with them
LONGEST = (
    "test_engine.py",
    "test_engine_sampling.py",
    "test_drafts.py",
    "test_head_drafts.py",
    "test_tpu_schedule.py",
    "test_generate.py",
    "test_meshes.py",
    "test_mesh_gradients.py",
    "test_goldens.py",
    "test_program.py",
    "test_mixture.py",
)


# Run in one process, one after another, since they compile the same programs
TOGETHER = {
    "test_engine_sampling.py": "test_engine.py",
    "test_agents_on_an_engine.py": "test_engine.py",
    "test_drafts.py": "test_engine.py",
    "test_serve_command.py": "test_small_models.py",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Returns what deals out files to processes as `--dist loadfile` does, but those of TOGETHER as one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::")[0]).name
            return TOGETHER.get(name, name)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """Returns the folder of Kimi's published tokenizer files, which the repository may not contain."""
    folder = os.environ.get("KIMI_TOKENIZER_DIR")
    if not folder:
        pytest.skip("KIMI_TOKENIZER_DIR does not name a folder with Kimi's tokenizer")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the synthetic tokenizer (768 ids) in the published layout."""
    from kimi_jax.text.tiny import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    write_tiny_tokenizer(folder)
    return folder
