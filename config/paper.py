"""The paper's robust mixture: both additions, in the paper's bounds. Configs start from it, or are followed by it:

    python train.py config/toy_continue.py config/paper.py --out out/toy_paper

The law that predicts is a setting of its own: `law = "paper"` is the published one. The defaults of train.py give the
mixture more room and keep the given references: docs/default.md has the reasons.
"""

schedule = "dro"
dynamic_reference = True
dynamic_ratio = True
rho = 0.1
temperature = 0.0
delta = 0.1
bound = 2.0
