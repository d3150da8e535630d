"""Train the pruned SmolLM2 on with DRPruning, at the mixture of the text.

    python train.py config/continue_smollm2.py

500 steps of 4 x 256 tokens: 0.5M tokens, an hour and a half on one CPU thread.
"""

out = "out/continue_smollm2"
data = "data/smollm2"

init_from = "out/prune_smollm2"

steps = 500
batch_size = 4
seq_len = 256
lr = 1e-4
warmup = 15
dtype = "float32"

schedule = "dro"
reference_model = "SmolLM2-135M"

eval_interval = 20
eval_sequences = 4
save_interval = 50
