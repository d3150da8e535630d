"""Llama-2-7B to 2.7B, the paper's larger target. All else is as in prune_7b.py.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/prune_7b_2.7b.py

0.42B tokens; 38 GiB per GPU on 8 GPUs, 17 with shard_gradients = True. Then continue_2.7b.py.
"""

base = "prune_7b.py"
out = "out/prune_7b_2.7b"

target_n_layer = 32
target_d_model = 2560
target_n_head = 20
target_d_ffn = 6912

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
