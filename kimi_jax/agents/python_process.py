"""The process of an interpreter, from its start with the first call to its end with the conversation."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from kimi_jax import json_reader
from kimi_jax.agents.box import ENVIRONMENT, HOME, SOURCE, Kind, box_command, user_of_box
from kimi_jax.agents.model import Content, Parts
from kimi_jax.agents.tools import ToolError
from kimi_jax.printable import printable

OUTPUT = 2**20  # bytes read from each end of what a call prints
ANSWER = 2**26  # bytes of a call's figures
GRACE = 2.0  # seconds between TERM and KILL
RESTARTED = "[A new interpreter: names of earlier calls are gone.]\n"


class Interpreter:
    """Starts with the first call of one conversation, and runs one call at a time."""

    def __init__(self, kind: Kind):
        self._kind = kind
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._stack = contextlib.AsyncExitStack()
        self._restarted = False

    async def run(self, code: str) -> Content:
        """Returns what the code prints, with its figures. Raises ToolError where it ends the interpreter, and where
        none can be started."""
        async with self._turn:
            note = RESTARTED if self._restarted and self._process is None else ""
            process = self._process
            try:
                process = process or await self._start()
                os.lseek(self._output, 0, os.SEEK_SET)
                os.ftruncate(self._output, 0)
                data = code.encode("utf-8", errors="replace")
                self._writer.write(len(data).to_bytes(8, "big") + data)
                await self._writer.drain()
                answer = await self._reader.readuntil(b"\n")
                figures = json_reader.parse_object(answer, "the answer")["figures"]
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError, KeyError) as error:
                printed = "" if process is None else self._printed()[-1000:]
                await self.close()
                if process is None:
                    raise ToolError(f"no interpreter can be started: {printable(error)}") from error
                raise ToolError(f"the interpreter ended, exit code {process.returncode}. {printed}") from None
            except BaseException:
                await self.close()
                raise
        text = note + self._printed()
        if not figures:
            return text
        shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in figures]
        return Parts([{"type": "text", "text": text}, *shown])

    async def _start(self) -> asyncio.subprocess.Process:
        folder = tempfile.TemporaryDirectory(prefix="kimi-python-", ignore_cleanup_errors=True)
        self._stack.callback(folder.cleanup)
        home, user = Path(folder.name) / "box", user_of_box(self._kind)
        home.mkdir(mode=0o700)
        if user is not None:
            os.chown(home, user, user)
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        self._output = os.open(Path(folder.name) / "output", os.O_RDWR | os.O_CREAT, 0o600)
        self._stack.callback(os.close, self._output)
        boxed = self._kind != "none"
        with theirs:
            program = f"{SOURCE}\nmain({theirs.fileno()}, {boxed}, {user})"
            process = await asyncio.create_subprocess_exec(
                *box_command(self._kind, home, [sys.executable, "-I", "-u", "-c", program]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env={**ENVIRONMENT, "HOME": HOME if boxed else str(home)},
                cwd=home,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._stack.push_async_callback(_end, process)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=ANSWER)
        self._stack.push_async_callback(_close, self._writer)
        self._process, self._restarted = process, True
        return process

    def _printed(self) -> str:
        """Returns what the call printed; of very much, its beginning and end."""
        size = os.fstat(self._output).st_size
        if size <= 2 * OUTPUT:
            return os.pread(self._output, size, 0).decode(errors="replace")
        head, tail = os.pread(self._output, OUTPUT, 0), os.pread(self._output, OUTPUT, size - OUTPUT)
        left_out = f"\n[... {size - 2 * OUTPUT} bytes left out]\n"
        return head.decode(errors="replace") + left_out + tail.decode(errors="replace")

    async def close(self) -> None:
        """Ends the interpreter and all that it started: TERM, and KILL after two seconds. Removes its folder."""
        self._process = None
        await self._stack.aclose()


async def _end(process: asyncio.subprocess.Process) -> None:
    def send(number: int) -> bool:
        """Signals the group, and says whether it has a process."""
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return False
        return True

    send(signal.SIGTERM)
    try:
        async with asyncio.timeout(GRACE):
            await process.wait()
    except TimeoutError:
        pass  # KILL follows in any case
    finally:
        send(signal.SIGKILL)
    await process.wait()
    for _ in range(100):  # the others of the group are gone soon after, one second at most
        if not send(0):
            return
        await asyncio.sleep(0.01)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
