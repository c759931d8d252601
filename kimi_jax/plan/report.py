"""A plan in words and numbers, for a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_jax.plan.analytic import PerLayer
from kimi_jax.plan.planner import GIB, Plan, words
from kimi_jax.printable import printable

MEMORY = (
    ("experts", "experts"),
    ("attention", "attention"),
    ("embeddings", "embeddings"),
    ("other weights", "other_weights"),
    ("vision", "vision"),
    ("cache", "cache"),
    ("temporaries", "temporaries"),
    ("headroom", "headroom"),
)


def show_all(console: Console, plans: Sequence[Plan], refused: Mapping[str, str]) -> None:
    """Shows every plan, then where there are several, a line for each; `refused` gives the reasons of slices
    without."""
    for plan in plans:
        _show(console, plan)
        console.print()
    if len(plans) + len(refused) == 1:
        return
    table = Table("topology", "mesh", "headroom GiB", "largest batch", "largest context", "step at least", "bound by")
    for plan in plans:
        table.add_row(
            plan.job.topology.name,
            words(plan.job.mesh),
            f"{plan.memory.headroom / GIB:.2f}",
            f"{plan.largest_batch:,}",
            f"{plan.largest_context:,}",
            _ms(plan.step.lower_bound_seconds),
            plan.step.bound_by,
        )
    console.print(table)
    for name, reason in refused.items():
        console.print(f"{name}: {printable(reason, 1000)}", highlight=False, markup=False)


def _show(console: Console, plan: Plan) -> None:
    job, compiled = plan.job, plan.compiled
    what = f"{printable(plan.model)}, {job.phase} of {job.batch} x {job.context:,} tokens"
    if job.phase == "prefill":
        what += f", {job.chunk:,} at a time"
    console.print(f"[bold]{escape(what)} on {job.topology.name}[/] ({job.topology.devices} devices)")
    console.print(f"mesh {words(job.mesh)}: {plan.why}", highlight=False)
    for other in plan.alternatives:
        console.print(
            f"  or {words(other.mesh)}: >= {_ms(other.lower_bound_seconds)}, {other.messages} messages, "
            f"{other.headroom / GIB:.2f} GiB headroom; {_layer(other.per_layer)}",
            highlight=False,
        )
    table = Table("memory of a device", "GiB", "%")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, field in MEMORY:
        size = getattr(plan.memory, field)
        table.add_row(title, f"{size / GIB:.3f}", f"{100 * size / plan.memory.available:.1f}")
    table.add_row("available", f"{plan.memory.available / GIB:.3f}", "100.0")
    console.print(table)
    _show_limits(console, plan)
    _show_step(console, plan)
    if compiled is None:
        console.print(
            "Not compiled: temporaries are estimates, messages those of the step before a compiler merges any."
        )
    else:
        console.print(
            f"Compiled in {compiled.seconds:.0f} s ({compiled.cpu_seconds:.0f} s of CPU time), not run: "
            f"{compiled.arguments / GIB:.3f} GiB of arguments ({(plan.memory.weights + plan.memory.cache) / GIB:.3f} "
            f"itemised above), {compiled.temporaries / 1e6:.1f} MB of temporaries, {compiled.program / 1e6:.1f} MB of "
            f"program; {compiled.hbm_bytes / 1e9:.3f} GB go to and from HBM; what is neither kernel nor message takes "
            f"{compiled.small_cycles:,} cycles by the compiler's estimate, "
            f"{_ms(compiled.small_cycles / job.topology.chip.clock)}, which the lower bound leaves out",
            highlight=False,
        )
    for warning in plan.warnings:
        console.print(f"[bold red]warning[/]: {warning}", highlight=False)


def _show_limits(console: Console, plan: Plan) -> None:
    sure = {None: "by arithmetic", True: "the batch confirmed by compiling it", False: "but the compiler refuses"}
    console.print(
        f"fits at most: batch {plan.largest_batch:,} of {plan.job.context:,} tokens, or {plan.job.batch} rows of "
        f"{plan.largest_context:,} tokens ({sure[plan.confirmed]})",
        highlight=False,
    )
    if (engine := plan.engine) is None:
        console.print(f"an engine of {plan.job.batch} slots finds no room for a cache")
        return
    copies = f", {engine.places:,} copies of recurrent states" if engine.places else ""
    console.print(
        f"an engine of {engine.slots:,} slots takes {engine.cache_memory / GIB:.2f} GiB of a device, unless told "
        f"otherwise: {engine.pages:,} pages{copies}; {engine.sequences:,} sequences of {plan.job.context:,} tokens at "
        "one time",
        highlight=False,
    )


def _show_step(console: Console, plan: Plan) -> None:
    step = plan.step
    console.print(
        f"a step is at least {_ms(step.lower_bound_seconds)} (lower bound, {step.bound_by}): "
        f"{step.hbm_bytes / 1e9:.3f} GB from HBM in {_ms(step.hbm_seconds)}, {step.flops / 1e12:.3f} TFLOP in "
        f"{_ms(step.flops_seconds)}, {step.sent_bytes / 1e6:.1f} MB sent in {_ms(step.sent_seconds)}",
        highlight=False,
    )
    console.print(f"the last layer: {_layer(plan.per_layer)}", highlight=False)
    table = Table("messages of a step", "axes", "devices", "count", "bytes each")
    for one in plan.collectives:
        count = f"{one.count} a turn" if one.in_loop else f"{one.count}"
        table.add_row(one.kind, ", ".join(one.axes), f"{one.group}", count, f"{one.nbytes:,}")
    console.print(table)


def _layer(share: PerLayer) -> str:
    return f"{share.resident / 1e9:.3f} GB lie on a device, {share.read / 1e9:.3f} GB are read"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
