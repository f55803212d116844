"""Text, held-out files, tokenizer and batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import files, tokenfile
from .config import TrainConfig
from .program import printable
from .schema import UserError

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 0.05
MOST_TEXT = 1 << 30  # bytes read into memory; its tokens take several times as much
NO_TARGET = -100  # what cross_entropy leaves out
COUNTED = 1 << 24  # tokens counted at a time: the count copies them to int64
# Tests, generated tables and installed packages differ from machine to machine or teach little.
_STDLIB_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


@dataclasses.dataclass
class Corpus:
    """The text, split into training and held-out documents."""

    source: str  # for the screen
    train: list[str]
    validation: list[str]
    validation_names: list[str]
    digest: str  # of names and contents, to notice text that changed before a resume


@dataclasses.dataclass
class Tokens:
    """A tokenised corpus, in memory or memory-mapped."""

    source: str
    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    validation: np.ndarray
    validation_names: list[str]
    digest: str


def load_corpus(data: str) -> Corpus:
    """Reads a file, a folder, or (data empty) the sources of Python's standard library."""
    if not data:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = _read_folder(root, suffix=".py", skipped=_STDLIB_SKIPPED)
        return split_by_file(documents, "Python's standard library")
    path = Path(data)
    if os.path.isdir(path):
        return split_by_file(_read_folder(path), data)
    if not os.path.lexists(path):
        raise UserError(f"--data {data}: no such file or folder")
    try:
        text = _text(files.read_bytes(path, MOST_TEXT))
    except (OSError, ValueError) as error:
        raise UserError(f"--data {data}: {_NO_TEXT}: {files.reason(error)}") from error
    return _split_by_position(text, path.name, data)


_NO_TEXT = "expected a file of UTF-8 text, a folder of such, or a .bin of trainer.prepare"


def _text(content: bytes) -> str:
    text = content.decode("utf-8")
    if "\0" in text:
        raise ValueError("a NUL character is no text")
    return text


def _read_folder(root: Path, suffix: str = "", skipped: set[str] = frozenset()) -> dict[str, str]:
    """Every readable text below root by its relative name; hidden files and folders are left, as is
    what is no file: pipes, devices, broken links."""
    documents: dict[str, str] = {}
    taken = 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in skipped and not s.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or not name.endswith(suffix):
                continue
            path = Path(folder) / name
            try:
                text = _text(files.read_bytes(path, MOST_TEXT))
            except (OSError, ValueError):
                continue
            taken += len(text)
            if taken > MOST_TEXT:
                raise UserError(
                    f"--data {root}: more than {MOST_TEXT >> 30} GiB of text: "
                    f"trainer.prepare turns it into a file of tokens"
                )
            if text and not text.isspace():
                documents[path.relative_to(root).as_posix()] = text
    return documents


def _bytes(name: str) -> bytes:
    """Of a file's name, which may be no UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def hash_of_name(name: str) -> float:
    """In [0, 1); the same on every machine, so a file never changes sides."""
    return int.from_bytes(hashlib.sha256(_bytes(name)).digest()[:8], "big") / 2**64


def split_by_file(documents: dict[str, str], source: str) -> Corpus:
    if not documents:
        raise UserError(f"--data {source}: the text is empty")
    if len(documents) == 1:
        ((name, text),) = documents.items()
        return _split_by_position(text, name, source)
    held_out = held_out_names(documents)
    training = sorted(documents.keys() - set(held_out))
    return Corpus(
        source,
        [documents[n] for n in training],
        [documents[n] for n in held_out],
        [printable(n) for n in held_out],
        _digest(documents),
    )


def held_out_names(documents: dict[str, str]) -> list[str]:
    """At least one file on either side."""
    names = sorted(documents, key=lambda name: (hash_of_name(name), name))
    held_out = [name for name in names if hash_of_name(name) < VALIDATION_SHARE]
    return held_out[: len(names) - 1] or names[:1]


def _split_by_position(text: str, name: str, source: str) -> Corpus:
    """One file has no files to hold out: its end is held out, from the next line on."""
    if not text.strip():
        raise UserError(f"--data {source}: the text is empty")
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    cut = text.find("\n", cut) + 1 or cut
    if not text[cut:].strip():
        cut = int(len(text) * (1 - VALIDATION_SHARE))
    place = f"{printable(name)} from character {cut}"
    return Corpus(source, [text[:cut]], [text[cut:]], [place], _digest({name: text}))


def _digest(documents: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(documents):
        for part in (_bytes(name), documents[name].encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it can write any text, and never meets an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return with_end_of_text(tokenizer)


def with_end_of_text(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one int64 sequence, each closed by the end-of-text token."""
    end = [tokenizer.eos_token_id]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    pieces = [np.asarray(encoding.ids + end, dtype=np.int64) for encoding in encodings]
    return np.concatenate(pieces)


