"""Qwen3-0.6B to half its non-embedding parameters, on one GPU: norms of q and k in each head, tied embeddings, GQA.

    python prepare_data.py my_text --out data/qwen3 --tokenizer Qwen3-0.6B --window 2048
    python train.py config/prune_qwen3_0.6b.py

2,000 steps of 16 x 2,048 tokens: 66M tokens; 12.4 GiB (`--dry_run`). The embedding of 151,936 tokens loses only a
quarter.
"""

out = "out/prune_qwen3_0.6b"
data = "data/qwen3"

init_from = "Qwen3-0.6B"
target_n_layer = 24
target_d_model = 768
target_n_head = 12  # 6 of 8 KV groups, each with its 2 query heads
target_d_ffn = 2304

steps = 2000
batch_size = 16
micro_batch = 4
gate_samples = 4
seq_len = 2048
lr = 1e-4
warmup = 200
dtype = "bfloat16"
activation_checkpointing = True

sparsity_warmup = 400
gate_lr = 1.0
multiplier_lr = 1.0

schedule = "dro"
reference_model = "Qwen3-0.6B"

eval_interval = 50
eval_sequences = 64
