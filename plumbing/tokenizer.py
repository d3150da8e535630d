"""Text <-> token ids, by the libraries that define them: tiktoken and tokenizers.

    load_tokenizer("byte" | "gpt2" | "cl100k_base" | FILE | DIR)

Both classes have the same face:

    name                      what load_tokenizer() takes to load it again
    n_vocab                   largest id + 1
    eot                       id of the token that ends a text
    bos                       id of the token that starts a text (Llama 2 and 3 have one), or None
    encode(text)              ids, uint32 (n,); neither bos nor eot is added; what looks like a special token stays text
    encode_with_bytes(text)   ids, and the number of UTF-8 bytes of the text that each id stands for, uint32 (n,)
    decode(ids)               text; bytes that are no UTF-8 become U+FFFD, and an id that no token has is passed over
"""

import base64
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from plumbing import records
from plumbing.foreign import what_it_is

TOKENIZER_FILES = (  # what `transformers` may write beside the weights
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)

# awkward text, to see what a tokenizer does
PROBE = "The quick brown fox, 1,234.5 jumps!\n\n\tdef main():    return 'naïve' + \"日本語 🦊\" # \u00e9\u200b</s>"


class TiktokenTokenizer:
    """byte, OpenAI's encodings and Llama 3's rank file, by the tiktoken library."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, eot: int, bos: int | None = None):
        self.name, self.encoding, self.n_vocab = name, encoding, encoding.n_vocab
        self.eot, self.bos = eot, bos

    def encode(self, text: str) -> np.ndarray:
        """Ids, uint32 (n,)."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the pattern's backtracking gives up on enormous runs of white space
            parts = [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
            return np.concatenate([self.encoding.encode_to_numpy(p, disallowed_special=()) for p in parts])

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.n_vocab, np.uint32)
        for i in range(self.n_vocab):
            try:
                sizes[i] = len(self.encoding.decode_single_token_bytes(i))
            except KeyError:
                pass  # cl100k_base has gaps between its special tokens
        return sizes

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and the bytes of text each stands for, uint32 (n,) both."""
        ids = self.encode(text)
        return ids, self._token_bytes[ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        known = (int(i) for i in ids if i < self.n_vocab and (self._token_bytes[i] or i == self.eot))
        return self.encoding.decode(list(known), errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, by the tokenizers library."""

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file
        with library_errors(f"{file}: not a tokenizer.json of the tokenizers library", file):
            self._load(file.read_text(encoding="utf-8"))
            vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.eot = self._find_eot(vocabulary)
        self.n_vocab = max(vocabulary.values()) + 1
        with library_errors(f"{file}: this tokenizer fails on a simple text", file):
            bare, whole = (self.tokenizer.encode(PROBE, add_special_tokens=special).ids for special in (False, True))
        self.bos = self._find_bos(bare, whole)
        self._keep_as_text(self.eot, self.bos)
        for text in [PROBE, *(token for token, i in vocabulary.items() if i in (self.eot, self.bos))]:
            self._encode(text)  # a letter that gives such a token is refused here, before the work, if PROBE has it

    def _load(self, text: str) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def _keep_as_text(self, *ids: int | None) -> None:
        """The library takes an added token for text only where it is `special`. Make the tokens that end and start a
        document so: what looks like one inside a document must not end it."""
        if all(token.special for i, token in self.tokenizer.get_added_tokens_decoder().items() if i in ids):
            return
        content = json.loads(self.tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] |= token["id"] in ids
        self._load(json.dumps(content))

    def _find_eot(self, vocabulary: dict[str, int]) -> int:
        file = self.file
        for beside in (file.parent / "tokenizer_config.json", file.parent / "config.json"):
            if beside.is_file():
                config = records.read(beside, records.TokenizerConfig, "a config that names the end of a text")
                token, ids = config.get("eos_token"), config.get("eos_token_id")
                token = token["content"] if isinstance(token, dict) else token
                if token in vocabulary:
                    return vocabulary[token]
                if ids is not None:
                    eot = ids[0] if isinstance(ids, list) else ids
                    if eot not in vocabulary.values():
                        raise ValueError(f"{beside}: eos_token_id = {eot} is no token of {file.name}")
                    return eot
        for token in ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"):
            if token in vocabulary:
                return vocabulary[token]
        raise ValueError(f"{file}: which token ends a text? Name it as eos_token in a tokenizer_config.json beside it")

    def _find_bos(self, bare: list[int], whole: list[int]) -> int | None:
        """The token that the file's own post-processor puts before a text, if it does."""
        before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if before is None or not bare:
            raise ValueError(f"{self.file}: it leaves nothing of a simple text, or changes it between special tokens")
        if before > 1:
            raise ValueError(f"{self.file}: it puts {before} tokens before a text; one or none is supported")
        return whole[0] if before else None

    def _encode(self, text: str) -> list[tuple[str, list[int], Any]]:
        """(text, ids, the library's encoding) of a text. Some models make eot or bos of its letters all the same, as
        Unigram does, or BPE that has learned to. There the text is cut within these letters: then it has several parts.
        ValueError where a single letter gives such a token."""
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # see `library_errors`
            raise ValueError(f"{self.file}: this tokenizer fails on {text[:40]!r}: {error}") from None
        ids, special = encoding.ids, (self.eot, self.bos)
        if not any(i in ids for i in special):
            return [(text, ids, encoding)]
        spans = [span for i, span in zip(ids, encoding.offsets) if i in special]
        for start, end in spans:
            if end - start < 2:
                letter = text[start:end]
                raise ValueError(
                    f"{self.file}: {letter!r} starts or ends each document, but a text may hold this letter, too"
                )
        cuts = [0, *(start + 1 for start, _ in spans), len(text)]
        return [part for start, end in pairwise(cuts) for part in self._encode(text[start:end])]

    def encode(self, text: str) -> np.ndarray:
        """Ids, uint32 (n,)."""
        return np.concatenate([np.array(ids, np.uint32) for _, ids, _ in self._encode(text)])

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A token's bytes reach from the furthest end of the tokens before it to its own, by the library's offsets."""
        all_ids, all_sizes = [], []
        for part, ids, encoding in self._encode(text):
            point = np.frombuffer(part.encode("utf-32-le"), np.uint32)
            position = np.concatenate([[0], np.cumsum(1 + (point > 0x7F) + (point > 0x7FF) + (point > 0xFFFF))])
            ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
            ends[-1:] = len(part)  # what a normalizer dropped at the end of the text counts too
            all_ids.append(np.array(ids, np.uint32))
            all_sizes.append(np.diff(position[ends], prepend=0).astype(np.uint32))
        return np.concatenate(all_ids), np.concatenate(all_sizes)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


@contextmanager
def library_errors(complaint: str, file: Path) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into a ValueError of one line. It raises bare Exceptions. Where its
    Rust code panics, it raises what is no Exception, and writes a trace to stderr, which is closed meanwhile."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:
        raise ValueError(f"{complaint}: {what_it_is(file) or error}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


Tokenizer = TiktokenTokenizer | HuggingFaceTokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = [  # in the order of their ids, which follow the ranks
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give awkward text the same ids, whatever file they are in."""
    return hashlib.sha256(json.dumps(tokenizer.encode(PROBE).tolist()).encode()).hexdigest()[:16]


