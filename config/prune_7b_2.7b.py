"""Llama-2-7B to 2.7B, the paper's larger target: otherwise as prune_7b.py.

    torchrun --nproc_per_node=8 train.py config/prune_7b_2.7b.py

0.42B tokens; 38 GiB a GPU on 8, 17 with shard_gradients = True.
"""

out = "out/prune_7b_2.7b"
data = "data/slimpajama"
domains = [
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaWikipedia",
    "RedPajamaArXiv",
    "RedPajamaStackExchange",
]

init_from = "Llama-2-7b-hf"
target_n_layer = 32
target_d_model = 2560
target_n_head = 20
target_d_ffn = 6912

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
# what Sheared LLaMA's scaling law says a 2.7B model should reach
reference_losses = {
    "RedPajamaCommonCrawl": 1.8712,
    "RedPajamaC4": 2.0328,
    "RedPajamaGithub": 0.6883,
    "RedPajamaBook": 2.0325,
    "RedPajamaWikipedia": 1.6297,
    "RedPajamaArXiv": 1.3560,
    "RedPajamaStackExchange": 1.5353,
}

eval_interval = 50
eval_sequences = 64
save_interval = 200
