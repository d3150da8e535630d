"""A small Llama from scratch on the demo data: the source model that toy_prune.py prunes.

1.25M parameters, 1.6M tokens, two to five minutes on two CPU cores. It is short, because it is the demo's.
"""

out = "out/toy_pretrain"
data = "data/demo"

n_layer = 6
d_model = 128
n_head = 4
d_ffn = 344

steps = 800
batch_size = 8
seq_len = 256
lr = 3e-3
warmup = 80

eval_interval = 200
save_interval = 200
