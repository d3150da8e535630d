"""Train the 2.7B model that prune_7b_2.7b.py made on. All else is as in continue_1.3b.py.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/continue_2.7b.py

45 GiB per GPU on 8 GPUs (`--dry_run --world_size=8`).
"""

base = "continue_1.3b.py"
out = "out/continue_2.7b"

init_from = "out/prune_7b_2.7b"

micro_batch = 2

reference_losses = {  # as in prune_7b_2.7b.py
    "RedPajamaCommonCrawl": 1.8712,
    "RedPajamaC4": 2.0328,
    "RedPajamaGithub": 0.6883,
    "RedPajamaBook": 2.0325,
    "RedPajamaWikipedia": 1.6297,
    "RedPajamaArXiv": 1.3560,
    "RedPajamaStackExchange": 1.5353,
}
