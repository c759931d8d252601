"""Fixtures that more than one test folder uses; eight CPU devices; and shapes and types checked at run time."""

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
# Tests compile far more than they run: without LLVM's costlier passes that takes a quarter of the time.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # newer ones do not know it
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK_COMPILE]
)
gc.set_threshold(20_000, 20, 20)  # traces make and keep millions of objects, which are looked through less often so


Wrap = Callable[[Any], Any]


def takes_arrays(function: Callable[..., Any]) -> bool:
    """Returns whether an annotation of a function names an array's shape, however deep, or is a string still."""
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
    same: two thirds of ours, whose wrapping took most of the imports, and whose calls a tenth of every trace. A
    function that another makes at each call stays as it is, since to wrap one takes milliseconds.
    """
    with_shapes = check(typechecker=typechecker)

    def wrap(made: Any) -> Any:
        if "<locals>" in getattr(made, "__qualname__", ""):
            return made
        plain = isinstance(made, types.FunctionType) and not takes_arrays(made)
        return typechecker(made) if plain else with_shapes(made)

    return wrap


jaxtyping.jaxtyped = checked_as_needed  # where the hook's code looks it up
jaxtyping.install_import_hook(["kimi_jax", "pallas_kernels", "sharding", "checkpoints"], "beartype.beartype")


# Begun first, lest one of two processes be left with them at the end
LONGEST = (
    "test_tpu_schedule.py",
    "test_generate.py",
    "test_meshes.py",
    "test_mesh_gradients.py",
    "test_goldens.py",
    "test_program.py",
    "test_mixture.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """The folder of Kimi's published tokenizer files, which are not ours to commit."""
    folder = os.environ.get("KIMI_TOKENIZER_DIR")
    if not folder:
        pytest.skip("KIMI_TOKENIZER_DIR does not name a folder with Kimi's tokenizer")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the synthetic tokenizer (768 ids) in the published layout."""
    from kimi_jax.text.tiny import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    write_tiny_tokenizer(folder)
    return folder
