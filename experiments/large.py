"""What would the large runs cost? A table of their dry runs: one row for each config and each way to save memory.

    python experiments/large.py             # ten to fifteen minutes; writes docs/dry_run/large.json, prints the table

The memory does not depend on the GPU. So each row is rehearsed once, and held against GPUs of 80 and of 40 GB. What
stands in the file already is not made again.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing import cost, records  # noqa: E402
from plumbing.command_line import Parser, load, user_errors  # noqa: E402
from plumbing.output import write_whole  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from train import rehearse  # noqa: E402

CONFIGS = {"prune_7b": 8, "prune_7b_2.7b": 8, "prune_llama3_8b": 8, "continue_1.3b": 8, "prune_qwen3_0.6b": 1}  # GPUs
WAYS = ({"activation_checkpointing": False}, {"activation_checkpointing": True}, {"shard_gradients": True})
PEAKS = ("a100", "h100")  # GPUs whose speed is asked for
SIZES = ("a100", "a100-40gb")  # GPUs whose memory is asked for: 80 and 40 GB
DOLLARS = 2.0  # per GPU-hour
# what a row is called in the file -> what makes it; one GPU has no shards
KEYS = {
    f"{name} {' '.join(way)} {all(way.values())}": (name, n_gpus, way)
    for name, n_gpus in CONFIGS.items()
    for way in (WAYS if n_gpus > 1 else WAYS[:2])
}


def row(name: str, n_gpus: int, way: dict) -> dict:
    """The row of one config and one way to save memory."""
    s = load(Settings, [str(ROOT / "config" / f"{name}.py"), f"--world_size={n_gpus}"])
    s = replace(s, **({"activation_checkpointing": True} | way))
    source = cost.shape_of(s)
    work, hours = cost.work_of(s, source), {}
    for gpu in PEAKS:
        hours[gpu] = work.flops / (cost.peak_of(gpu, s.dtype) * s.utilisation) / 3600  # of one GPU
    return {
        "config": name,
        "gpus": n_gpus,
        "recomputed": s.activation_checkpointing,
        "gradients_in_shards": s.shard_gradients,
        "bytes": cost.memory(s, source, rehearse),
        "utilisation": s.utilisation,
        "tokens": work.tokens,
        "gpu_hours": hours,
        "dollars": {gpu: DOLLARS * h for gpu, h in hours.items()},
    }


def table(found: dict[str, dict]) -> str:
    """The rows as a Markdown table, in the order above, memory in GiB."""
    head = ["config", "GPUs", "layers recomputed", "gradients in shards", *cost.ROWS, "all", "80 GB", "40 GB"]
    head += [f"{what}, {gpu.upper()}" for gpu in PEAKS for what in ("tokens/s", "GPU-hours", "price")]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4)]
    for r in (found[key] for key in KEYS if key in found):
        line = [f"`{r['config']}`", str(r["gpus"])]
        line += ["yes" if r[key] else "no" for key in ("recomputed", "gradients_in_shards")]
        line += [f"{r['bytes'][kind] / cost.GIB:.1f}" for kind in (*cost.ROWS, "all")]
        for gpu in SIZES:
            line.append("fits" if r["bytes"]["all"] <= cost.memory_of(gpu) - cost.RESERVE else "no")
        for gpu in PEAKS:
            hours = r["gpu_hours"][gpu]
            speed = r["tokens"] / (hours / r["gpus"]) / 3600
            line += [f"{speed:,.0f}", f"{hours:,.1f}", f"${r['dollars'][gpu]:,.2f}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "docs" / "dry_run" / "large.json"), help="file of the figures")
    with user_errors():
        out = Path(parser.parse_args().out)
        out.parent.mkdir(parents=True, exist_ok=True)
        complaint = f"{out} is no file of these figures"
        content = records.parse(out.read_bytes(), dict[str, Any], complaint) if out.exists() else {"rows": {}}
        if "rows" not in content:
            raise ValueError(complaint)
        found = content["rows"]
    for key, args in KEYS.items():
        if key not in found:
            found[key] = row(*args)
            print(f"{key}: {cost.readable(found[key]['bytes']['all'])}", file=sys.stderr, flush=True)
            content = {"command": "python experiments/large.py", "rows": found}
            write_whole(out, json.dumps(content, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
