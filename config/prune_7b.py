"""Llama-2-7B to 1.3B, the paper's setting: all four granularities at once, the full method, seven RedPajama domains.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/prune_7b.py

3,200 steps of 32 x 4,096 tokens: 0.42B tokens. 38 GiB per GPU on 8 GPUs, 17 with
shard_gradients = True. Look before you rent:

    python train.py config/prune_7b.py --dry_run --world_size=8 --gpu=h100

Then continue_1.3b.py: 50B tokens. These are the paper's two stages. docs/pruning.md has the alternative, one run with
a choice by activations or with gates that settle.
"""

base = "slimpajama.py"
out = "out/prune_7b"

init_from = "Llama-2-7b-hf"
target_n_layer = 24
target_d_model = 2048
target_n_head = 16
target_d_ffn = 5504
export_dtype = "float32"  # it is trained on; the source is in float16

steps = 3200
batch_size = 32
gate_samples = 32
micro_batch = 1
warmup = 320
activation_checkpointing = True

sparsity_warmup = 640
gate_lr = 1.0  # log_alpha must travel 9.2, from its upper clamp to its lower one
multiplier_lr = 1.0

# what Sheared LLaMA's scaling law says a 1.3B model should reach
reference_losses = {
    "RedPajamaCommonCrawl": 1.9643,
    "RedPajamaC4": 2.1251,
    "RedPajamaGithub": 0.7459,
    "RedPajamaBook": 2.1393,
    "RedPajamaWikipedia": 1.7590,
    "RedPajamaArXiv": 1.4449,
    "RedPajamaStackExchange": 1.6117,
}

eval_interval = 50
save_interval = 200
