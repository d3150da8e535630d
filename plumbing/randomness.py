"""The random streams of a run: what each is for, and what it is keyed by.

Each stream has a tag, and its numbers follow from (seed, tag, key) alone, whatever was drawn before. So a run gives the
same numbers on one process or on eight, and after it was stopped and resumed.

    tag        key                        what is drawn                                       drawn in
    DRAWS      step                       the domain of each sequence of the step's batch     plumbing/data.py
    ORDERS     domain's number, epoch     the order in which a domain's sequences are read    plumbing/data.py
    NOISE      step, gate sample          the noise u of all gates                            masks.py
    CHOICE     (none)                     random scores, where gates are not learned          plumbing/choices.py
    TIES       (none; seed 0)             which of equal scores survives                      masks.py
    QUESTIONS  crc32 of domain's name     questions about a domain's text                     plumbing/continuation.py

Why tags? A step's gates must know nothing of its batch, and both are keyed by the step. A tag keeps such streams apart.
PyTorch, not numpy, draws the initial weights and generated text (model.py): from the seed alone.
"""

import numpy as np

DRAWS, ORDERS, NOISE, CHOICE, QUESTIONS, TIES = 1, 2, 3, 4, 5, 6


def generator(seed: int, tag: int, *key: int) -> np.random.Generator:
    """The random stream of a seed, a tag and its key (see the table above), from its beginning."""
    return np.random.default_rng([seed, tag, *key])
