"""Which of two continuations is the true one? The paper's benchmark in kind, on any text.

    python eval.py out/toy_prune out/toy_continue --data data/demo --continuation
    python eval.py my_llama --data data/mine --continuation --questions books.jsonl code.jsonl

A question is a stretch of a domain's text; the choices are what follows, and as many tokens from elsewhere in the same
domain. The model answers with the choice whose tokens it finds likelier on average. Chance is one half.

    {"question": "...", "choice1": "...", "choice2": "...", "label": 0}     a line of a .jsonl file; label: index of the
                                                                            true choice, from 0 (or 1 and 2)
"""

import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import Llama
from plumbing import parallel, randomness
from plumbing.data import TokenData
from plumbing.tokenizer import Tokenizer

PREFIX, LENGTH = 96, 32  # tokens of a question, and of each choice


class Question(NamedTuple):
    """Text, what may follow it, and the index of what does."""

    question: str
    choice1: str
    choice2: str
    label: int


def make_questions(data: TokenData, tokenizer: Tokenizer, domain: str, split: str, n: int, seed: int) -> list[Question]:
    """Up to n questions from a domain's text, the same for the same seed. ValueError where the text has none.

    Both choices are LENGTH tokens as the tokenizer cuts question + choice, so that any scoring that takes all tokens
    together, or their mean, gives the same answer.
    """
    tokens = data.tokens(domain, split)
    # val and test are windows of a held-out pool, in turn: only within one does the text go on
    window = len(tokens) if split == "train" else min(data.meta["window"], len(tokens))
    rng = randomness.generator(seed, randomness.QUESTIONS, zlib.crc32(domain.encode()))
    found, used = [], set()

    def draw(size: int) -> int:
        return int(window * rng.integers(len(tokens) // window) + rng.integers(window - size + 1))

    for _ in range(50 * n if window >= PREFIX + LENGTH else 0):
        start, other = draw(PREFIX + LENGTH), draw(LENGTH)
        ids, wrong = tokens[start : start + PREFIX + LENGTH].tolist(), tokens[other : other + LENGTH].tolist()
        overlap = abs(other - start - PREFIX) < LENGTH or wrong == ids[PREFIX:]
        if overlap or start in used or data.eot in ids + wrong:
            continue
        question, true, false = (tokenizer.decode(x) for x in (ids[:PREFIX], ids[PREFIX:], wrong))
        whole = all(
            tokenizer.encode(text).tolist() == expected
            for text, expected in (
                (question, ids[:PREFIX]),
                (question + true, ids),
                (question + false, ids[:PREFIX] + wrong),
            )
        )
        if whole and not question[-1].isspace():  # which some harnesses move into the choices
            label = int(rng.integers(2))
            found.append(Question(question, *((true, false) if label == 0 else (false, true)), label))
            used.add(start)
            if len(found) == n:
                break
    if not found:
        raise ValueError(
            f"{data.path}: {split} of domain {domain} has no document with {PREFIX + LENGTH} tokens in a row to ask for"
        )
    return found


def read_questions(file: Path) -> list[Question]:
    """The questions of a .jsonl file. ValueError names the line that is none."""
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Question(row["question"], row["choice1"], row["choice2"], row["label"]))
            if not all(isinstance(text, str) for text in found[-1][:3]) or type(found[-1].label) is not int:
                raise ValueError("question and choices must be text, the label a whole number")
            if not (found[-1].choice1 and found[-1].choice2):
                raise ValueError("no choice may be empty")
            "".join(found[-1][:3]).encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: not a question ({error})") from None
    labels = {q.label for q in found}
    if not found or not (labels <= {0, 1} or labels <= {1, 2}):
        raise ValueError(f"{file}: labels must be 0 and 1, or 1 and 2, not {sorted(labels)}")
    return [q._replace(label=q.label - 1) for q in found] if 2 in labels else found


def write_questions(file: Path, questions: list[Question]) -> None:
    """Write a .jsonl file that read_questions, and other harnesses, read."""
    file.write_text("".join(json.dumps(q._asdict(), ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")


@torch.no_grad()
def log_likelihoods(model: Llama, tokenizer: Tokenizer, questions: list[Question], batch_size: int) -> np.ndarray:
    """Mean log-likelihood of each choice's tokens after the question, nats, (n, 2). The choice's tokens are those that
    question + choice has beyond the question's own; what is too long for the model loses its beginning."""
    longest, rows = model.config.max_seq_len + 1, []
    for q in questions:
        context = tokenizer.encode(q.question).tolist()
        for choice in (q.choice1, q.choice2):
            ids = tokenizer.encode(q.question + choice).tolist()
            scored = min(max(1, len(ids) - len(context)), longest - 1)
            rows.append((([tokenizer.eot] * (len(ids) <= scored) + ids)[-longest:], scored))
    device, means = parallel.local(model.embed_tokens.weight).device, np.empty(len(rows))
    order = np.argsort([-len(ids) for ids, _ in rows], kind="stable")  # of like length together: less padding
    for part in np.split(order, range(batch_size, len(order), batch_size)):
        width = max(len(rows[i][0]) for i in part)
        tokens = torch.full((len(part), width), tokenizer.eot, device=device)
        weight = torch.zeros(len(part), width - 1, dtype=torch.float64, device=device)
        for row, i in enumerate(part):
            ids, scored = rows[i]
            tokens[row, : len(ids)] = torch.tensor(ids)
            weight[row, len(ids) - 1 - scored : len(ids) - 1] = 1 / scored
        nll = model(tokens[:, :-1], targets=tokens[:, 1:])  # what is right of the text changes nothing in it
        means[part] = -(nll.double() * weight).sum(1).cpu().numpy()
    return means.reshape(-1, 2)


def accuracy(means: np.ndarray, questions: list[Question]) -> dict:
    """Share of right answers with its binomial standard error, and the answers."""
    answers = means.argmax(1)
    p, n = float(np.mean(answers == [q.label for q in questions])), len(questions)
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / n), "questions": n, "answers": answers.tolist()}
