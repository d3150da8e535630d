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
reference_model = "out/toy_pretrain"

eval_interval = 12
eval_sequences = 16
save_interval = 100
