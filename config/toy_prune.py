"""Prune the toy source to 0.4 of its parameters with DRPruning: all four granularities at once, the full method."""

out = "out/toy_prune"
data = "data/demo"

init_from = "out/toy_pretrain"
target_n_layer = 4
target_d_model = 96
target_n_head = 3
target_d_ffn = 256

steps = 400
batch_size = 8
gate_samples = 4
seq_len = 256
lr = 2e-3
warmup = 40

sparsity_warmup = 240  # a slow ramp: structures that are removed early are chosen nearly at random
gate_lr = 1.0  # the paper's; log_alpha must travel 9.2, from its upper clamp to its lower one
multiplier_lr = 1.0  # the paper's
log_alpha = 3.0  # a short run starts below the upper clamp (4.6) and with a phi above 0,
phi = 200.0  # otherwise the constraint would not reach its targets by the end

schedule = "dro"
dynamic_reference = True
dynamic_ratio = True
reference_model = "out/toy_pretrain"

eval_interval = 16
eval_sequences = 16
save_interval = 100
