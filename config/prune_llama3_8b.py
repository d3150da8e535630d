"""Llama-3-8B to about 3B: grouped-query attention, so whole KV groups go with their query heads.

    torchrun --nproc_per_node=8 train.py config/prune_llama3_8b.py

0.42B tokens; 48 GiB a GPU on 8 (`--dry_run=True --world_size=8`).
"""

out = "out/prune_llama3_8b"
data = "data/slimpajama_llama3"
domains = [
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaWikipedia",
    "RedPajamaArXiv",
    "RedPajamaStackExchange",
]

init_from = "Meta-Llama-3-8B"
target_n_layer = 28
target_d_model = 2688
target_n_head = 24  # 6 of 8 KV groups, each with its 4 query heads
target_d_ffn = 7680

steps = 3200
batch_size = 32
gate_samples = 32
micro_batch = 1
seq_len = 4096
lr = 1e-4
warmup = 320
dtype = "bfloat16"
parallel = "fsdp"
activation_checkpointing = True
compile = True

sparsity_warmup = 640
gate_lr = 1.0  # log_alpha has some 9 to go, from its upper clamp to its lower one
multiplier_lr = 1.0

schedule = "dro"
dynamic_reference = True
dynamic_ratio = True
ratio = {
    "RedPajamaCommonCrawl": 0.67,
    "RedPajamaC4": 0.15,
    "RedPajamaGithub": 0.045,
    "RedPajamaBook": 0.045,
    "RedPajamaWikipedia": 0.045,
    "RedPajamaArXiv": 0.025,
    "RedPajamaStackExchange": 0.02,
}
reference_model = "Meta-Llama-3-8B"  # its own losses: no published ones for this tokenizer

eval_interval = 50
eval_sequences = 64
save_interval = 200
