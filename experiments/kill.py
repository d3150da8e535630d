"""Kill a run at random moments, again and again: does it end exactly as one that never died?

    python experiments/kill.py [--kills 30] [--seed 0]

A pruning run and a continued run (tiny model, real text, the full method, a checkpoint after each step) are each done
twice: left alone, and killed with SIGKILL at a random moment after each start until it has died --kills times, then
left to end. Every byte of metrics.jsonl, of model/ and of the last checkpoint's state (domain weights and history, data
position) is compared. A kill has hit a save if it leaves something half-written behind.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, DATA, DOCS = Path("out/kill"), Path("data/kill"), ROOT / "docs" / "kill"
SOURCE = "--n_layer=3 --d_model=32 --n_head=4 --d_ffn=48 --lr=3e-3 --steps=60 --eval_interval=60".split()
COMMON = "--seq_len=64 --batch_size=4 --threads=1 --eval_sequences=2 --log_interval=3 --save_interval=1".split()
ROBUST = "--schedule=dro --dynamic_reference=True --dynamic_ratio=True --eval_interval=5 --lr=1e-3 --steps=600".split()
TARGET = "--target_n_layer=2 --target_d_model=24 --target_n_head=2 --target_d_ffn=32 --gate_samples=2".split()
TARGET += "--log_alpha=3.0 --phi=200.0 --sparsity_warmup=300".split()


def start(stage: str, where: str) -> list[str]:
    """The command of a stage; the runs in `where` have their names."""
    source = {"source": [], "prune": [f"--init_from={OUT / 'source'}", f"--reference_model={OUT / 'source'}"],
              "continue": [f"--init_from={OUT / 'alone' / 'prune'}"]}[stage]  # fmt: skip
    options = {"source": SOURCE, "prune": ROBUST + TARGET, "continue": ROBUST}[stage]
    out = OUT / where / stage if where else OUT / stage
    return [sys.executable, "-u", "train.py", *COMMON, *options, *source, f"--data={DATA}", f"--out={out}"]


def begin(command: list[str]) -> subprocess.Popen:
    """Start it; what it prints can be read."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_until_it_trains(process: subprocess.Popen) -> None:
    """Read what it prints until the first step, or until it goes on from a checkpoint."""
    for line in process.stdout:
        if line.startswith(("step", "going on")):
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
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def half_written(run: Path) -> set:
    """What is not whole, with its time: what one kill leaves behind lies there until the next save."""
    found = [*run.glob("checkpoints/*.partial"), *run.glob("model.partial")]
    return {(path, path.stat().st_mtime_ns) for path in found}


def content(run: Path) -> dict[str, bytes]:
    """What has to be the same: path -> bytes. The seconds a run took are not."""
    files = {str(p.relative_to(run)): p.read_bytes() for p in [run / "metrics.jsonl", *(run / "model").iterdir()]}
    (last,) = sorted((run / "checkpoints").iterdir())[-1:]
    state = json.loads((last / "state.json").read_text())
    del state["seconds"]
    return {**files, last.name: json.dumps(state).encode()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each of the two runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=0.5, help="seconds after which it is dead at the latest")
    args = parser.parse_args()
    rng, quiet = random.Random(args.seed), {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    if not (ROOT / DATA / "meta.json").exists():
        make = ["prepare_data.py", "installed", "--out", str(DATA), "--held_out", "0.1", "--max_mb", "0.5"]
        subprocess.run([sys.executable, *make], **quiet)
    subprocess.run(start("source", ""), **quiet)
    results = {"command": f"python experiments/kill.py --kills {args.kills} --seed {args.seed}"}
    for stage in ("prune", "continue"):
        start_up = leave_alone(start(stage, "alone"))
        run, kills, in_a_save, before_the_first = ROOT / OUT / "killed" / stage, 0, 0, 0
        while kills < args.kills:
            before = half_written(run)
            if not kill_once(start(stage, "killed"), rng, args.longest, start_up):
                sys.exit(f"{stage}: it ended after {kills} kills: choose a smaller --longest")
            kills += 1
            in_a_save += bool(half_written(run) - before)
            before_the_first += not any(run.glob("checkpoints/step_*[0-9]"))
            print(f"{stage}: killed {kills} times, {in_a_save} times in a save", flush=True)
        subprocess.run(start(stage, "killed"), **quiet)
        alone, killed = content(ROOT / OUT / "alone" / stage), content(run)
        different = sorted(name for name in alone.keys() | killed.keys() if alone.get(name) != killed.get(name))
        results[stage] = {
            "kills": kills,
            "in a save": in_a_save,
            "before the first checkpoint": before_the_first,
            "compared": sorted(alone),
            "different": different,
        }
        print(f"{stage}: {', '.join(different) or 'nothing'} is different")
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(results[stage]["different"] for stage in ("prune", "continue")))


if __name__ == "__main__":
    main()
