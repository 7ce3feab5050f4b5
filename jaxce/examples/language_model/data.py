"""The text of the language-model example, its split, and what turns it into tokens.

There is text wherever Python is: its own reference manual (what ``help("for")`` prints) and the licences, descriptions
and documentation that come with installed packages. Some two megabytes of it, with no download.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

DOCUMENT_SUFFIXES = (".txt", ".rst", ".md")
DOCUMENT_NAMES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|METADATA)\b")  # with or without a suffix
TEST_FOLDERS = {"test", "tests"}  # the text files in there are tables of numbers

TRAIN_SHARE = 0.9  # of every text; the rest is held out
BYTES = 256


class UnusableTextError(Exception):
    """There is no text, or none that can be learned from."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to train on, and text held out, which shares no paragraph with it."""

    name: str
    files: int
    file_bytes: int  # of those files, before repeated paragraphs were left out
    skipped: int  # files that are not UTF-8 text
    train: str
    validation: str

    def __str__(self) -> str:
        train, validation = (len(text.encode()) for text in (self.train, self.validation))
        skipped = f"; {self.skipped:,} files are not UTF-8 text" if self.skipped else ""
        return (
            f"{self.name}: {self.file_bytes:,} bytes in {self.files:,} files{skipped}; without repeated paragraphs, "
            f"{train:,} bytes to train on, {validation:,} to validate on"
        )


# Gathering.


def load(path: Path | None) -> Corpus:
    """The text of a file or of all files in a folder; of the installed packages if there is no path."""
    name, files = ("text of installed packages", installed_text()) if path is None else (str(path), text_at(path))
    contents = list(files)
    texts = [decoded for content in contents if (decoded := decode_text(content)) is not None]
    if not texts:
        raise UnusableTextError(f"{name}: expected UTF-8 text, found none in {len(contents):,} files.")

    train, validation = split(texts)
    if not validation:
        raise UnusableTextError(
            f"{name}: expected several paragraphs, with blank lines between them, so that the last of a text can be "
            f"held out; got {sum(map(len, texts)):,} characters without."
        )
    return Corpus(
        name=name,
        files=len(texts),
        file_bytes=sum(len(text.encode()) for text in texts),
        skipped=len(contents) - len(texts),
        train=train,
        validation=validation,
    )


def installed_text() -> Iterator[bytes]:
    """Python's reference manual, then the documents of each package, in an order that their names decide."""
    for _, topic in sorted(topics.items()):
        yield topic.encode()
    packages = {package.name: package for package in importlib.metadata.distributions() if package.name}
    for _, package in sorted(packages.items()):
        for file in sorted(package.files or []):
            if is_document(file) and (path := Path(str(file.locate()))).is_file():
                yield path.read_bytes()


def is_document(file: importlib.metadata.PackagePath) -> bool:
    if TEST_FOLDERS.intersection(file.parts):
        return False
    return file.suffix in DOCUMENT_SUFFIXES or DOCUMENT_NAMES.match(file.name) is not None


def text_at(path: Path) -> Iterator[bytes]:
    """The file, or every file below the folder; hidden ones aside."""
    if path.is_file():
        yield read(path)
        return
    if not path.is_dir():
        raise UnusableTextError(f"{path}: expected a file or a folder, found neither.")
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            yield read(file)


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise UnusableTextError(f"{file}: expected a file that can be read: {problem.strerror}.") from problem


def decode_text(content: bytes) -> str | None:
    """None if this is not UTF-8 text; the NUL that binary files hold is UTF-8, but no text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text.replace("\r\n", "\n")


# The split.


def split(texts: Sequence[str]) -> tuple[str, str]:
    """What to train on and what to validate on: the first nine tenths of every text, and its end.

    Every paragraph is kept once, however it is wrapped and indented: packages share their licences, and a licence held
    out in one place but seen in another would test memory.
    """
    seen: set[str] = set()
    train, validation = [], []
    for text in texts:
        new = []
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        # A paragraph is held out if it starts in the last tenth, so a text of one paragraph is trained on.
        lengths = np.array([len(paragraph) for paragraph in new])
        held_out = np.cumsum(lengths) - lengths >= TRAIN_SHARE * lengths.sum()
        cut = len(new) - int(held_out.sum())
        train.append("\n\n".join(new[:cut]))
        validation.append("\n\n".join(new[cut:]))
    return join(train), join(validation)


def join(texts: Sequence[str]) -> str:
    return "\n\n\n".join(text for text in texts if text)


# Tokens.


class Tokenizer(Protocol):
    """Turns text into numbers below ``vocab_size`` and back, without loss."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def byte_counts(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, ``[vocab_size]``."""

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> str:
        """Text again; bytes that make no character show as U+FFFD."""


class ByteTokenizer:
    """The bytes of UTF-8, as they are."""

    vocab_size = BYTES
    byte_counts = np.ones(BYTES, np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")


class BytePairTokenizer:
    """Byte-pair encoding over bytes (Sennrich et al. 2016, arXiv:1508.07909), learned from ``text``.

    Short texts may not have pairs enough for ``vocab_size`` tokens; then there are fewer.
    """

    def __init__(self, text: str, vocab_size: int) -> None:
        self._tokenizer = tokenizers.Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all bytes, so nothing is unknown
            show_progress=False,
        )
        self._tokenizer.train_from_iterator([text], trainer)
        self.vocab_size = self._tokenizer.get_vocab_size()
        # The library writes a token with one character for each of its bytes.
        numbers = self._tokenizer.get_vocab()
        self.byte_counts = np.array([len(token) for token in sorted(numbers, key=numbers.__getitem__)])

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist())


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The two parts of a corpus as tokens, int32 ``[tokens]``."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray

    def __str__(self) -> str:
        size = int(self.tokenizer.byte_counts[self.train].sum()) / len(self.train)
        return (
            f"{len(self.train):,} tokens to train on, {len(self.validation):,} to validate on, "
            f"out of {self.tokenizer.vocab_size:,}; {size:.2f} bytes in each"
        )

    @property
    def unigram_entropy(self) -> float:
        """The loss, in nats, of knowing how frequent each token is and nothing else."""
        counts = np.bincount(self.train)
        shares = counts[counts > 0] / len(self.train)
        return float(-np.sum(shares * np.log(shares)))


def tokenize(corpus: Corpus, vocab_size: int | None) -> Dataset:
    """Tokens of a vocabulary learned from the training part; with None, plain bytes."""
    tokenizer = ByteTokenizer() if vocab_size is None else BytePairTokenizer(corpus.train, vocab_size)
    return Dataset(tokenizer, tokenizer.encode(corpus.train), tokenizer.encode(corpus.validation))
