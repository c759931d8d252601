"""`kimi-jax serve`: a model over HTTP, in the APIs of OpenAI and Anthropic, and on a page to chat on."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

from kimi_jax.cli.arguments import add_draft, add_mesh, add_processes, joined, local, mesh_of, number, whole
from kimi_jax.cli.models import check_draft, check_folder
from kimi_jax.cli.starting import add_compile_cache, keep_programs, load_draft
from kimi_jax.printable import printable

NAME = "serve"
SUMMARY = "Answer requests over HTTP, in the APIs of OpenAI and Anthropic, many at once. SIGTERM ends it."
EXAMPLE = (
    "kimi-jax serve ~/models/kimi-k2.5-orbax --port 8000\n"
    "  kimi-jax serve ~/models/kimi-k2.5-orbax --mesh auto --slots 64\n"
    "  kimi-jax serve ~/models/toy --host 0.0.0.0 --api-key secret"
)
KEY_VARIABLE = "KIMI_JAX_API_KEY"
# Before a process whose job fails exits: clients read the errors that end their answers, and probes what /health says.
TELLING_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=local, help="a checkpoint's folder, converted or published")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument(
        "--port", type=whole(0, 65_535), default=8000, metavar="N", help="port (default 8000; 0: a free one)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key that clients must send (default: the variable {KEY_VARIABLE}, or none)"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name by which clients ask for the model; may be repeated (default: the folder's name)",
    )
    parser.add_argument(
        "--sampling",
        choices=["open", "kimi"],
        default="open",
        help="`kimi` takes the values that Moonshot's API takes, and no others (default open: all in range)",
    )
    add_mesh(parser)
    add_processes(parser)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of weights and activations (default: as stored)"
    )
    parser.add_argument("--slots", type=whole(1), default=16, metavar="N", help="answers at one time (default 16)")
    parser.add_argument(
        "--cache-memory", metavar="SIZE", help="memory of each device for the cache, like 8GiB (default: what is left)"
    )
    parser.add_argument(
        "--max-model-len",
        type=whole(1),
        metavar="N",
        help="most tokens of a prompt with its answer (default: the model's, or what the cache holds)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=whole(1),
        default=512,
        metavar="N",
        help="most tokens of prompts beside a step: less is smoother, more begins answers sooner (default 512)",
    )
    add_draft(parser)
    parser.add_argument(
        "--max-queue", type=whole(1), default=1024, metavar="N", help="requests that may wait (default 1024)"
    )
    parser.add_argument(
        "--max-per-client",
        type=whole(1),
        default=256,
        metavar="N",
        help="requests of one address at one time (default 256)",
    )
    parser.add_argument(
        "--max-body", type=whole(1, 1024), default=32, metavar="MIB", help="largest body of a request (default 32 MiB)"
    )
    parser.add_argument(
        "--allow-media-domain",
        action="append",
        metavar="NAME",
        help="domain from which pictures of requests are fetched, like images.example.org, or *.example.org for its "
        "subdomains; may be repeated (default: none, and pictures come as data: URLs)",
    )
    parser.add_argument(
        "--grace",
        type=number(0.0, 3600.0),
        default=30.0,
        metavar="SECONDS",
        help="after SIGTERM, time for running answers before they are cut off (default 30)",
    )
    parser.add_argument(
        "--behind-proxy", action="store_true", help="take clients' addresses from a proxy on this machine"
    )
    parser.add_argument(
        "--log-requests", action="store_true", help="write a line of JSON for each request, without its contents"
    )
    add_compile_cache(parser)


def run(arguments: argparse.Namespace) -> None:
    check_folder(arguments.path)
    check_draft(arguments.draft)
    try:
        from kimi_jax.server import Limits, Listener, Service
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'kimi-jax[serve]'") from None
    from kimi_jax.server.gate import LOOPBACK
    from kimi_jax.server.media_urls import media_domain

    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    is_local = arguments.host in ("127.0.0.1", "::1", "localhost")
    try:
        domains = tuple(map(media_domain, arguments.allow_media_domain or ()))
    except ValueError as error:
        raise ValueError(f"--allow-media-domain: {error}") from None
    limits = Limits(
        api_key=key,
        hosts=LOOPBACK if is_local and key is None else None,
        max_body=arguments.max_body * 2**20,
        per_client=arguments.max_per_client,
        media_domains=domains,
        log_requests=arguments.log_requests,
    )
    names = arguments.served_model_name or [printable(arguments.path.resolve().name)]
    service = Service(names, limits, arguments.sampling)

    def tell(reason: str) -> None:
        service.fail(reason)
        time.sleep(TELLING_S)

    with joined(arguments, tell) as links:
        if links is None or links.first:
            if not is_local and key is None:
                _note(f"--host {arguments.host} without --api-key: everybody who reaches this port may use the model")
            listener = Listener(service.app(), arguments.host, arguments.port, behind_proxy=arguments.behind_proxy)
            _serve(arguments, service, listener, links)
        else:
            _follow(arguments, links)


def _serve(arguments: argparse.Namespace, service: Any, listener: Any, links: Any) -> None:
    """Serves until a signal comes; of several processes, which `links` connect, this is the first."""
    with _log(), _Stop(0 if links is None else "a signal came before the server was ready") as stop:
        listener.start()
        try:
            engine = _load(arguments, service, links)
        except BaseException:
            listener.stop(0.0)
            raise
        with engine:
            # Texts of requests would fill the log, and Python keeps each of them
            warnings.filterwarnings("ignore", module=r"kimi_jax\.")
            name, has_key = service.names[0], service.limits.api_key is not None
            for line in (
                f"serving {name} at {listener.url}/v1",
                _curl(listener.url, name, has_key),
                f"chat at {listener.url}/",
            ):
                _write(line, sys.stdout)
            stop.wait(listener.ended)
            service.stopping = True
            _note(f"stopping: {engine.stats().running} answers are running")
            finished = listener.stop(arguments.grace, engine.close)
    _note("stopped" if finished else f"stopped: answers that were not complete after {arguments.grace:g} s were cut")


def _follow(arguments: argparse.Namespace, links: Any) -> None:
    """Does what the engine of process 0 does, until that one stops. Ignores the signals that end a server: where all
    processes of a job get one, process 0 ends them in order."""
    import checkpoints
    from kimi_jax.engine import follow
    from kimi_jax.processor import Processor

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(one, signal.SIG_IGN) for one in signals]
    try:
        keep_programs(arguments)
        config = Processor.from_folder(arguments.path).config
        mesh = mesh_of(arguments.mesh, config)
        draft = load_draft(arguments, config, mesh)
        follow(checkpoints.load(arguments.path, mesh=mesh, dtype=arguments.dtype), links, draft)
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


class _Stop:
    """Handles SIGTERM and SIGINT while in this context: the first ends `wait`, or the program where nothing waits yet,
    with `early` as its exit code or reason; the second ends the program at once."""

    def __init__(self, early: int | str) -> None:
        self._early = early
        self._came = threading.Event()
        self._waits = False

    def __enter__(self) -> "_Stop":
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {one: signal.signal(one, self._handle) for one in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def wait(self, ended: threading.Event) -> None:
        """Returns when a signal has come. Raises RuntimeError where the server `ended` by itself."""
        self._waits = True
        while not self._came.wait(1.0):
            if ended.is_set():
                raise RuntimeError("the server's thread has ended")

    def _handle(self, received: int, frame: FrameType | None) -> None:
        signal.signal(received, signal.SIG_DFL)
        if not self._waits:
            raise SystemExit(self._early)
        self._came.set()


def _load(arguments: argparse.Namespace, service: Any, links: Any) -> Any:
    """Loads the model, compiles the engine's programs, and gives both to the service. Returns the engine."""
    import checkpoints
    from kimi_jax.engine import Engine
    from kimi_jax.processor import Processor
    from kimi_jax.serving import EngineBackend

    began, kept = time.perf_counter(), keep_programs(arguments)
    processor = Processor.from_folder(arguments.path)
    loaded = 0

    with checkpoints.progress_bar("loading") as show:

        def progress(done: int, total: int) -> None:
            nonlocal loaded
            loaded = done
            show(done, total)

        mesh = mesh_of(arguments.mesh, processor.config)
        draft = load_draft(arguments, processor.config, mesh)
        model = checkpoints.load(arguments.path, mesh=mesh, dtype=arguments.dtype, progress=progress)
    _note(f"loaded {loaded / 2**20:,.1f} MiB in {time.perf_counter() - began:.1f} s")
    compiling = time.perf_counter()

    def note_program(name: str) -> None:
        _note(f"compiling after {time.perf_counter() - compiling:.1f} s: {name}")

    engine = Engine(
        model,
        slots=arguments.slots,
        cache_memory=arguments.cache_memory,
        prefill_chunk=arguments.prefill_chunk,
        max_length=arguments.max_model_len,
        tokenizer=processor.tokenizer,
        max_waiting=arguments.max_queue,
        progress=note_program,
        draft=draft,
        draft_tokens=arguments.draft_tokens,
        links=links,
    )
    stats = engine.stats()
    seconds = f"{time.perf_counter() - compiling:.1f} s"
    _note(f"compiled {stats.compiled_programs} programs in {seconds}{kept}")
    service.ready(EngineBackend(engine, processor))
    _note(f"ready after {time.perf_counter() - began:.1f} s: {stats.slots} slots, {stats.pages} pages")
    return engine


def _curl(url: str, name: str, has_key: bool) -> str:
    """Returns a command that asks the server something."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    quoted = body.replace("'", "'\\''")
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'"


@contextlib.contextmanager
def _log() -> Iterator[None]:
    """Sends the server's log to standard error while in this context. A log that cannot be written ends no request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk, say
    loggers = {"kimi_jax.server": logging.INFO, "uvicorn.error": logging.ERROR}
    for name, level in loggers.items():
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(handler)


def _note(text: str) -> None:
    _write(text, sys.stderr)


def _write(line: str, file: Any) -> None:
    """Writes a line. One that cannot be written, to a full disk or a closed pipe, ends no server."""
    with contextlib.suppress(OSError):
        print(line, file=file, flush=True)
