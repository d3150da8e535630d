"""How fast is a training step on one GPU, and how much memory does it need, beside what the dry run says?

    python experiments/gpu.py             # measures on the first GPU, some minutes; writes docs/performance/gpu.json
                                          # run it again to go on where it was
    python experiments/gpu.py --report    # prints the table, with the dry run's memory; needs no GPU

The steps are train.py's own, with weights and tokens drawn at random, in bfloat16, with AdamW. 1.3B and 7B have as many
micro-batches as their configs have on one of 8 GPUs. *7B, a quarter* is Llama-2-7B with 8 of its 32 layers, because one
GPU of 80 GB does not hold it all. MFU counts no recomputed FLOPs. *waits* is how often the host waited for the device
in the timed steps, which read no batch, and log and save nothing.
"""

import gc
import json
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import LlamaConfig  # noqa: E402
from plumbing import cost  # noqa: E402
from plumbing.command_line import Parser, load, user_errors  # noqa: E402
from plumbing.output import write_whole  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from train import rehearse  # noqa: E402

FILE = ROOT / "docs" / "performance" / "gpu.json"
WARMUP, STEPS = 2, 3
SHAPES = {
    "135M": cost.PUBLISHED["SmolLM2-135M"],
    "1.3B": LlamaConfig(32000, 24, 2048, 16, 16, 128, 5504, 4096),
    "7B, a quarter": replace(cost.PUBLISHED["Llama-2-7b-hf"], n_layer=8),
}
TARGETS = {  # of the gated steps: layers, hidden dimensions, heads, feed-forward dimensions
    "135M": (24, 480, 6, 1152),
    "1.3B": (16, 1536, 12, 4096),
    "7B, a quarter": (6, 2048, 16, 5504),
}
BATCHES = {"135M": (64, 16, 1024), "1.3B": (32, 4, 4096), "7B, a quarter": (4, 1, 4096)}  # sequences, at once, tokens
ROWS = [  # shape, gated, layers recomputed, layers compiled
    ("135M", False, False, False),
    ("135M", True, False, False),
    ("1.3B", False, False, False),
    ("1.3B", False, True, False),
    ("1.3B", True, True, False),
    ("7B, a quarter", False, False, False),
    ("7B, a quarter", True, False, False),
    ("7B, a quarter", True, True, False),
    ("7B, a quarter", True, True, True),
    ("1.3B", False, False, True),
    ("135M", False, False, True),
]


class Measured(cost.Rehearsal):
    """Stands in for the batches and for the run on a real device. Takes the time of each of the last STEPS steps, in
    which torch is to warn where the host waits."""

    device = torch.device("cuda")

    def watch(self, trainer) -> None:
        """Fill weights and batches."""
        super().watch(trainer)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
        for part in self.parts:
            part.tokens.random_(trainer.model.config.vocab_size)
        self.began = []

    def next_batch(self, step: int, weights) -> "Measured":
        """The micro-batches of a step; ends the last of them."""
        torch.cuda.set_sync_debug_mode("default")
        if step >= WARMUP:
            torch.cuda.synchronize()
            self.began.append(time.perf_counter())
        if step == WARMUP + STEPS:
            raise cost.Enough
        if step >= WARMUP:
            torch.cuda.set_sync_debug_mode("warn")
        return self


def settings(shape: str, gated: bool, recomputed: bool, compiled: bool) -> Settings:
    """The settings of a row."""
    batch_size, micro_batch, seq_len = BATCHES[shape]
    given = {"batch_size": batch_size, "micro_batch": micro_batch, "seq_len": seq_len, "dtype": "bfloat16"}
    given |= {"activation_checkpointing": recomputed, "compile": compiled, "schedule": "constant", "steps": 1000}
    given |= dict.fromkeys(("log_interval", "eval_interval", "save_interval"), 10**9)
    if gated:
        names = ("target_n_layer", "target_d_model", "target_n_head", "target_d_ffn")
        given |= dict(zip(names, TARGETS[shape])) | {"init_from": "source", "gate_samples": batch_size // micro_batch}
    return load(Settings, [f"--{name}={value}" for name, value in given.items()])


def measure(row: tuple) -> dict:
    """Seconds of a step (median), and bytes at its peak."""
    s, shape = settings(*row), SHAPES[row[0]]
    gc.collect()  # the model of the row before is in cycles that nothing else holds
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = Measured(s, s.batch_size, False, {"compiled": s.compile})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            rehearse(s, shape, run)
        except cost.Enough:
            pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seconds = statistics.median(b - a for a, b in zip(run.began, run.began[1:]))
    waits = sum("called a synchronizing" in str(warning.message) for warning in heard)
    memory = {"bytes": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    del run.trainer
    return {"row": row, "seconds": seconds, "waits": waits, **memory}


def table(found: dict) -> str:
    """The rows as a Markdown table."""
    peak = cost.peak_of(found["device"], "bfloat16")
    lines = ["| shape | step | tokens/s | MFU | memory | the dry run's | waits |", "|---|---|---:|---:|---:|---:|---:|"]
    for r in found["rows"]:
        (name, gated, recomputed, compiled), s, shape = r["row"], settings(*r["row"]), SHAPES[r["row"][0]]
        step = ["gated" if gated else "dense", *["recomputed"] * recomputed, *["compiled"] * compiled]
        speed = s.batch_size * s.seq_len / r["seconds"]
        mfu = speed * cost.flops_per_token(shape, s.seq_len) / peak if peak else float("nan")
        said = cost.memory(replace(s, world_size=1), shape, rehearse)["all"]
        memory = f"{r['bytes'] / cost.GIB:.1f} GiB | {said / cost.GIB:.1f} GiB"
        lines.append(f"| {name} | {', '.join(step)} | {speed:,.0f} | {mfu:.1%} | {memory} | {r['waits']} |")
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", default=str(FILE), help="file of the figures")
    with user_errors():
        args = parser.parse_args()
        if not args.report and not torch.cuda.is_available():
            raise ValueError("there is no GPU; --report prints what was measured")
        if args.report:
            print(table(json.loads(Path(args.out).read_text())))
            return
        here = {"command": "python experiments/gpu.py", "device": torch.cuda.get_device_name()}
        here |= {"torch": torch.__version__}
        found = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else here | {"rows": []}
        if not found.items() >= here.items():
            raise ValueError(f"{args.out} is of another device or torch: name another file with --out")
    for row in ROWS:
        if list(row) not in [measured["row"] for measured in found["rows"]]:
            found["rows"].append(measure(row) | {"row": list(row)})
            print(found["rows"][-1], flush=True)
            write_whole(Path(args.out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
