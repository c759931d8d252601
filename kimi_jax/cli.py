"""The `kimi-jax` command. Each subcommand is a few lines over a function of the package.

Exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kimi_jax import checkpoint_commands

DESCRIPTION = "Moonshot's Kimi models in JAX: convert published checkpoints, look into them, generate."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has had enough
        return 0
    except (ValueError, OSError, KeyError) as error:
        print(f"kimi-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kimi-jax", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    checkpoint_commands.add(command)
    _add_generate(
        command(
            "generate",
            _generate,
            "Answer a prompt, token by token. Text goes to standard output, everything else to standard error.",
            'kimi-jax generate ~/models/kimi-k2.5-orbax --prompt "What is this?" --image cat.png --temperature 1',
        )
    )
    _add_plan(
        command(
            "plan",
            _plan,
            "Will a model fit on a TPU slice, with how much context and batch, and what does a step move? Compiles the "
            "step for the slice where libtpu is installed; no TPU is needed.",
            "kimi-jax plan --model k2.5 --topology v5p:4x4x4 --batch 64 --context 32768 --plot plan.png",
        )
    )
    sub = command(
        "demo",
        _demo,
        "The whole way on this machine, with a toy and random weights: convert, load over 8 devices, look, answer.",
        "kimi-jax demo --image cat.png",
    )
    sub.add_argument("--image", type=Path, help="a picture of yours (default: one that the demo draws)")
    return parser


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=Path, help="a checkpoint's folder, converted or published")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to say to the model")
    what.add_argument(
        "--chat", type=Path, metavar="FILE", help="messages (a JSON list) or {messages, tools}, OpenAI's schema"
    )
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="with --prompt; may be repeated")
    sub.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="with --prompt: GIF, WebP or PNG animation"
    )
    sub.add_argument(
        "--no-thinking", dest="thinking", action="store_false", help="answer at once (K2.5's Instant mode)"
    )
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default %(default)s")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 is greedy (default); K2.5: 1.0 thinking, 0.6 instant",
    )
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="the K most likely tokens only (default: all)")
    sub.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="the fewest tokens that reach P (K2.5: 0.95)"
    )
    sub.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="at least P times the best one's probability"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    sub.add_argument(
        "--mesh",
        metavar="DxExTxS",
        help="devices over data, experts, tensors and sequence, like 1x1x8x1; `auto` shares all devices out by the "
        "model's heads (default: one device)",
    )
    sub.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that run this command together; needs --mesh. A TPU pod, GKE or Slurm says "
        "who they are, elsewhere the next three flags do",
    )
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    sub.add_argument("--num-processes", type=int, metavar="N", help="of all hosts together")
    sub.add_argument("--process-id", type=int, metavar="I", help="0 to N-1; process 0 prints")
    sub.add_argument("--dtype", choices=["bfloat16", "float32"], help="of weights and activations (default: as stored)")
    sub.add_argument("--verify", action="store_true", help="hold a converted checkpoint against its checksums first")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model", required=True, metavar="NAME", help="a preset like k2.5, or a folder with a config.json of its own"
    )
    sub.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="SLICE",
        help="like v5p:4x4x4; may be repeated, and `all` is every slice that is known",
    )
    sub.add_argument("--mesh", metavar="AXIS=N,...", help="like data=4,expert=8,tensor=2 (default: the best one)")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default %(default)s)")
    sub.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of each (default %(default)s)")
    sub.add_argument("--phase", choices=["decode", "prefill"], default="decode", help="default %(default)s")
    sub.add_argument("--chunk", type=int, metavar="N", help="tokens of each row that a prefill step takes")
    sub.add_argument("--no-compile", dest="compile", action="store_false", help="arithmetic alone: seconds, no libtpu")
    sub.add_argument("--json", action="store_true", help="a list with an object for each slice, instead of words")
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw memory and lower bounds")


def _plan(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and leaves one to others
    from kimi_jax import decoding
    from kimi_jax import plan as planning
    from kimi_jax.plan import plot, report
    from sharding import mesh_sizes
    from sharding.topologies import topologies, topology

    model, config = _named_config(arguments.model)
    slices = topologies() if arguments.topology == ["all"] else [topology(name) for name in arguments.topology]
    sizes = None if arguments.mesh is None else mesh_sizes(arguments.mesh)
    log = Console(stderr=True, highlight=False)
    chunk = 1 if arguments.phase == "decode" else arguments.chunk or min(decoding.PREFILL_CHUNK, arguments.context)
    compiles = arguments.compile and planning.available()
    if arguments.compile and not compiles:
        log.print("libtpu, the TPU compiler, is not installed (Linux x86-64: pip install libtpu): arithmetic alone")

    def compile_step(job: planning.Job) -> planning.Compiled:
        log.print(f"compiling {job.phase} of {job.batch} x {job.context:,} tokens for {job.topology.name} ...")
        return planning.compiled(job)

    plans, refused = [], {}
    for slice_ in slices:
        job = planning.Job(config, slice_, (), arguments.phase, arguments.batch, arguments.context, chunk)
        try:
            plans.append(planning.plan(model, job, sizes=sizes, compile_step=compile_step if compiles else None))
        except ValueError as error:
            if len(slices) == 1:
                raise
            refused[slice_.name] = str(error)
    if not plans:
        raise ValueError("; ".join(refused.values()))
    if arguments.plot is not None:
        plot.save(plans, arguments.plot)
    if arguments.json:
        errors = [{"topology": name, "error": reason} for name, reason in refused.items()]
        print(json.dumps([plan.as_json() for plan in plans] + errors, indent=2))
    else:
        report.show_all(Console(), plans, refused)


def _named_config(name: str) -> tuple[str, Any]:
    """A preset, with or without `kimi-` before its name, or what a folder's config.json says."""
    from kimi_jax import config_json

    if (Path(name) / "config.json").is_file():
        return Path(name).name, config_json.from_folder(name)
    names = config_json.preset_names()
    full = next((full for full in names if name in (full, full.removeprefix("kimi-"))), name)
    return full, config_json.preset(full)


