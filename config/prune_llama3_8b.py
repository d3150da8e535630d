"""Llama-3-8B to about 3B: grouped-query attention, so whole KV groups go with their query heads.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/prune_llama3_8b.py

0.42B tokens; 48 GiB per GPU on 8 GPUs (`--dry_run --world_size=8`). All else is as in prune_7b.py.
"""

base = "prune_7b.py"
out = "out/prune_llama3_8b"
data = "data/slimpajama_llama3"

init_from = "Meta-Llama-3-8B"
target_n_layer = 28
target_d_model = 2688
target_n_head = 24  # 6 of 8 KV groups, each with its 4 query heads
target_d_ffn = 7680

reference_losses = {}
reference_model = "Meta-Llama-3-8B"  # its own losses: nobody published any for this tokenizer
