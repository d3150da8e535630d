"""Prune the toy source to 0.4 of its parameters: what the activations need least is cut out, the rest is trained on.

At this scale no other choice does better for the tokens (docs/pruning.md). toy_gates.py learns what to keep instead.
The mixture is the paper's: from 44 % of the run on, the scaling law's predictions are the references.
"""

base = "paper.py"
out = "out/toy_prune"
data = "data/demo"

init_from = "out/toy_pretrain"
target_n_layer = 4
target_d_model = 96
target_n_head = 3
target_d_ffn = 256

steps = 250
batch_size = 8
seq_len = 256
lr = 2e-3
warmup = 15

gates = "activation"

reference_model = "out/toy_pretrain"

eval_interval = 10
eval_sequences = 16
save_interval = 100