def tokenized(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    return Tokens(
        corpus.source,
        tokenizer,
        encode(tokenizer, corpus.train),
        encode(tokenizer, corpus.validation),
        corpus.validation_names,
        corpus.digest,
    )


def load_tokens(path: str) -> Tokens:
    """What `python -m trainer.prepare` wrote: the file is memory-mapped."""
    file = tokenfile.read(Path(path))
    header = file.header
    try:
        tokenizer = with_end_of_text(Tokenizer.from_str(json.dumps(header.tokenizer)))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"--data {path}: the tokenizer in its header: {error}") from error
    if len(tokenizer) != header.vocab_size:
        raise UserError(
            f"--data {path}: its tokenizer has {len(tokenizer)} tokens, "
            f"its header says {header.vocab_size}"
        )
    source = f"{header.source} ({path})"
    return Tokens(
        source, tokenizer, file.train, file.validation, header.validation_names, header.digest()
    )


class Batches:
    """Shuffled windows of the training tokens; a batch is a function of (seed, step, part) alone,
    and process `rank` of `size` has its slice of it.

    So the position in the data is the step, and a resumed run needs nothing else to go on, whatever
    the number of processes.
    """

    def __init__(
        self, tokens: np.ndarray, config: TrainConfig, rank: int = 0, size: int = 1
    ) -> None:
        self.tokens, self.seed = tokens, config.seed
        self.seq_len, self.batch_size = config.seq_len, config.batch_size
        self.own = config.batch_size // size
        self.first = rank * self.own
        self.per_step = config.accumulate * config.batch_size
        self.windows = max(0, (len(tokens) - 1) // self.seq_len)
        self.per_epoch = self.windows // self.per_step
        if not self.per_epoch:
            raise UserError(
                f"the text is shorter than a batch: {len(tokens)} training tokens, "
                f"the batches of a step take {config.tokens_per_step + 1}"
            )
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both [batch_size / size, seq_len], of step 0, 1, ... and of one of
        its parts, that are `accumulate`. Together they are the batch of `accumulate` times the
        size."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        first = position * self.per_step + part * self.batch_size + self.first
        starts = self._order[first:][: self.own] * self.seq_len
        return windows_at(self.tokens, starts, self.seq_len)


def slice_of(batch: tuple, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one process of `size`, as many for each: where a batch is no multiple,
    its last sequence comes again, without targets."""
    tokens, targets = batch
    if size == 1:
        return tokens, targets
    missing = -len(tokens) % size
    tokens = torch.cat([tokens, tokens[-1:].expand(missing, -1)])
    targets = torch.cat([targets, torch.full_like(targets[-1:], NO_TARGET).expand(missing, -1)])
    return tokens.chunk(size)[rank], targets.chunk(size)[rank]


def windows_at(tokens: np.ndarray, starts: torch.Tensor, seq_len: int):
    """Inputs and targets, int64; `tokens` may be a memory-mapped file of any unsigned type."""
    index = starts[:, None] + torch.arange(seq_len + 1)
    window = torch.from_numpy(tokens[index.numpy()].astype(np.int64))
    return window[:, :-1], window[:, 1:]


def validation_batches(tokens: np.ndarray, config: TrainConfig) -> list:
    """Windows spread evenly over the validation tokens, about eval_tokens in all, in batches."""
    seq_len = min(config.seq_len, len(tokens) - 1)
    if seq_len < 1:
        raise UserError("the held-out text is shorter than two tokens")
    windows = (len(tokens) - 1) // seq_len
    wanted = min(windows, max(1, config.eval_tokens // seq_len))
    starts = torch.arange(wanted) * windows // wanted * seq_len
    return [windows_at(tokens, part, seq_len) for part in starts.split(config.batch_size)]


def unigram_cross_entropy(train: np.ndarray, batches: list, vocab_size: int) -> float:
    """Nats per validation token of a model that knows only how often a training token occurs."""
    parts = (train[i : i + COUNTED] for i in range(0, len(train), COUNTED))
    counts = torch.from_numpy(sum(np.bincount(part, minlength=vocab_size) for part in parts) + 1.0)
    log_probability = (counts / counts.sum()).log()
    targets = torch.cat([target.flatten() for _, target in batches])
    return -log_probability[targets].mean().item()
