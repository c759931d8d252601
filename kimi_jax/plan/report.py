"""The details of a plan, for a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_jax.plan.analytic import PerLayer
from kimi_jax.plan.job import words
from kimi_jax.plan.planner import Plan
from kimi_jax.plan.refusal import GB
from kimi_jax.printable import printable

MEMORY = (
    ("experts", "experts"),
    ("attention", "attention"),
    ("embeddings", "embeddings"),
    ("other weights", "other_weights"),
    ("vision", "vision"),
    ("draft head", "draft_head"),
    ("cache", "cache"),
    ("temporaries", "temporaries"),
    ("headroom", "headroom"),
)


def title(plan: Plan) -> str:
    """Returns the plan's model and job in words, with markup escaped."""
    job = plan.job
    what = f"{printable(plan.model)}, {job.phase} of {job.batch:,} x {job.context:,} tokens"
    if job.draft is not None:
        what += f", {_count(job.draft.tokens, 'draft')} a row, {job.draft.by}"
    return escape(what if job.phase == "decode" else f"{what}, {job.chunk:,} at a time")


def show(console: Console, plan: Plan) -> None:
    """Shows a plan in full."""
    job = plan.job
    idle = job.topology.devices - job.partition.devices
    devices = _count(job.topology.devices, "device") + (f", {idle} of them idle" if idle else "")
    console.print(f"[bold]{title(plan)} on {job.topology.name}[/] ({devices})")
    console.print(f"mesh {words(job.mesh)}: {plan.why}", highlight=False)
    for other in plan.alternatives:
        console.print(
            f"  or {words(other.mesh)}: >= {_ms(other.lower_bound_seconds)} ms, {other.messages} messages, "
            f"{other.headroom / GB:.2f} GB headroom; {_layer(other.per_layer)}",
            highlight=False,
        )
    table = _table("memory of a device", "GB", "%")
    for name, field in MEMORY:
        size = getattr(plan.memory, field)
        if field == "draft_head" and not size:
            continue
        table.add_row(name, f"{size / GB:.3f}", f"{100 * size / plan.memory.available:.1f}")
    table.add_row("available", f"{plan.memory.available / GB:.3f}", "100.0")
    console.print(table)
    _show_limits(console, plan)
    _show_step(console, plan)
    _show_messages(console, plan)
    _show_source(console, plan)
    for warning in plan.warnings:
        console.print(f"[bold red]warning[/]: {warning}", highlight=False)


def _show_limits(console: Console, plan: Plan) -> None:
    sure = {None: "by arithmetic", True: "the batch confirmed by compiling it", False: "but the compiler refuses"}
    console.print(
        f"fits at most: batch {plan.largest_batch:,} of {plan.job.context:,} tokens, or "
        f"{_count(plan.job.batch, 'row')} of {plan.largest_context:,} tokens ({sure[plan.confirmed]})",
        highlight=False,
    )
    if (engine := plan.engine) is None:
        console.print(f"an engine of {_count(plan.job.batch, 'slot')} finds no room for a cache")
        return
    copies = f", {engine.places:,} copies of recurrent states" if engine.places else ""
    console.print(
        f"an engine of {_count(engine.slots, 'slot')} takes {engine.cache_memory / GB:.2f} GB of a device, unless told "
        f"otherwise: {engine.pages:,} pages{copies}; {_count(engine.sequences, 'sequence')} of {plan.job.context:,} "
        "tokens at one time",
        highlight=False,
    )


def _show_step(console: Console, plan: Plan) -> None:
    step, compiled, chip = plan.step, plan.compiled, plan.job.topology.chip
    console.print(
        f"a step is at least {_ms(step.lower_bound_seconds)} ms (lower bound, {step.bound_by}), "
        f"{plan.tokens_per_second:,.0f} tokens/s at most{_unless_right(plan)}",
        highlight=False,
    )
    table = _table("time of a step", "ms", "of")
    table.columns[2].justify = "left"
    table.add_row("HBM", _ms(step.hbm_seconds), f"{step.hbm_bytes / 1e9:.3f} GB")
    table.add_row("products", _ms(step.flops_seconds), f"{step.flops / 1e12:.3f} TFLOP")
    table.add_row("messages", _ms(step.sent_seconds), f"{step.sent_bytes / 1e6:.1f} MB sent")
    table.add_row("longest of these", _ms(step.longest_seconds), "")
    if compiled is None:
        table.add_row("small operations", "", "not known: nothing is compiled")
    elif plan.job.topology.is_gpu:
        table.add_row("small operations", "", "not known: the compiler for GPUs does not say")
    else:
        table.add_row(
            "small operations",
            _ms(step.small_seconds),
            f"{compiled.small_cycles:,} cycles by the compiler's estimate, {chip.name}",
        )
    table.add_row("in all", _ms(step.lower_bound_seconds), "")
    console.print(table)
    console.print(f"the last layer: {_layer(plan.per_layer)}", highlight=False)


def _unless_right(plan: Plan) -> str:
    if (draft := plan.job.draft) is None:
        return ""
    return f" if every draft is right, {plan.tokens_per_second / (1 + draft.tokens):,.0f} if none is"


def _show_messages(console: Console, plan: Plan) -> None:
    if not plan.collectives:
        return
    table = _table("messages of a step", "axes", "devices", "count", "bytes each")
    table.columns[1].justify = "left"
    for one in plan.collectives:
        count = f"{one.count} a turn" if one.in_loop else f"{one.count}"
        table.add_row(one.kind, ", ".join(one.axes), f"{one.group}", count, f"{one.nbytes:,}")
    console.print(table)


def _show_source(console: Console, plan: Plan) -> None:
    compiled = plan.compiled
    if compiled is None:
        console.print(
            "Not compiled: temporaries are estimates, messages those of the step before a compiler merges any."
        )
        return
    program = f", {compiled.program / 1e6:.1f} MB of program" if compiled.program else ""
    console.print(
        f"Compiled in {compiled.seconds:.0f} s ({compiled.cpu_seconds:.0f} s of CPU time), not run: "
        f"{compiled.arguments / GB:.3f} GB of arguments ({(plan.memory.weights + plan.memory.cache) / GB:.3f} "
        f"itemised above), {compiled.temporaries / 1e6:.1f} MB of temporaries{program}; "
        f"{compiled.hbm_bytes / 1e9:.3f} GB go to and from HBM",
        highlight=False,
    )


def _table(*heads: str) -> Table:
    """Returns a table whose columns but the first are numbers."""
    table = Table(*heads, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _layer(share: PerLayer) -> str:
    return f"{share.resident / 1e9:.3f} GB lie on a device, {share.read / 1e9:.3f} GB are read"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
