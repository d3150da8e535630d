"""A small Llama from scratch on the demo data: the source model that toy_prune.py prunes.

1.25M parameters, 2.5M tokens, three to eight minutes on two CPU cores.
"""

out = "out/toy_pretrain"
data = "data/demo"

n_layer = 6
d_model = 128
n_head = 4
d_ffn = 344

steps = 1200
batch_size = 8
seq_len = 256
lr = 3e-3
warmup = 120

eval_interval = 200
save_interval = 200
