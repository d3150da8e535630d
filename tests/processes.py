"""Fresh processes without the seconds that the imports take: each is a fork of a server that has them behind it.

What runs in it is a function that it can import. It has one thread.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train", "prepare_data", "test_parallel"])
SERVER = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system: for tests that measure memory
}


class Fresh:
    """A process that runs `function(*args)` in the project's folder; with n, as many as torchrun would start."""

    def __init__(self, function: Callable, *args, n: int | None = None):
        self.folder = tempfile.TemporaryDirectory()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if n else None
        with mock.patch.dict(os.environ, SERVER):
            forkserver.ensure_running()
        self.processes = []
        for rank in range(n or 1):
            told = self.told_by_torchrun(rank, n) if n else {}
            self.processes.append(FORKS.Process(target=begin, args=(self.folder.name, told, function, *args)))
            self.processes[-1].start()

    def told_by_torchrun(self, rank: int, n: int) -> dict[str, str]:
        """The environment of a process that torchrun has started."""
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        return {name: str(value) for name, value in (who | where).items()}

    def wait(self, timeout: float = 300) -> CompletedProcess:
        """What the processes have printed, and the first exit status that is not 0. The slow ones are killed."""
        for process in self.processes:
            process.join(timeout)
            process.kill()
            process.join()
        status = next((p.exitcode for p in self.processes if p.exitcode), 0)
        return CompletedProcess("", status, *(Path(self.folder.name, name).read_text() for name in ("out", "err")))


def begin(folder: str, environment: dict, function: Callable, *args) -> None:
    """The life of such a process."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= environment
    os.chdir(ROOT)
    function(*args)


def fresh(function: Callable, *args, n: int | None = None) -> CompletedProcess:
    """`Fresh`, and wait for its end."""
    return Fresh(function, *args, n=n).wait()


def script(name: str, *args) -> None:
    """A script of the project with these arguments, as from a shell in its folder."""
    sys.argv = [name, *map(str, args)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def resident_memory() -> int:
    """Bytes of this process in memory, by Linux' count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
