"""Boxes for processes that run a model's code: no network, and no files but programs, libraries and one folder.

A box is made by bubblewrap (`bwrap`), or by util-linux's `unshare`. For root both make it without a user namespace, and
the process in it becomes another user, since the kernel holds root to no number of processes. For others the process
stays its user, in a user namespace, without capabilities.
"""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from kimi_jax.agents import interpreter
from kimi_jax.printable import printable

Kind = Literal["bwrap", "unshare", "none"]
HOME = "/box"  # the folder's path in a box
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}

SOURCE = Path(interpreter.__file__).read_text(encoding="utf-8")

_USERS = itertools.count()  # each box of root is another user, so that limits of processes are its own
_FIRST_USER, _NUMBER_OF_USERS = 40_000, 20_000  # between those of people and those that systemd hands out

# $1: a folder for the box's root, $2: its working folder, then what is shown read-only. All mounts are in a namespace
# of their own, which ends with the box. The program in it unmounts /old, the outer root, before it does anything else.
_UNSHARE = """
root=$1 home=$2; shift 2
mount -t tmpfs -o mode=755 box "$root"
mkdir "$root/old" "$root/dev" "$root/box"
mkdir -m 1777 "$root/tmp"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}"; touch "$root$1"; fi
  mount --rbind "$1" "$root$1"; mount -o remount,bind,ro,nosuid,nodev "$root$1"; shift
done
shift
for name in null zero random urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
mount --bind "$home" "$root/box"
cd "$root"; PATH=$PATH:/usr/sbin:/sbin pivot_root . old; cd /box
exec "$@"
"""


def box_command(kind: Kind, folder: Path, program: list[str]) -> list[str]:
    """Returns the command that runs a program in a box, whose first act is `interpreter.leave_outside`.

    folder: its working folder, `HOME` inside. The folder beside it of that name and ".root" is where a root is mounted.
    """
    if kind == "none":
        return program
    tool, shown = shutil.which(kind) or kind, _shown()
    if kind == "unshare":
        root = folder.with_name(f"{folder.name}.root")
        root.mkdir()
        flags = ["--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        own_user = [] if _is_root() else ["--user", "--map-root-user"]
        script = ["sh", "-euc", _UNSHARE, "box", str(root), str(folder), *shown, "--"]
        return [tool, *own_user, *flags, *script, *program]
    flags = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    own_user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if _is_root() else ["--unshare-user"]
    parents = sorted({str(parent) for path in shown for parent in Path(path).parents if parent != Path("/")})
    mounts = [argument for parent in parents for argument in ("--dir", parent)]  # which are root's alone otherwise
    mounts += [argument for path in shown for argument in ("--ro-bind", path, path)]
    folders = ["--dev", "/dev", "--tmpfs", "/tmp", "--bind", str(folder), HOME, "--chdir", HOME]
    return [tool, *own_user, *flags, *mounts, *folders, *program]


def user_of_box(kind: Kind) -> int | None:
    """Returns the user that the program in a box shall become; None where it stays who it is."""
    return _FIRST_USER + next(_USERS) % _NUMBER_OF_USERS if kind != "none" and _is_root() else None


def find_box() -> tuple[Kind, str]:
    """Returns the kind of box that works on this machine, "none" where none does, and one line that says why none."""
    kinds: tuple[Kind, ...] = ("bwrap", "unshare")
    reasons = []
    for kind in kinds:
        reason = why_not(kind)
        if not reason:
            return kind, ""
        reasons.append(reason)
    return "none", "; ".join(reasons)


@functools.cache
def why_not(kind: Kind) -> str:
    """Returns the reason for which a kind of box does not work on this machine; nothing where it works."""
    if shutil.which(kind) is None:
        return f"{kind} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "box"
        home.mkdir()
        program = f"{SOURCE}\nleave_outside({user_of_box(kind)})"
        command = box_command(kind, home, [sys.executable, "-I", "-c", program])
        try:
            tried = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{kind} fails: {printable(error)}"
    if tried.returncode == 0:
        return ""
    lines = tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"]
    return f"{kind} fails: {printable(lines[-1])}"


def _is_root() -> bool:
    return os.geteuid() == 0


def _shown() -> list[str]:
    """Returns the folders of the machine that a box shows read-only: programs, libraries, and this Python."""
    python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    wanted = ["/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", *sorted(python)]
    found: list[str] = []
    for path in filter(os.path.exists, wanted):
        if not any(Path(path).is_relative_to(one) for one in found):
            found.append(path)
    return found
