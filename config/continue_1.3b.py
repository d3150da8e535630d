"""Train the 1.3B model that prune_7b.py made on, the paper's setting: 48,000 steps of 256 x 4,096 tokens, 50B tokens.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/continue_1.3b.py

43 GiB per GPU on 8 GPUs (`--dry_run --world_size=8`).
"""

base = "slimpajama.py"
out = "out/continue_1.3b"

init_from = "out/prune_7b"

steps = 48000
batch_size = 256
micro_batch = 4
warmup = 1440

reference_losses = {  # as in prune_7b.py
    "RedPajamaCommonCrawl": 1.9643,
    "RedPajamaC4": 2.1251,
    "RedPajamaGithub": 0.7459,
    "RedPajamaBook": 2.1393,
    "RedPajamaWikipedia": 1.7590,
    "RedPajamaArXiv": 1.4449,
    "RedPajamaStackExchange": 1.6117,
}

eval_interval = 400
save_interval = 400
