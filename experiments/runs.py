"""What the experiments share: the project's commands, on one thread each, and what eval.py has said of a model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for this file and those that import it

from plumbing.command_line import load  # noqa: E402
from plumbing.data import TokenData  # noqa: E402
from plumbing.settings import Settings  # noqa: E402

# a run takes a minute there, and a checkpoint of a real model is large
ON_GPU = {"dtype": "bfloat16", "save_interval": 10**6} if torch.cuda.is_available() else {}


def call(*command: object) -> None:
    """One of the project's commands, on one thread, from the project's directory. OSError where it fails."""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=one, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise OSError(f"`{' '.join(map(str, command))}` failed, and has said why")


def demo_text(data: str) -> None:
    """The demo's data set, where it is the one that is asked for and is not there."""
    if data == "data/demo" and not Path(data, "meta.json").exists():
        call("prepare_data.py", "installed", "--out", data, "--held_out", "0.1")


def train(out: Path, seed: int, *configs: str, **settings) -> None:
    """One run, unless it is done, with whatever settings. OSError where it was stopped on the way, or where it was done
    on another text than there is now."""
    given = [f"--{key}={value}" for key, value in settings.items()]
    if not (out / "model").exists():
        call("train.py", *configs, "--threads=1", f"--seed={seed}", f"--out={out}", *given)
    if not (out / "model").exists():
        raise OSError(f"{out} was stopped; the same command goes on with it")
    check_text(out, load(Settings, [*configs, *given]).data)


def check_text(out: Path, data: str) -> None:
    """OSError unless a finished run has read this data set, as it is now: runs of two texts cannot be compared."""
    read = json.loads((out / "model" / "trained_with.json").read_text())["reader"]["data"]
    if read != TokenData(data).digest:
        raise OSError(f"{out} has read another text than {data} has now; remove {out.parent}")


def judged(model: str | Path, file: Path, data: str, *options: object) -> dict:
    """What eval.py says of a model on a data set. It writes that to a file, unless it is there."""
    if not file.exists():
        call("eval.py", model, "--data", data, *options, "--json", file)
    [found] = json.loads(file.read_text())["models"].values()
    return found


def test_losses(model: str | Path, file: Path, data: str, sequences: int) -> dict[str, float]:
    """The test loss of each domain, nats per token, on so many sequences of 256 tokens."""
    found = judged(model, file, data, "--seq_len", 256, "--sequences", sequences)
    return {domain: row["loss"] for domain, row in found["domains"].items()}


def each(function: Callable, calls: list[tuple], jobs: int) -> None:
    """Some calls, by their arguments, so many at a time. After the first failure none begins."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function, *arguments): arguments for arguments in calls}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                said = ", ".join(x if isinstance(x, str) else str(getattr(x, "name", x)) for x in futures[future])
                print(f"{function.__name__} {done}/{len(futures)}: {said}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
