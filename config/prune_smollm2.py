"""SmolLM2-135M to about half its non-embedding parameters, on a laptop: a real pretrained model, tied embeddings, GQA.

    python train.py config/prune_smollm2.py                    # what the activations need least is cut out
    python train.py config/prune_smollm2.py --gates learned    # gates that learn to the last step, as in the paper

400 steps of 4 x 256 tokens: 0.4M tokens, an hour and a half on one CPU thread; 2.2 GiB (`--dry_run=True`).
docs/pruning.md compares choices, docs/smollm2.md has what came of two of them.
"""

out = "out/prune_smollm2"
data = "data/smollm2"

init_from = "SmolLM2-135M"
target_n_layer = 24
target_d_model = 480
target_n_head = 6  # 2 of 3 KV groups, each with its 3 query heads
target_d_ffn = 1152

gates = "activation"

steps = 400
batch_size = 4
gate_samples = 4
seq_len = 256
lr = 1e-4
warmup = 20
dtype = "float32"  # not every CPU multiplies bfloat16; on a GPU, take it

# for --gates learned
sparsity_warmup = 240
gate_lr = 1.0  # the paper's; log_alpha must travel 9.2, from its upper clamp to its lower one
multiplier_lr = 1.0  # the paper's
log_alpha = 3.0  # a short run starts below the upper clamp (4.6) and with a phi above 0,
phi = 200.0  # otherwise the constraint would not reach its targets by the end

schedule = "dro"
reference_model = "SmolLM2-135M"

eval_interval = 16
eval_sequences = 4
save_interval = 50
