"""The interpreter that runs a model's code: `python -c` of this file's text, with the standard library alone.

Each request on its socket is 8 bytes of length and that much code in UTF-8; each answer is one line of JSON: the
figures drawn, PNG in base64. What the code prints goes to standard output and error as it is printed.
"""

import ast
import base64
import contextlib
import ctypes
import io
import itertools
import json
import linecache
import os
import random
import resource
import signal
import socket
import sys
import traceback
import types
from typing import Any

CPU_SECONDS = 60  # of one call
MEMORY = 2 * 2**30
FILE_SIZE = 256 * 2**20
PROCESSES = 64
CPUS = 4  # numerical libraries start a thread for each that they see
FIGURES = 10  # of one call


def leave_outside(user: int | None) -> None:
    """Closes the box behind this process: unmounts the outer root where it is at /old, becomes `user`, and gives up all
    capabilities for itself and what it starts. Raises OSError where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.path.isdir("/old") and libc.umount2(b"/old", 2):  # MNT_DETACH
        raise OSError(ctypes.get_errno(), "the outer root cannot be unmounted")
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which fails where there is none to drop
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # _LINUX_CAPABILITY_VERSION_3
    if libc.capset(header, none) or libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def limit_resources(processes: bool) -> None:
    """Sets the limits that hold for this process and what it starts. Outside a box a user's processes are counted
    together, and their number is not limited."""
    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: FILE_SIZE, resource.RLIMIT_CORE: 0}
    if processes:
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, random.sample(usable, min(CPUS, len(usable))))


def limit_cpu() -> None:
    """Gives the next call its time of the CPU; a call that uses it up gets a TimeoutError."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"the call used more than {CPU_SECONDS} s of CPU time")

    signal.signal(signal.SIGXCPU, expire)
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, hard))


def run_cell(code: str, name: str, names: dict[str, Any]) -> None:
    """Runs code, and prints the last expression's `repr` or the stack of an exception."""
    linecache.cache[name] = (len(code), None, f"{code}\n".splitlines(keepends=True), name)
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None:
                names["_"] = value
                print(repr(value))
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != name:
            frames = frames.tb_next
        with contextlib.suppress(OSError):  # the output has reached the largest size of a file
            traceback.print_exception(type(error), error, frames)


def take_figures() -> list[str]:
    """Returns the figures that matplotlib has open, PNG in base64, and closes them."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    figures = []
    if pyplot is not None:
        for number in pyplot.get_fignums()[:FIGURES]:
            file = io.BytesIO()
            pyplot.figure(number).savefig(file, format="png")
            figures.append(base64.b64encode(file.getvalue()).decode())
        pyplot.close("all")
    return figures


def main(file_number: int, boxed: bool, user: int | None) -> None:
    """Answers requests until the socket is closed."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    if boxed:
        leave_outside(user)
    limit_resources(processes=boxed)
    channel = socket.socket(fileno=file_number)
    channel.set_inheritable(False)
    for added in set(os.environ) - {"PATH", "LANG", "HOME"}:  # by the shell that made the box
        del os.environ[added]
    sys.path.append(os.getcwd())
    cells = types.ModuleType("__main__")
    sys.modules["__main__"] = cells
    process, requests = os.getpid(), channel.makefile("rb")
    for number in itertools.count(1):
        length = requests.read(8)
        if not length:
            return
        code = requests.read(int.from_bytes(length, "big")).decode()
        limit_cpu()
        run_cell(code, f"<cell {number}>", vars(cells))
        if os.getpid() != process:  # a fork that came to the end of the cell
            os._exit(0)
        figures: list[str] = []
        try:
            figures = take_figures()
        except Exception:
            traceback.print_exc()
        channel.sendall(json.dumps({"figures": figures}).encode() + b"\n")
