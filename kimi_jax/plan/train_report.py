"""A plan of training in words and numbers, for a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_jax.plan.job import words
from kimi_jax.plan.train_job import TRAINED
from kimi_jax.plan.train_plan import Measured, TrainPlan
from kimi_jax.printable import printable


def title(plan: TrainPlan) -> str:
    """Returns the plan's model and job in words, with markup escaped."""
    rows = f"{plan.job.rows:,} x {plan.job.tokens:,} tokens"
    return escape(f"{printable(plan.model)}, a training step of {rows} (INT4 QAT, MuonClip)")


def show(console: Console, plan: TrainPlan) -> None:
    """Shows a plan in full."""
    job = plan.job
    console.print(f"[bold]{title(plan)} on {job.topology.name}[/] ({job.topology.devices} devices)")
    console.print(f"mesh {words(job.mesh)}: {plan.why}", highlight=False)
    console.print(
        f"{plan.parameters / 1e9:,.1f}e9 parameters, {plan.expert_parameters / 1e9:,.1f}e9 of them routed experts'; "
        f"{plan.active_parameters / 1e9:.1f}e9 meet a token",
        highlight=False,
    )
    _show_memory(console, plan)
    _show_bound(console, plan)
    for kind, layer in plan.per_layer.items():
        _show_messages(console, f"messages of a layer with {kind.upper()} and experts", layer)
    _show_messages(console, "messages of the step, extrapolated", plan.whole)
    if plan.compiled:
        seconds = sum(one.seconds for one in plan.compiled)
        console.print(
            f"Compiled {len(plan.compiled)} programs of a few layers at full width in {seconds:.0f} s, not run; all "
            "layers' numbers are extrapolated from the differences.",
            highlight=False,
        )
    else:
        console.print(
            "Not compiled: messages are those of traces of a few layers at full width; all layers' are extrapolated "
            "from the differences."
        )
    for warning in plan.warnings:
        console.print(f"[bold red]warning[/]: {warning}", highlight=False)


def _show_memory(console: Console, plan: TrainPlan) -> None:
    table = Table("memory of a device", "GB", "%")
    for column in table.columns[1:]:
        column.justify = "right"
    available = plan.job.topology.chip.memory
    rows = [(f"states: {TRAINED.name}, bf16 gradient", plan.states), ("stream kept for the gradient", plan.stream)]
    if plan.whole.beside is not None and plan.headroom is not None:
        rows += [
            ("compiler's arguments, extrapolated", plan.whole.arguments or 0),
            ("compiler's temporaries, extrapolated", plan.whole.beside),
            ("headroom, extrapolated", plan.headroom),
        ]
    for name, size in [*rows, ("available", available)]:
        table.add_row(name, f"{size / 1e9:.2f}", f"{100 * size / available:.1f}")
    console.print(table)


def _show_bound(console: Console, plan: TrainPlan) -> None:
    step = plan.bound
    console.print(
        f"a step is at least {step.lower_bound_seconds:.3f} s (lower bound, {step.bound_by}): "
        f"{step.flops / 1e12:,.0f} TFLOP in {step.flops_seconds:.3f} s ({step.optimizer_flops / 1e12:,.0f} of them "
        f"Newton-Schulz's), {step.hbm_bytes / 1e9:,.0f} GB of HBM in {step.hbm_seconds:.3f} s, "
        f"{step.sent_bytes / 1e9:,.0f} GB sent over {step.hop_bytes / 1e9:,.0f} GB of links in "
        f"{step.sent_seconds:.3f} s. The model's {step.model_flops / 1e12:,.0f} TFLOP are at most "
        f"{100 * step.mfu:.0f} % of the peak (MFU bound)",
        highlight=False,
    )


def _show_messages(console: Console, heading: str, measured: Measured) -> None:
    table = Table(heading, "axes", "count", "GB sent")
    for one in measured.messages:
        count = f"{one.count:,} a turn" if one.in_loop else f"{one.count:,}"
        table.add_row(one.kind, ", ".join(one.axes), count, f"{one.sent / 1e9:.3f}")
    console.print(table)


def show_slices(console: Console, plan: TrainPlan) -> None:
    """Shows the smallest slice of each chip that holds the states of the plan's model, in each form."""
    chips = list(next(iter(plan.slices.values())))
    table = Table("smallest slice that holds the states (with a bf16 gradient)", *chips)
    for form, found in plan.slices.items():
        table.add_row(form, *(found[chip] or "none" for chip in chips))
    console.print(table)
