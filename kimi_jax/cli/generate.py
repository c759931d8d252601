"""`kimi-jax generate`: a prompt's answer, token by token."""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.cli.arguments import SEED_MAX, host_and_port, local, number, place, whole
from kimi_jax.cli.terminal import for_stdout

NAME = "generate"
SUMMARY = "Answer a prompt, token by token. Text goes to standard output, everything else to standard error."
EXAMPLE = 'kimi-jax generate ~/models/kimi-k2.5-orbax --prompt "What is this?" --image cat.png --temperature 1'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=place, help="a checkpoint's folder, converted or published")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to say to the model")
    what.add_argument(
        "--chat", type=local, metavar="FILE", help="JSON: a list of messages, or {messages, tools}, in OpenAI's schema"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture to show with --prompt; may be repeated"
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="GIF, WebP or PNG animation to show with --prompt"
    )
    parser.add_argument(
        "--no-thinking", dest="thinking", action="store_false", help="answer at once (K2.5's Instant mode)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=256,
        metavar="N",
        help="length of the answer at most (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0.0, 1000.0),
        default=0.0,
        metavar="T",
        help="0 is greedy (default); Moonshot recommends for K2.5 1.0 with thinking, 0.6 without",
    )
    parser.add_argument(
        "--top-k", type=whole(0), default=0, metavar="K", help="draw from the K most likely tokens (default 0: all)"
    )
    parser.add_argument(
        "--top-p",
        type=number(0.0, 1.0, above=True),
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default 1: all; K2.5: 0.95)",
    )
    parser.add_argument(
        "--min-p",
        type=number(0.0, 1.0),
        default=0.0,
        metavar="P",
        help="draw from tokens with at least P times the best one's probability (default 0: all)",
    )
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, metavar="N", help="seed of the sampling (default 0)"
    )
    parser.add_argument(
        "--mesh",
        metavar="DxExTxS",
        help="devices over data, experts, tensors and sequence, like 1x1x8x1; `auto` shares all devices out by the "
        "model's heads (default: one device)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes that run this command together; needs --mesh. A TPU pod, GKE or Slurm "
        "says who they are, elsewhere the next three flags do",
    )
    parser.add_argument(
        "--coordinator", type=host_and_port, metavar="HOST:PORT", help="address where process 0 listens"
    )
    parser.add_argument("--num-processes", type=whole(1), metavar="N", help="number of processes on all hosts together")
    parser.add_argument(
        "--process-id", type=whole(0), metavar="I", help="number of this process, 0 to N-1; process 0 prints"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of weights and activations (default: as stored)"
    )
    parser.add_argument("--verify", action="store_true", help="hold a converted checkpoint against its checksums first")


def run(arguments: argparse.Namespace) -> None:
    if isinstance(arguments.path, str):
        raise ValueError(
            f"{arguments.path}: generate reads the tokenizer from a folder on this machine; `kimi-jax convert "
            f"{arguments.path} FOLDER` brings the checkpoint here"
        )
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
    from kimi_jax.cli.console import console
    from kimi_jax.runtime.batch import Finish
    from kimi_jax.runtime.sampling import Sampling
    from kimi_jax.text import StreamDecoder, Tokenizer
    from sharding import default_shape, make_mesh

    log = console(stderr=True, quiet=not aloud)
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
    files = arguments.chat.parent if arguments.chat else None  # a chat's strings name files beside it, and no others
    prompt = prompts.prepare(
        arguments.path, model.config, tokenizer, messages, tools=tools, thinking=arguments.thinking, files=files
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
            print(for_stdout(text.push(new.tolist())), end="", flush=True)
    if aloud:
        print(for_stdout(text.finish()))
    rate = f", then {(len(times) - 3) / (times[-1] - times[2]):.1f} tokens per second" if len(times) > 3 else ""
    log.print(f"{len(times) - 1} tokens; the first after {times[1] - times[0]:.1f} s, compilation included{rate}")


def _messages(arguments: argparse.Namespace) -> tuple[list[Any], list[Any] | None]:
    """The conversation that the flags describe, and its tools."""
    if arguments.chat is None:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": Path(image)}} for image in arguments.image]
        content += [{"type": "video_url", "video_url": {"url": Path(video)}} for video in arguments.video]
        content.append({"type": "text", "text": arguments.prompt})
        return [{"role": "user", "content": content if len(content) > 1 else arguments.prompt}], None
    if arguments.image or arguments.video:
        raise ValueError("--image and --video go with --prompt; in a --chat file they are parts of a message")
    chat = json_reader.read(arguments.chat)
    fields = chat if isinstance(chat, dict) else {"messages": chat}
    if not isinstance(fields.get("messages"), list) or not isinstance(fields.get("tools"), list | None):
        raise ValueError(
            f"{arguments.chat}: expected a JSON list of messages, or an object with the lists messages, tools"
        )
    if unread := fields.keys() - {"messages", "tools"}:
        warnings.warn(
            f"{arguments.chat}: only messages and tools are read, not {', '.join(sorted(unread))}", stacklevel=1
        )
    return fields["messages"], fields.get("tools")
