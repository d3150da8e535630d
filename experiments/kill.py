"""Kill a run at random moments, again and again: does it end exactly as one that never died?

    python experiments/kill.py [--kills 15] [--seed 0] [--json docs/kill/results.json] [--SETTING=VALUE ...]

A pruning run and a continued run (tiny model, real text, the full method, a checkpoint after each step) are done in one
process and by torchrun in two. Each is done twice: left alone, and killed with SIGKILL at a random moment after each
start until it has died --kills times, then left to end. Of torchrun all processes are killed at once. Every byte of
metrics.jsonl, of model/, and of the last checkpoint is compared, but for the seconds and the path in the latter. A kill
has hit a save if it leaves something half-written behind. Further settings are those of the pruning run.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.command_line import Parser, load, number, user_errors  # noqa: E402
from plumbing.output import check_output, write_whole  # noqa: E402
from plumbing.settings import Settings  # noqa: E402

OUT, DATA, RESULTS = Path("out/kill"), Path("data/kill"), "docs/kill/results.json"
SOURCE = "--n_layer=3 --d_model=32 --n_head=4 --d_ffn=48 --lr=3e-3 --steps=60 --eval_interval=60".split()
COMMON = "--seq_len=64 --batch_size=4 --threads=1 --eval_sequences=2 --log_interval=3 --save_interval=1".split()
ROBUST = "--schedule=dro --dynamic_reference=True --dynamic_ratio=True --eval_interval=5 --lr=1e-3".split()
TARGET = "--target_n_layer=2 --target_d_model=24 --target_n_head=2 --target_d_ffn=32 --gate_samples=2".split()
TARGET += "--log_alpha=3.0 --phi=200.0 --sparsity_warmup=20 --noise_from=5 --noise_to=20".split()
TARGET += "--settle_at=40 --fade=20".split()  # so that kills fall before, while and after the gates settle
STARTERS = {
    "one process": [sys.executable, "-u"],
    "torchrun": [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


def command(args: argparse.Namespace, starter: str, stage: str, out: Path) -> list[str]:
    """The command of a stage. The continued run starts from the pruned model that was left alone."""
    options = {
        "source": SOURCE,
        "prune": [*TARGET, *ROBUST, f"--steps={args.steps}", *args.settings],
        "continue": [*ROBUST, f"--steps={args.steps}"],
    }[stage]
    source = {"prune": OUT / "source", "continue": OUT / starter.replace(" ", "_") / "alone" / "prune"}.get(stage)
    start = [f"--init_from={source}"] if source else []
    start += [f"--reference_model={source}"] if stage == "prune" else []
    return [*STARTERS[starter], "train.py", *COMMON, *options, *start, f"--data={DATA}", f"--out={out}"]


def begin(command: list[str]) -> subprocess.Popen:
    """Start it; what it prints can be read."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill(process: subprocess.Popen) -> bool:
    """Kill a process and its children. False if it had ended."""
    if process.poll() is not None:
        return False
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def wait_until_it_trains(process: subprocess.Popen) -> None:
    """Read what it prints until it has trained some steps."""
    for line in process.stdout:
        if re.match(r"step \d+/", line):  # the line of some steps, not that of the evaluation at step 0
            break


def leave_alone(command: list[str]) -> float:
    """Start it and let it end; seconds from the command until it trained."""
    started, process = time.time(), begin(command)
    wait_until_it_trains(process)
    seconds = time.time() - started
    process.stdout.read()
    if process.wait():
        sys.exit(f"`{' '.join(command)}` failed")
    return seconds


def kill_once(command: list[str], rng: random.Random, longest: float, start_up: float) -> bool:
    """Start it, kill it up to `longest` seconds after it has begun to train, or, one time in five, in the `start_up`
    seconds before. False if it had ended by then."""
    process = begin(command)
    if rng.random() < 0.8:
        wait_until_it_trains(process)
        time.sleep(rng.uniform(0, longest))
    else:
        time.sleep(rng.uniform(0, start_up))
    return kill(process)


def half_written(run: Path) -> set:
    """What is not whole, with its time: what one kill leaves behind lies there until the next save."""
    found = [*run.glob("checkpoints/*.partial"), *run.glob("model.partial")]
    return {(path, path.stat().st_mtime_ns) for path in found}


def content(run: Path) -> dict[str, bytes]:
    """What has to be the same: path -> bytes. The seconds and the path of a run are not, nor their checksum."""
    (last,) = sorted((run / "checkpoints").iterdir())[-1:]
    files = [run / "metrics.jsonl", *(run / "model").iterdir(), *last.glob("*.safetensors")]
    state = json.loads((last / "state.json").read_text())
    del state["seconds"], state["settings"]["out"]
    found = {str(file.relative_to(run)): file.read_bytes() for file in files}
    return {**found, f"{last.name}/state.json": json.dumps(state).encode()}


def campaign(args: argparse.Namespace, starter: str, stage: str, rng: random.Random) -> dict:
    """A run left alone, and the same run killed until it has died often enough: what is different at the end?"""
    where = OUT / starter.replace(" ", "_")
    alone, killed = (ROOT / where / how / stage for how in ("alone", "killed"))
    start_up = leave_alone(command(args, starter, stage, where / "alone" / stage))
    again, kills, in_a_save, before_the_first = command(args, starter, stage, where / "killed" / stage), 0, 0, 0
    while kills < args.kills:
        before = half_written(killed)
        if not kill_once(again, rng, args.longest, start_up):
            sys.exit(f"{starter}, {stage}: it ended after {kills} kills: choose a smaller --longest or more --steps")
        kills += 1
        in_a_save += bool(half_written(killed) - before)
        before_the_first += not any(killed.glob("checkpoints/step_*[0-9]"))
        print(f"{starter}, {stage}: killed {kills} times, {in_a_save} times in a save", flush=True)
    if before_the_first > kills / 2:
        sys.exit(f"{starter}, {stage}: {before_the_first} of {kills} kills came before the first checkpoint")
    leave_alone(again)
    one, other = content(alone), content(killed)
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{starter}, {stage}: {', '.join(different) or 'nothing'} is different", flush=True)
    return {
        "kills": kills,
        "in a save": in_a_save,
        "before the first checkpoint": before_the_first,
        "compared": sorted(one),
        "different": different,
    }


def main():
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=number(int, 1), default=15, help="of each of the four runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=number(float, 0), default=0.5, help="seconds that it trains at most")
    parser.add_argument("--steps", type=number(int, 1), default=600, help="of each run")
    parser.add_argument("--json", default=RESULTS, help="the file for the results")
    with user_errors():
        args, args.settings = parser.parse_known_args()
        _, _, _, *options = command(args, "one process", "prune", OUT)  # after python -u train.py
        load(Settings, options)
        check_output(ROOT / args.json)
    rng, quiet = random.Random(args.seed), {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    if not (ROOT / DATA / "meta.json").exists():
        make = ["prepare_data.py", "installed", "--out", str(DATA), "--held_out", "0.1", "--max_mb", "0.5"]
        subprocess.run([sys.executable, *make], **quiet)
    subprocess.run(command(args, "one process", "source", OUT / "source"), **quiet)
    results = {"command": " ".join(["python experiments/kill.py", *sys.argv[1:]])}
    for starter in STARTERS:
        results[starter] = {stage: campaign(args, starter, stage, rng) for stage in ("prune", "continue")}
    file = ROOT / args.json
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(results, indent=1) + "\n")
    sys.exit(any(of_stage["different"] for starter in STARTERS for of_stage in results[starter].values()))


if __name__ == "__main__":
    main()
