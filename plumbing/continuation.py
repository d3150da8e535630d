"""Which of two continuations is the true one? The paper's benchmark in kind, on any text.

    python eval.py out/toy_prune out/toy_continue --data data/demo --continuation
    python eval.py my_llama --data data/mine --continuation --questions books.jsonl code.jsonl

A question is a stretch of a domain's text. One choice is what follows it. The other choice is as many tokens from
elsewhere in the same domain. The model's answer is the choice whose tokens it finds likelier on average. A model that
guesses is right in half of the cases.

    {"question": "...", "choice1": "...", "choice2": "...", "label": 0}     a line of a .jsonl file; label: index of the
                                                                            true choice, from 0 (or 1 and 2)

A choice is scored as in lm-evaluation-harness. White space at the end of a question counts as the beginning of its
choices, since most tokenizers put a space into the token of the word after it. `question + choice` is cut into tokens
as one text, and what comes after the question's own tokens is scored. Where the tokenizer merges the end of the
question with the choice ("France is" + "n't" may end in the token "isn't"), the score begins at the first token that
differs from the question's own, so that all of the choice is in it. Such questions are counted.
"""

import codecs
import json
import math
import statistics
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import Llama
from plumbing import parallel, randomness
from plumbing.data import TokenData
from plumbing.dataset import folder_of
from plumbing.output import check_output, write_whole
from plumbing.records import QuestionLine, parse
from plumbing.tables import time_left
from plumbing.tokenizer import Tokenizer

PREFIX, LENGTH = 96, 32  # tokens of a question, and of each choice


class Question(NamedTuple):
    """Text, what may follow it, and the index of what does."""

    question: str
    choice1: str
    choice2: str
    label: int


# -- questions: made from text, in files ----------------------------------------------------------------------------


