"""What a run says about itself: its metrics.jsonl, read line by line. docs/metrics.md explains each key."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.command_line import one_line
from plumbing.records import parse_metrics


@dataclass
class Metrics:
    """What metrics.jsonl says about a run: its `run` line, its `train` and `eval` lines, and its `end` line, if any.

    changes: the `run` lines that say where it went on with other settings, and with which mixture.
    left_out: what is wrong with each line that does not fit (plumbing/records.py), such as a half-written last one.
    """

    path: Path
    info: dict
    train: list[dict]
    evals: list[dict]
    changes: list[dict]
    end: dict | None
    left_out: list[str]

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return one_line(self.path.resolve().name, 255)  # a picture can show it

    @property
    def domains(self) -> list[str]:
        """The domains, in the run's order."""
        return self.info["domains"]

    @property
    def has_gates(self) -> bool:
        """Whether the run has gates, learned or not."""
        return self.info.get("target") is not None


def read_metrics(path: str | Path) -> Metrics:
    """The metrics of the run in directory `path`. ValueError if there are none, or no evaluation yet."""
    path = Path(path)
    file = path / "metrics.jsonl"
    if not path.is_dir():
        near = sorted(str(p.parent) for p in path.parent.glob("*/metrics.jsonl"))
        raise ValueError(f"{path}: no such run" + (f"; there are {', '.join(near)}" if near else ""))
    if not file.is_file():
        raise ValueError(f"{file}: no such file; plot.py needs a directory that train.py has written to")
    lines, left_out = defaultdict(list), []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = parse_metrics(text)
            check_lists(record)
            lines[record["type"]].append(record)
        except ValueError as error:
            left_out.append(f"{file}:{number}: {error}")
    wrong = f" ({left_out[0]})" if left_out else ""
    if not lines["run"]:
        raise ValueError(f"{file}: not the metrics of a run: there is no `run` line{wrong}")
    if not lines["eval"]:
        raise ValueError(f"{file}: no evaluation yet, so there is nothing to draw; try again after it{wrong}")
    end = lines["end"][-1] if lines["end"] else None
    changes = [line for line in lines["run"] if {"step", "weights", "ratio"} <= line.keys()]
    return Metrics(path, lines["run"][-1], lines["train"], lines["eval"], changes, end, left_out)


def check_lists(record: dict) -> None:
    """ValueError where the lists of a line do not belong together: a number for each step, a row for each layer."""
    if curve := record.get("curve"):
        if any(losses is not None and len(losses) != len(curve["step"]) for losses in curve["loss"].values()):
            raise ValueError("the curve has another number of losses than of steps")
    gates = {g: z for g, z in (record.get("gates") or {}).items() if z}
    if len({len(z) for g, z in gates.items() if g != "hidden"}) > 1:
        raise ValueError("the gates are of several numbers of layers")
    for g in gates.keys() & {"head", "ffn"}:
        if not gates[g][0] or len(set(map(len, gates[g]))) > 1:
            raise ValueError(f"the gates of {g} are not as many in each layer")


def get(record: dict | None, *keys: str):
    """record[key][key]..., or None where a key is absent or a value on the way is null."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def series(records: list[dict], *keys: str) -> np.ndarray:
    """A number of each record, as a float array. An absent or null number becomes NaN, which is a gap in a line."""
    return np.array([get(record, *keys) for record in records], dtype=float)


def latest(run: Metrics, key: str, domain: str) -> float:
    """The number of the `end` line (a pruning run's is the extracted model's), else of the last evaluation."""
    values = series([*run.evals, run.end], key, domain)
    values = values[np.isfinite(values)]
    return values[-1] if len(values) else np.nan
