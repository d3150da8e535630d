"""Prune the toy source with learned gates, as the paper does, but in one run: the gates settle.

The gates learn for 200 steps while their noise fades out. Then the choice is fixed, and within 200 steps what is not
kept fades out. The small model is cut out, and the same run trains it on. docs/pruning.md compares this with others.
"""

base = "toy_prune.py"
out = "out/toy_gates"

steps = 700
warmup = 41

gates = "learned"
gate_samples = 4
sparsity_warmup = 100
noise_from = 70
noise_to = 180
settle_at = 200
fade = 200
gate_lr = 1.0  # the paper's; log_alpha must travel 9.2, from its upper clamp to its lower one
multiplier_lr = 1.0  # the paper's
log_alpha = 3.0  # a short run starts below the upper clamp (4.6) and with a phi above 0,
phi = 200.0  # otherwise the constraint would not reach its targets in time

eval_interval = 25
