"""Renders chat templates in a process of its own, bounded in time and memory; `template_process` runs this file.

Imports jinja2 and the standard library only, and renders in jinja2's sandbox. A request is 8 bytes of length and JSON:
the template's `source`, its `variables`, and `now`. An answer is 8 bytes of length, one byte for its kind (`T`: the
prompt, `E`: the template's error, `L`: a limit was met), and UTF-8 text.
"""

import functools
import json
import resource
import sys
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 4  # of processor time; K2.5's template takes a millisecond
MAX_MEMORY = 2**30  # address space; a prompt of a million tokens takes some 50 MB
MAX_FRAME = 2**26  # a prompt of a million tokens has 4 MB
_MAX_ERROR = 2000  # characters of the template's own error; the parent process shortens it for its message


class _Generation(Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`, which marks the model's own text for training."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML and sorts keys; transformers replaces it, and this filter writes what that does
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **options)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _text(source: str, variables: dict[str, Any], now: str) -> tuple[bytes, str]:
    """Renders one request; returns the answer's kind and its text."""
    doing = "does not compile"
    try:
        template = _compiled(source)
        doing = "does not take these messages"
        text = template.render(strftime_now=datetime.fromisoformat(now).strftime, **variables)
        text.encode("utf-8")
        return (b"T", text) if len(text) <= MAX_FRAME // 4 else (b"L", "writes too long a prompt")
    except MemoryError:
        return b"L", f"needs more than {MAX_MEMORY >> 20} MiB of memory"
    except RecursionError:
        return b"L", "nests or recurses too deep"
    except UnicodeEncodeError:
        return b"E", "writes half of a surrogate pair"
    except Exception as error:  # a stranger's template may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return b"E", f"{doing}: {kind}{str(error)[:_MAX_ERROR]}"


def _limit(kind: int, soft: int) -> None:
    try:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    except (OSError, ValueError):  # macOS refuses a bound on the address space
        pass


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until standard input ends, which it also does when the parent process is gone."""
    _limit(resource.RLIMIT_AS, MAX_MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    while length := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(length, "big")))
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + MAX_SECONDS)
        kind, text = _text(**request)
        data = kind + text.encode("utf-8", "backslashreplace")
        answers.write(len(data).to_bytes(8, "big") + data)
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
