"""Random streams: each is its own, and stays what it is."""

import itertools

from plumbing import randomness
from plumbing.randomness import CHOICE, DRAWS, NOISE, ORDERS, QUESTIONS, generator


def test_each_tag_and_key_has_its_own_stream():
    keys = [(0, CHOICE), *((0, tag, 7) for tag in (DRAWS, QUESTIONS)), *((0, tag, 7, 1) for tag in (ORDERS, NOISE))]
    keys += [(1, DRAWS, 7), (0, DRAWS, 8), (0, NOISE, 8, 1), (0, NOISE, 7, 0)]
    numbers = [generator(*key).random(4).tolist() for key in keys]
    assert all(a != b for a, b in itertools.combinations(numbers, 2))
    assert numbers == [generator(*key).random(4).tolist() for key in keys]


def test_streams_stay_what_they_are():
    """Another key or tag would give every finished run other numbers than it had."""
    tags = {name: getattr(randomness, name) for name in ("DRAWS", "ORDERS", "NOISE", "CHOICE", "QUESTIONS", "TIES")}
    assert tags == {"DRAWS": 1, "ORDERS": 2, "NOISE": 3, "CHOICE": 4, "QUESTIONS": 5, "TIES": 6}
    assert generator(3, NOISE, 7, 1).random() == 0.8369408669731738