def make_questions(data: TokenData, tokenizer: Tokenizer, domain: str, split: str, n: int, seed: int) -> list[Question]:
    """Up to n questions from a domain's text, the same for the same seed. ValueError where the text has none.

    The work is bounded by the length of the text, whatever n is.

    Both choices are LENGTH tokens as the tokenizer cuts question + choice, so that any scoring that takes all tokens
    together, or their mean, gives the same answer.
    """
    tokens = data.tokens(domain, split)
    # val and test are windows of a held-out pool, in turn: only within one does the text go on
    window = len(tokens) if split == "train" else min(data.meta["window"], len(tokens))
    rng = randomness.generator(seed, randomness.QUESTIONS, zlib.crc32(domain.encode()))

    def draw(size: int) -> int:
        """Where a stretch of `size` tokens begins that lies within one window."""
        return int(window * rng.integers(len(tokens) // window) + rng.integers(window - size + 1))

    found, used = [], set()
    tries = 50 * min(n, len(tokens)) if window >= PREFIX + LENGTH else 0
    for _ in range(tries):
        start, other = draw(PREFIX + LENGTH), draw(1 + LENGTH)
        ids, (before, *wrong) = tokens[start : start + PREFIX + LENGTH].tolist(), tokens[other:][: 1 + LENGTH].tolist()
        overlap = abs(other + 1 - start - PREFIX) < LENGTH or wrong == ids[PREFIX:]
        if overlap or start in used or data.eot in [*ids, before, *wrong]:
            continue
        asked = ids[:PREFIX]
        question, *whole = map(tokenizer.decode, (asked, ids, asked + wrong))
        true, false = (text.removeprefix(question) for text in whole)  # decoded alone, Llama 2's would lose a space
        expected = (question, asked), (question + true, ids), (question + false, asked + wrong)
        if any(tokenizer.encode(text).tolist() != tokens_of_it for text, tokens_of_it in expected):
            continue  # the tokenizer cuts the text at other places than here
        # White space at the end of a question would belong to the choices. So no true choice begins within a run of
        # white space, which is easy to foresee; no wrong one may, either.
        if question[-1].isspace() or tokenizer.decode([before])[-1:].isspace():
            continue
        label = int(rng.integers(2))
        choices = (true, false) if label == 0 else (false, true)
        found.append(Question(question, *choices, label))
        used.add(start)
        if len(found) == n:
            break
    if not found:
        held_out = split != "train" and data.meta["window"] < PREFIX + LENGTH
        why = f": its windows have {data.meta['window']}, see --window of prepare_data.py" if held_out else ""
        raise ValueError(
            f"{data.path}: {split} of domain {domain} has no document with {PREFIX + LENGTH} tokens in a row to ask "
            f"for{why}"
        )
    return found


def read_questions(file: Path) -> list[Question]:
    """The questions of a .jsonl file, with labels from 0. ValueError names the line that is none, and refuses labels
    that can be read in two ways."""
    found = []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        found.append(Question(**parse(line, QuestionLine, f"{file}:{number}: not a question")))
        if found[-1].choice1 == found[-1].choice2:
            raise ValueError(f"{file}:{number}: the two choices are the same")
    labels = {q.label for q in found}
    if labels == {1}:
        raise ValueError(
            f"{file}: all labels are 1, which is the second choice where labels begin at 0 and the first where they "
            "begin at 1: swap the choices of one question and set its label to 0 or 2"
        )
    if not found or not (labels <= {0, 1} or labels <= {1, 2}):
        raise ValueError(f"{file}: labels must be 0 and 1, or 1 and 2, not {sorted(labels)}")
    if 2 in labels:
        return [q._replace(label=q.label - 1) for q in found]
    return found


def write_questions(file: Path, questions: list[Question]) -> None:
    """Write a .jsonl file that read_questions, and other harnesses, read."""
    write_whole(file, "".join(json.dumps(q._asdict(), ensure_ascii=False) + "\n" for q in questions))


def make_or_read(
    data: TokenData, tokenizer: Tokenizer, split: str, n: int, seed: int, files: list[str] | None
) -> dict[str, list[Question]]:
    """Domain -> questions: n made from the text of each domain, or those of `files`, each of which is a domain that has
    the file's name. ValueError, see `make_questions` and `read_questions`."""
    if files is None:
        asked = {domain: make_questions(data, tokenizer, domain, split, n, seed) for domain in data.domains}
    elif len({Path(file).stem for file in files}) < len(files):
        raise ValueError("--questions: two files of one name would be one domain")
    else:
        asked = {Path(file).stem: read_questions(Path(file)) for file in files}
    for questions in asked.values():
        if all(q.label == 1 for q in questions):  # a file of these would not say whether its labels begin at 0
            q = questions[0]
            questions[0] = Question(q.question, q.choice2, q.choice1, 0)
    return asked


def write_all(folder: Path, questions: dict[str, list[Question]], were_read: list[str]) -> None:
    """A .jsonl file per domain. ValueError before anything is written where one of them cannot be, or would replace a
    file that holds no questions, or one of the files that they were read from: lines there may hold more."""
    files = {domain: folder / f"{folder_of(domain)}.jsonl" for domain in questions}  # a name may hold a /
    for file in files.values():
        check_output(file)
        if file.exists() and any(file.samefile(source) for source in were_read):
            raise ValueError(f"--write_questions: --questions reads {file}; choose another folder")
        if file.exists() and file.stat().st_size:
            read_questions(file)
    folder.mkdir(parents=True, exist_ok=True)
    for domain, asked in questions.items():
        write_questions(files[domain], asked)


# -- questions as tokens --------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Token ids of a question and one of its choices; the likelihood of the last `scored` ids counts."""

    ids: list[int]
    scored: int


class EncodedQuestion(NamedTuple):
    """A question as tokens. merged: the tokenizer joins the end of the question to a choice."""

    choices: tuple[Choice, Choice]
    label: int
    merged: bool


def encode(tokenizer: Tokenizer, q: Question) -> EncodedQuestion:
    """A question as tokens, see the top of the file. ValueError where the tokenizer leaves nothing of a choice."""
    context = tokenizer.encode(q.question.rstrip()).tolist()
    choices, merged = [], False
    for text in (q.choice1, q.choice2):
        ids = tokenizer.encode(q.question + text).tolist()
        shared = 0
        while shared < min(len(context), len(ids)) and ids[shared] == context[shared]:
            shared += 1
        if shared == len(ids):
            raise ValueError(f"the tokenizer makes no token of the choice {text!r}")
        if shared < len(context):
            merged = True
        start = start_of_text(tokenizer, ids[:shared])
        choices.append(Choice(start + ids, len(ids) - shared))
    return EncodedQuestion(tuple(choices), q.label, merged)


def start_of_text(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """What stands before the token ids of a text that a model is given: the BOS token (beginning of sequence) where the
    tokenizer has one, else nothing. But a model needs a token to go on from: without BOS an empty text gets the end
    token, after which any document may begin."""
    bos = tokenizer.bos
    if bos is not None:
        return [bos]
    if not ids:
        return [tokenizer.eot]
    return []


# -- scores ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(
    model: Llama, questions: list[EncodedQuestion], batch_size: int, progress: tqdm | None = None
) -> np.ndarray:
    """Mean log-likelihood per token of each choice after its question, nats, (n, 2). What is too long for the model
    loses its beginning. progress: a bar that counts choices."""
    longest = model.config.max_seq_len + 1  # the last token is only a target
    choices = [Choice(c.ids[-longest:], min(c.scored, longest - 1)) for q in questions for c in q.choices]
    device, means = parallel.local(model.embed_tokens.weight).device, np.empty(len(choices))
    order = np.argsort([-len(c.ids) for c in choices], kind="stable")  # of like length together: less padding
    for part in np.split(order, range(batch_size, len(order), batch_size)):
        width = max(len(choices[i].ids) for i in part)
        tokens = torch.zeros(len(part), width, dtype=torch.int64)  # what is right of the text changes nothing in it
        weight = torch.zeros(len(part), width - 1, dtype=torch.float64)
        for j, i in enumerate(part):
            ids, scored = choices[i]
            tokens[j, : len(ids)] = torch.tensor(ids)
            weight[j, len(ids) - 1 - scored : len(ids) - 1] = 1 / scored
        tokens, weight = tokens.to(device), weight.to(device)
        nll = model(tokens[:, :-1], targets=tokens[:, 1:])  # (B, T)
        means[part] = -(nll.double() * weight).sum(1).cpu().numpy()
        if progress is not None:
            progress.update(len(part))
    return means.reshape(-1, 2)


def answer(
    models: dict[str, Llama], questions: dict[str, list[EncodedQuestion]], batch_size: int, precision
) -> dict[str, dict[str, dict]]:
    """Model name -> domains and their average, each with accuracy and standard error. `precision()` is the context to
    compute in. FloatingPointError names a model and a domain whose likelihoods are not finite."""
    choices = 2 * sum(len(asked) for asked in questions.values())
    results = {}
    for name, model in models.items():
        domains = {}
        with precision(), time_left(name, choices, "choices") as progress:
            for domain, asked in questions.items():
                means = log_likelihoods(model, asked, batch_size, progress)
                if not np.isfinite(means).all():
                    raise FloatingPointError(f"{name}: a likelihood of domain '{domain}' is not finite")
                domains[domain] = accuracy(means, asked)
        results[name] = {"domains": domains, "average": average(domains)}
    return results


def accuracy(means: np.ndarray, questions: list[EncodedQuestion]) -> dict:
    """Share of right answers with its binomial standard error, and the answers."""
    answers = means.argmax(1)
    p, n = float(np.mean(answers == [q.label for q in questions])), len(questions)
    return {
        "accuracy": p,
        "standard_error": math.sqrt(p * (1 - p) / n),
        "questions": n,
        "merged": sum(q.merged for q in questions),
        "answers": answers.tolist(),
    }


def average(domains: dict[str, dict]) -> dict[str, float]:
    """Mean of the domains' accuracies, and its standard error."""
    errors = [d["standard_error"] for d in domains.values()]
    return {
        "accuracy": statistics.fmean(d["accuracy"] for d in domains.values()),
        "standard_error": math.sqrt(sum(error**2 for error in errors)) / len(errors),
    }
