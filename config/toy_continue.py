"""Train the pruned toy model on at a mixture that is far from its source's: 78 % are C++ headers.

The domains that the mixture neglects fall behind, and DRPruning brings them back. `--schedule constant` shows what
happens without it. The references are the source's losses, and the rest are the defaults of train.py. With
config/paper.py behind this file they are the paper's settings; docs/comparison.md compares the two.
"""

out = "out/toy_continue"
data = "data/demo"
ratio = {
    "cpp": 0.78,
    "python": 0.10,
    "docstrings": 0.04,
    "comments": 0.03,
    "formulas": 0.02,
    "manuals": 0.02,
    "stubs": 0.01,
}

init_from = "out/toy_prune"

steps = 300
batch_size = 8
seq_len = 256
lr = 2e-3
warmup = 9

schedule = "dro"
reference_model = "out/toy_pretrain"

eval_interval = 12
eval_sequences = 16
save_interval = 100