def _messages(arguments: argparse.Namespace) -> tuple[list[Any], list[Any] | None]:
    """The conversation that the flags describe, and its tools."""
    if arguments.chat is None:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": image}} for image in arguments.image]
        content += [{"type": "video_url", "video_url": {"url": video}} for video in arguments.video]
        content.append({"type": "text", "text": arguments.prompt})
        return [{"role": "user", "content": content if len(content) > 1 else arguments.prompt}], None
    if arguments.image or arguments.video:
        raise ValueError("--image and --video go with --prompt; in a --chat file they are parts of a message")
    try:
        chat = json.loads(arguments.chat.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{arguments.chat}: not JSON ({error})") from None
    if isinstance(chat, dict):
        return chat.get("messages", []), chat.get("tools")
    return chat, None


def _generate(arguments: argparse.Namespace) -> None:
    who = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed:
        if who != (None, None, None):
            raise ValueError("--coordinator, --num-processes and --process-id go with --distributed")
        return _answer(arguments, aloud=True)
    if arguments.mesh is None:
        raise ValueError("--distributed needs --mesh: the devices of all processes, and what they split")
    from kimi_jax import processes

    with processes.joined(*who) as aloud:
        _answer(arguments, aloud)


def _answer(arguments: argparse.Namespace, aloud: bool) -> None:
    """Generates; prints only where `aloud`."""
    import jax

    import checkpoints
    from kimi_jax import config_json, decoding, prompts
    from kimi_jax.runtime.batch import Finish
    from kimi_jax.runtime.sampling import Sampling
    from kimi_jax.text import StreamDecoder, Tokenizer
    from sharding import default_shape, make_mesh

    log = Console(stderr=True, highlight=False, quiet=not aloud)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    messages, tools = _messages(arguments)
    tokenizer = Tokenizer.from_folder(arguments.path)
    shape = arguments.mesh
    if shape == "auto":
        heads = config_json.from_folder(arguments.path).text.num_attention_heads
        shape = default_shape(len(jax.devices()), heads)
    mesh = None if shape is None else make_mesh(shape)
    began = time.perf_counter()
    model = checkpoints.load(arguments.path, mesh=mesh, dtype=arguments.dtype, verify=arguments.verify)
    prompt = prompts.prepare(
        arguments.path, model.config, tokenizer, messages, tools=tools, thinking=arguments.thinking
    )
    decoding.checked_lengths(model.config, prompt.tokens, None, arguments.max_new_tokens)
    log.print(f"loaded in {time.perf_counter() - began:.1f} s; the prompt has {prompt.tokens.shape[1]} tokens")
    text = StreamDecoder(tokenizer)
    times = [time.perf_counter()]
    for new, finish in decoding.stream(
        model,
        prompt.tokens,
        media=prompt.media,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
    ):
        times.append(time.perf_counter())
        if finish[0] == Finish.NOT_FINITE:
            raise ValueError(f"the logits after {len(times) - 2} new tokens are not finite (NaN or infinity)")
        if aloud and finish[0] != Finish.STOP:
            print(text.push(new.tolist()), end="", flush=True)
    if aloud:
        print(text.finish())
    rate = f", then {(len(times) - 3) / (times[-1] - times[2]):.1f} tokens per second" if len(times) > 3 else ""
    log.print(f"{len(times) - 1} tokens; the first after {times[1] - times[0]:.1f} s, compilation included{rate}")


def _demo(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from kimi_jax import demo

    demo.run(Console(), picture=arguments.image)


if __name__ == "__main__":
    sys.exit(main())