def load_tokenizer(spec: str, named: str = "--tokenizer") -> Tokenizer:
    """The tokenizer `spec` names: byte, a tiktoken encoding (gpt2, cl100k_base), a file, or a folder that holds one.

    A file is a tokenizer.json, or Llama 3's tokenizer.model (lines of base64 and rank). Where there is none, ValueError
    says so in the words `named`: the option or the file that named it.
    """
    if spec == "byte":
        # In pieces of 32 bytes encoding runs at 50 MB/s, in single ones at 12; it is linear in the length either way.
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|endoftext|>": 256}
        encoding = tiktoken.Encoding(spec, pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens=special)
        return TiktokenTokenizer(spec, encoding, eot=256)
    names = tiktoken.list_encoding_names()
    if spec in names:
        try:
            encoding = tiktoken.get_encoding(spec)
        except OSError:
            raise ValueError(
                f"{named} {spec}: cannot be downloaded, which tiktoken does the first time (no network?); "
                "the tokenizer byte, and a tokenizer.json, need no download"
            ) from None
        return TiktokenTokenizer(spec, encoding, encoding.eot_token)
    # links are not followed: in Hugging Face's cache, tokenizer.json is one, and what it leads to has another name
    path = file = Path(spec).expanduser().absolute()
    if path.is_dir():
        file = tokenizer_file(path)
        if file is None:
            raise ValueError(f"{named} {spec}: the folder holds neither tokenizer.json nor tokenizer.model")
    elif not path.is_file():
        near = difflib.get_close_matches(spec, ["byte", *names], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the names are byte, {', '.join(names)}"
        raise ValueError(f"{named} {spec}: no such file or folder, nor a tokenizer's name{hint}")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(str(path), file)
    if sentencepiece_only(path):
        raise ValueError(
            f"{file}: this is sentencepiece's, which is not read; `transformers` makes a tokenizer.json of it"
        )
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
        if len(ranks) != LLAMA3_RANKS:
            raise ValueError("its pattern and special tokens are not known")
        special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(LLAMA3_SPECIAL)}
        encoding = tiktoken.Encoding(file.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    except ValueError:
        raise ValueError(
            f"{file}: not Llama 3's rank file ({what_it_is(file) or f'{LLAMA3_RANKS:,} lines of base64 and rank'}); "
            "of another model use the tokenizer.json that is published beside it"
        ) from None
    return TiktokenTokenizer(str(path), encoding, special["<|end_of_text|>"], special["<|begin_of_text|>"])


def tokenizer_file(directory: Path) -> Path | None:
    """The file of a directory that holds its tokenizer, or None."""
    return next((directory / n for n in ("tokenizer.json", "tokenizer.model") if (directory / n).is_file()), None)


def sentencepiece_only(path: Path) -> bool:
    """Whether a file, or the only tokenizer of a directory, is sentencepiece's: a protocol buffer, which nothing here
    reads. `transformers` makes a tokenizer.json of it."""
    file = tokenizer_file(path) if path.is_dir() else path
    if file is None or file.suffix != ".model":
        return False
    with open(file, "rb") as raw:
        return raw.read(1) == b"\n"  # field 1, a piece; a rank file begins with base64


def files_of_tokenizer(spec: str) -> dict[str, Path]:
    """name in a model directory -> file, of the tokenizer that `spec` names: what `transformers` needs to load it.
    Empty for a tokenizer without files, or where they are not there any more."""
    path = Path(spec)
    if not path.is_absolute():
        return {}
    folder = path.parent if path.is_file() else path
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return files | ({f"tokenizer{path.suffix}": path} if path.is_file() else {})
