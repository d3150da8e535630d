"""Train the pruned toy model on with DRPruning: robust weights, dynamic reference loss, dynamic reference ratio."""

out = "out/toy_continue"
data = "data/demo"

init_from = "out/toy_prune"

steps = 300
batch_size = 8
seq_len = 256
lr = 2e-3
warmup = 9

schedule = "dro"
dynamic_reference = True
dynamic_ratio = True
rho = 0.5  # the paper's 0.1 leaves a small lagging domain too little: docs/comparison.md
reference_model = "out/toy_pretrain"

eval_interval = 12
eval_sequences = 16
save_interval = 100
