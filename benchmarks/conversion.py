"""Converts, kills and resumes, exports, verifies and restores a K2.5 checkpoint of real widths (one dense and one MoE
layer), and measures memory, speed against `cp`, repeated work and bytes read.

    python benchmarks/conversion.py --experts 128 --folder /big/disk [--rounds 2] [--kills 20] [--parts cp,kills,...]

It needs three times the checkpoint on that disk: 30 GB for 128 experts, 49 for 384, 22 for 32 (a third less without cp,
export and kills), and checks this first. Every command runs in a process of its own, whose peak memory is the kernel's
`ru_maxrss`. Copies and conversions take turns; before each, the source is evicted from the page cache and dirty pages
are written to the disk.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GB, GiB = 1e9, 2**30
PARTS = ("cp", "export", "verify", "kills", "restore")
KIMI = (sys.executable, "-m", "kimi_jax.cli")
EXPERT_BYTES, OTHER_BYTES = 24_772_608, 6_700_000_000  # of a routed expert, and of everything else


@dataclass(frozen=True)
class Run:
    """One command: its time, its time until all its bytes are on the disk, its processor time and its peak memory."""

    seconds: float
    until_safe: float
    cpu: float
    peak: int
    output: str


def run(*command: str | Path, check: bool = True) -> Run:
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    os.sync()
    if check and status:
        raise SystemExit(f"{' '.join(map(str, command))}: status {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, time.perf_counter() - began, cpu, usage.ru_maxrss * 1024, output)


def cold(folder: Path) -> None:
    """Evicts the files of `folder` from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Benchmark:
    def __init__(self, folder: Path, memory: str, console: Console):
        self.folder, self.memory, self.console = folder, memory, console
        self.source, self.converted = folder / "published", folder / "orbax"
        self.table = Table("what", "time", "to the disk", "processor", "GB/s", "peak memory")

    def row(self, name: str, result: Run, nbytes: int) -> None:
        self.table.add_row(
            name,
            f"{result.seconds:.1f} s",
            f"{result.until_safe:.1f} s",
            f"{result.cpu:.1f} s",
            f"{nbytes / GB / result.seconds:.2f}",
            f"{result.peak / GiB:.2f} GiB",
        )
        self.console.print(f"{name}: {result.seconds:.1f} s, peak {result.peak / GiB:.2f} GiB; load {_load()}")

    def fact(self, words: str) -> None:
        self.console.print(words, highlight=False)

    def make(self, experts: int) -> None:
        if not (self.source / "config.json").exists():
            toy = ("make-toy", self.source, "--like", "k2.5", "--layers", "2", "--experts", str(experts))
            self.row("make-toy", run(*KIMI, *toy), 4 * experts * EXPERT_BYTES)

    def convert(self, target: Path) -> Run:
        cold(self.source)
        return run(*KIMI, "convert", self.source, target, "--memory", self.memory)

    def cp(self, rounds: int) -> None:
        """Runs cp and convert in turn, and reports the ratio of their least times."""
        nbytes, times = size(self.source), []
        for _ in range(rounds):
            cold(self.source)
            copied = run("cp", "-r", self.source, self.folder / "cp")
            self.row("cp -r", copied, nbytes)
            shutil.rmtree(self.folder / "cp")
            shutil.rmtree(self.converted, ignore_errors=True)
            converted = self.convert(self.converted)
            self.row("convert", converted, nbytes)
            times.append((copied, converted))
        best = min(copied.seconds for copied, _ in times) / min(converted.seconds for _, converted in times)
        safe = min(copied.until_safe for copied, _ in times) / min(converted.until_safe for _, converted in times)
        self.fact(f"convert at {best:.0%} of cp's speed; with everything on the disk at {safe:.0%}")

    def export(self) -> None:
        exported = self.folder / "exported"
        self.row("export", run(*KIMI, "export", self.converted, exported, "--memory", self.memory), size(self.source))
        verified = run(*KIMI, "verify", self.source, exported, "--memory", self.memory)
        self.row("verify, published against exported", verified, 2 * size(self.source))
        shutil.rmtree(exported)

    def verify(self) -> None:
        checked = run(*KIMI, "verify", self.converted, "--memory", self.memory)
        self.row("verify, checksums", checked, size(self.converted))

    def kills(self, kills: int) -> None:
        """Kills conversions, each once it has written a random number of bytes, and reports the bytes written twice."""
        random.seed(0)
        target, total, written, killed = self.folder / "killed", size(self.converted), 0, 0
        command = [*KIMI, "convert", str(self.source), str(target), "--memory", self.memory]
        for _ in range(kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            goal = random.random() * 1.5 * total / (kills + 2)  # 3/4 of a share on average, so that none finishes
            while process.poll() is None and _written(process.pid) < goal:
                time.sleep(0.005)
            process.send_signal(signal.SIGSTOP)
            written += _written(process.pid)
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            if target.exists():
                raise SystemExit(f"{target}: finished before it was killed {kills} times")
        last = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while last.poll() is None:
            written_last = _written(last.pid)
            time.sleep(0.005)
        written += written_last
        manifests = [json.loads((f / "kimi_manifest.json").read_text()) for f in (target, self.converted)]
        same = manifests[0] == manifests[1]
        run(*KIMI, "verify", target, "--memory", self.memory)
        self.fact(
            f"killed {killed} times: {'identical result' if same else 'ANOTHER RESULT'}, "
            f"{(written - total) / total / kills:.2%} of the work repeated per kill"
        )
        shutil.rmtree(target)

    def restore(self, mesh: str) -> None:
        """Restores the checkpoint in two processes with four devices each, and reports the bytes that each reads."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        driver = Path(__file__).with_name("restoring.py")
        commands = [[sys.executable, driver, self.converted, str(i), mesh, port, "--no-digests"] for i in range(2)]
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        for index, process in enumerate(running):
            out, err = process.communicate()
            if process.returncode:
                running[1 - index].kill()
                last = err.strip().splitlines()[-1:]
                raise SystemExit(f"restore, process {index}: status {process.returncode} {' '.join(last)}")
            found = json.loads(out.splitlines()[-1])
            self.fact(f"restore on {mesh}, process {index}: {_shares(self.converted, found)}")


def _shares(folder: Path, found: dict[str, Any]) -> str:
    sizes = {path: size(folder / path) for path in found["by_leaf"]}
    large = [path for path in sizes if ".experts." in path or path.startswith(("model.embed", "lm_head"))]
    of_large = sum(found["by_leaf"][path] for path in large) / sum(sizes[path] for path in large)
    before, after = found["peak"]
    return (
        f"{of_large:.1%} of experts and embeddings read, {found['read'] / sum(sizes.values()):.1%} of everything; "
        f"peak {after / GiB:.2f} GiB ({before / GiB:.2f} before), of which {found['resident'] / GiB:.2f} is its share"
    )


def _written(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[3])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--folder", type=Path, required=True, help="kept: the checkpoint and its conversion")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mesh", default="1x2x4x1", help="of eight devices, for restore (default %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    arguments = parser.parse_args(argv)
    console, parts = Console(width=120), arguments.parts.split(",")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    copies = 3 if {"cp", "export", "kills"} & set(parts) else 2
    needed = copies * (OTHER_BYTES + arguments.experts * EXPERT_BYTES) - size(arguments.folder)
    free = shutil.disk_usage(arguments.folder).free
    console.print(f"needs {needed / GB:.0f} GB of disk, {free / GB:.0f} free; {os.cpu_count()} cores, load {_load()}")
    if free < needed:
        raise SystemExit("not enough disk; fewer --experts need less")
    bench = Benchmark(arguments.folder, arguments.memory, console)
    bench.make(arguments.experts)
    if "cp" in parts:
        bench.cp(arguments.rounds)
    elif not bench.converted.exists():
        bench.row("convert", bench.convert(bench.converted), size(bench.source))
    if "export" in parts:
        bench.export()
    if "verify" in parts:
        bench.verify()
    if "kills" in parts:
        bench.kills(arguments.kills)
    if "restore" in parts:
        bench.restore(arguments.mesh)
    console.print(bench.table)


if __name__ == "__main__":
    main()
