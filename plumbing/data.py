"""Tokens -> batches: the reader that draws by domain weight. plumbing/dataset.py opens the data set."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from plumbing import randomness
from plumbing.dataset import TokenData
from plumbing.settings import Settings
from plumbing.transfer import send


class MicroBatch(NamedTuple):
    """Sequences that a process computes at once, all under one sample of the gates."""

    tokens: Tensor  # (b, T+1) int64
    domain: Tensor  # (b,) int64, index of each sequence's domain
    gate_sample: int


def open_data(s: Settings) -> TokenData:
    """The data set of a run. ValueError unless the settings name its domains, and each has enough text to be
    evaluated."""
    data = TokenData(s.data, s.domains or None)
    for name, given in (("ratio", s.ratio), ("reference_losses", s.reference_losses)):
        lacks, others = [d for d in data.domains if d not in given], [d for d in given if d not in data.domains]
        if given and (lacks or others):
            wrong = [f"{what} {', '.join(names)}" for what, names in (("lacks", lacks), ("names", others)) if names]
            hint = "; --ratio={} takes their shares of the tokens" if name == "ratio" else ""
            raise ValueError(
                f"{name} must name the domains {', '.join(data.domains)}, but it {' and '.join(wrong)}{hint}"
            )
    for domain in data.domains:
        data.eval_numbers(domain, "val", s.seq_len)  # raises where there is too little text
    return data


class BatchReader:
    """Batches of training sequences, each sequence's domain drawn from the weights of the moment.

    A domain's sequences come in the order of a permutation keyed by (order_seed, domain, epoch): none comes back before
    all have come. What a batch holds follows from (seed, step, weights) and one counter per domain. A run that starts
    from a run goes on in the same permutation (`go_on_after`), so no stage reads what the stage before it has read.
    Each of `processes` processes gets its share of a batch, in micro-batches on `device`.
    """

    def __init__(
        self,
        data: TokenData,
        seq_len: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        processes: int = 1,
        micro_batch: int = 0,
        gate_samples: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.data, self.seq_len, self.batch_size = data, seq_len, batch_size
        self.seed = self.order_seed = seed
        self.mine = batch_size // processes  # sequences of this process, from the one numbered `start`
        self.start, self.micro_batch = rank * self.mine, micro_batch or self.mine
        self.gate_samples, self.device = gate_samples, torch.device(device)
        self.totals = [data.sequences(domain, "train", seq_len) for domain in data.domains]
        self.counts = [0] * len(data.domains)  # sequences drawn so far, by the runs before this one, too
        self.first = list(self.counts)  # what they were when this run began
        self.others = {}  # sequences that the runs before this one have read of domains that it does not use
        self._orders = {}  # domain index -> (epoch, permutation)
        for domain, total in zip(data.domains, self.totals, strict=True):
            if total == 0:
                raise ValueError(f"{data.path}: train of domain {domain} is shorter than one sequence of {seq_len}")

    def next_batch(self, step: int, weights: np.ndarray) -> list[MicroBatch]:
        """This process's share of the batch of a step, in micro-batches. Every process must call it with the same step
        and weights: all sequences are counted, its own are read. See `draw` for the weights."""
        domains, sequences = self.draw(step, weights)
        parts = []
        for start in range(self.start, self.start + self.mine, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            tokens, domain = self.read(domains[part], sequences[part]), torch.from_numpy(domains[part])
            tokens, domain = send(tokens, self.device), send(domain, self.device)
            # the batch is cut into gate_samples equal parts; `start` is a number in the whole batch, of all processes
            parts.append(MicroBatch(tokens, domain, gate_sample=start * self.gate_samples // self.batch_size))
        return parts

    def draw(self, step: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the domain and number of the sequence within it, int64 (batch_size,), for the batch of a step.

        weights: (n domains,), summing to 1; 0 means never. Raises ValueError for weights that are no distribution.
        """
        weights = np.asarray(weights, np.float64)
        if weights.shape != (len(self.totals),) or not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-3:
            names = ", ".join(self.data.domains)
            raise ValueError(
                f"domain weights must be {len(self.totals)} numbers >= 0 that sum to 1, for {names}: {weights}"
            )
        rng = randomness.generator(self.seed, randomness.DRAWS, step)
        domains = rng.choice(len(weights), size=self.batch_size, p=weights / weights.sum())
        return domains, np.array([self._advance(d) for d in domains], np.int64)

    def peek(self, steps: int, weights: np.ndarray) -> list[Tensor]:
        """The tokens (batch_size, T+1) that the first `steps` steps will read. The reader stays where it is."""
        counts = list(self.counts)
        tokens = [self.read(*self.draw(step, weights)) for step in range(steps)]
        self.counts = counts
        return tokens

    def read(self, domains: np.ndarray, sequences: np.ndarray) -> Tensor:
        """The tokens of these sequences, int64 (b, T+1)."""
        tokens = np.empty((len(domains), self.seq_len + 1), np.int64)
        for d in np.unique(domains):
            mine = domains == d
            tokens[mine] = self.data.read(self.data.domains[d], "train", self.seq_len, sequences[mine])
        return torch.from_numpy(tokens)

    def _advance(self, d: int) -> int:
        """Number of the next sequence of domain d."""
        epoch, i = divmod(self.counts[d], self.totals[d])
        if self._orders.get(d, (None,))[0] != epoch:
            number = sorted(self.data.meta["domains"]).index(self.data.domains[d])  # the same whichever are used
            rng = randomness.generator(self.order_seed, randomness.ORDERS, number, epoch)
            self._orders[d] = epoch, rng.permutation(np.arange(self.totals[d], dtype=np.uint32))
        self.counts[d] += 1
        return int(self._orders[d][1][i])

    def tokens_seen(self) -> np.ndarray:
        """Training tokens of each domain that this run has drawn so far, int64 (n domains,)."""
        return (np.array(self.counts, np.int64) - self.first) * self.seq_len

    def epochs(self) -> np.ndarray:
        """How often the text of each domain has been read, by the runs before this one, too (n domains,); 1.0: once."""
        return np.array(self.counts) / self.totals

    def state_dict(self) -> dict:
        """How far each domain was read, and in which data and order: a run that starts from this one needs both."""
        return {
            "data": self.data.digest,
            "seq_len": self.seq_len,
            "order_seed": self.order_seed,
            "sequences": dict(zip(self.data.domains, self.counts, strict=True)),
            "first": dict(zip(self.data.domains, self.first, strict=True)),
            "others": self.others,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where state_dict() was taken. ValueError where the domains, or their order, or seq_len are others."""
        if list(state["sequences"]) != self.data.domains:
            raise ValueError(
                f"{self.data.path}: the checkpoint was made with the domains {', '.join(state['sequences'])}, in this "
                f"order, not with {', '.join(self.data.domains)}"
            )
        if state["seq_len"] != self.seq_len:
            raise ValueError(f"seq_len = {self.seq_len}: the checkpoint was made with {state['seq_len']}")
        self.order_seed, self.others = state["order_seed"], state["others"]
        self.counts = [int(state["sequences"][domain]) for domain in self.data.domains]
        self.first = [int(state["first"][domain]) for domain in self.data.domains]

    def go_on_after(self, state: dict) -> str | None:
        """Begin where the reader of another run ended, whose state_dict() this is. Returns why that cannot be, or None.
        A domain that the other run did not use begins at its beginning."""
        if state["data"] != self.data.digest:
            return "it was trained on other data"
        if state["seq_len"] != self.seq_len:
            return f"it was trained on sequences of {state['seq_len']} tokens, not {self.seq_len}"
        read = {**state["others"], **state["sequences"]}
        self.order_seed = state["order_seed"]
        self.counts = [int(read.pop(domain, 0)) for domain in self.data.domains]
        self.first, self.others = list(self.counts), read
        return None
