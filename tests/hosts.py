"""Two hosts on one machine: each has its own network, mounts, processes and host name.

::

    FOLDER/shared        the same on both hosts
    FOLDER/own           a file system of each host's own, at the same path
    FOLDER/first         the same on both, but only the first host can write to it
    first 10.0.0.1  ---- eth0, a virtual cable ----  10.0.0.2 second

A host is a process in new namespaces and all that it starts; when it is killed, so are they.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("first", "second")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
_TOOLS = ("unshare", "nsenter", "ip", "mount")
_ENTER = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
_SET_UP = """
set -e
folder=$1 name=$2 address=$3; shift 3
mount -t tmpfs tmpfs "$folder/own"
mount --bind "$folder/hosts" /etc/hosts
if [ "$name" = second ]; then
    mount --bind "$folder/first" "$folder/first"
    mount -o remount,bind,ro "$folder/first"
fi
echo "$name" > /proc/sys/kernel/hostname
: > "$folder/up-$name"
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
exec "$@"
"""


def missing() -> str:
    """What this machine lacks for two hosts; "" if nothing."""
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"two hosts need {', '.join(absent)}"
    tried = "mount -t tmpfs tmpfs /mnt && ip link add eth0 type veth peer name eth1"
    done = subprocess.run([*_ENTER, "sh", "-c", tried], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"two hosts need root and namespaces with a veth pair: {said}"
    return ""


@dataclass(frozen=True)
class Host:
    """A host on which torchrun runs; its output is in the file ``log``."""

    process: subprocess.Popen[bytes]
    log: Path

    def cable(self, state: str) -> None:
        """Sets its network ``"down"`` or ``"up"``."""
        enter = ["nsenter", "--target", str(self.process.pid), "--net"]
        subprocess.run([*enter, "ip", "link", "set", "eth0", state], check=True)

    def kill(self) -> None:
        """Kills everything that runs on it, and waits until nothing does."""
        pid = self.process.pid
        if self.process.poll() is None:
            (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(int(first), signal.SIGKILL)  # it ends last of its namespace
        self.process.wait()


@contextlib.contextmanager
def two(folder: Path, ranks: int, module: str, *arguments: str) -> Iterator[tuple[Host, Host]]:
    """Yields two hosts, on each of which torchrun starts ``ranks`` ranks of a module.

    Args:
        folder: empty.
        module: run with ``folder`` and the arguments.
    """
    for name in ("shared", "own", "first"):
        (folder / name).mkdir()
    lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    with contextlib.ExitStack() as stack:
        hosts = []
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            words = [*_torchrun(number, ranks), "-m", module, str(folder), *arguments]
            log = folder / f"{name}.log"
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    [*_ENTER, "sh", "-c", _SET_UP, "sh", str(folder), name, address, *words],
                    cwd=ROOT,
                    env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            hosts.append(Host(process, log))
            stack.callback(hosts[-1].kill)
        until(lambda: all((folder / f"up-{name}").exists() for name in NAMES), 60)
        for host in hosts:  # the cable of a host that is killed stays in the other one
            network = os.open(f"/proc/{host.process.pid}/ns/net", os.O_RDONLY)
            stack.callback(os.close, network)
        near, far = (str(host.process.pid) for host in hosts)
        cable = ["ip", "link", "add", "eth0", "netns", near, "type", "veth"]
        cable += ["peer", "name", "eth0", "netns", far]
        subprocess.run(cable, check=True)
        yield hosts[0], hosts[1]


def _torchrun(number: int, ranks: int) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"),
        *(f"--nproc-per-node={ranks}", f"--master-addr={ADDRESSES[0]}", "--master-port=29500"),
    ]


def until(happened: Callable[[], bool], seconds: float) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
