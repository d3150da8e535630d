"""Train the pruned toy model on at a mixture that is far from its source's: 78 % are C++ headers.

The domains that the mixture neglects fall behind, and DRPruning brings them back. `--schedule constant` shows what
happens without it. The robust set is larger than the paper's (rho 1, held back by a temperature), the reference ratio
has more room, and the references are the source's losses: docs/comparison.md has the reasons.
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
rho = 1.0
temperature = 0.2
dynamic_ratio = True
delta = 0.5
bound = 16.0
reference_model = "out/toy_pretrain"

eval_interval = 12
eval_sequences = 16
save_interval = 100
