"""The prepared corpus: the tokenizer, the token ids in data/*.bin, and the batches that train.py reads from them."""

import hashlib
import itertools
import json
import math
import re
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from config import IGNORE_INDEX, CorpusConfig, UserError, atomic_write, flag, quoted

SPACE_MARK = "\u2581"  # SentencePiece's spelling of a space; where a text contains it, it is spelled in bytes
MAX_CHARS = 1 << 14  # longest text that SentencePiece gets at once: at most 65,536 bytes
# A barely trained model may write bytes that control a terminal; newline and tab are harmless.
CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


# -----------------------------------------------------------------------------
# Tokenizer

def chunks(text, limit=MAX_CHARS):
    """Cut `text` into pieces of at most `limit` characters, before a space where there is one: no token spans it."""
    start = 0
    while len(text) - start > limit:
        cut = text.rfind(" ", start + 1, start + limit)
        cut = cut if cut > 0 else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


class Tokenizer:
    """A SentencePiece model trained by preprocess.py. A story is the ids of its text between bos and eos."""

    bos_id, eos_id = 1, 2

    def __init__(self, model_bytes, path="the tokenizer"):
        """`path` names the model in the UserError for bytes that are not one."""
        self.model_bytes = bytes(model_bytes)
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        try:
            self.processor = p = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"nothing")
            # A vocabulary of ours spells unknown characters in bytes.
            ours = (p.unk_id(), p.bos_id(), p.eos_id()) == (0, 1, 2) and p.is_byte(p.piece_to_id("<0x0A>"))
        except (RuntimeError, UnicodeDecodeError):  # the latter when the error message itself quotes damaged bytes
            ours = False
        if not ours:
            raise UserError(f"{path} is not a vocabulary trained by preprocess.py: pass the tok*.model of a prepared "
                            "corpus, or prepare the corpus again.")
        self.vocab_size = p.vocab_size()
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, i):
        """The UTF-8 bytes that token i stands for, b"" for control tokens."""
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        piece = self.processor.id_to_piece(i)
        return bytes.fromhex(piece[3:5]) if self.processor.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()

    def byte_lengths(self):
        """Bytes of text that each token stands for, (V,)."""
        return np.array([len(token) for token in self.token_bytes])

    def encode(self, text):
        """Ids of `text` alone. UserError for text that UTF-8 cannot hold (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text contains {text[error.start]!r} at character {error.start}, half of a surrogate "
                            "pair, which is no character: remove it.") from None
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, threads=1):
        """A list of ids for each of `texts`."""
        mark = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        pieces = [[piece for chunk in chunks(text) for piece in re.split(f"({SPACE_MARK})", chunk)] for text in texts]
        encoded = iter(self.processor.encode(list(itertools.chain.from_iterable(pieces)), num_threads=threads))
        return [[i for piece, ids in zip(row, encoded) for i in (mark if piece == SPACE_MARK else ids)]
                for row in pieces]

    def decode(self, ids):
        """The text of `ids`, without control tokens."""
        return b"".join(self.token_bytes[int(i)] for i in ids).decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# Token ids on disk

class TokenStream:
    """The shards of a split as one ring of token ids: the first token follows the last."""

    def __init__(self, shards, bos_id):
        """`shards`: arrays of uint16, usually memory maps."""
        self.shards, self.bos_id = [np.asarray(shard) for shard in shards], bos_id  # slicing a np.memmap is slow
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.offsets = self.ends - [len(shard) for shard in shards]

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, count):
        """`count` tokens from position `start` on, uint16."""
        pieces = []
        while count > 0:
            start %= len(self)
            k = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - int(self.offsets[k])
            pieces.append(self.shards[k][offset:offset + count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def windows(self, starts, length):
        """`length` tokens from each of the positions `starts` (n,): (n, length), int64."""
        starts = starts % len(self)
        rows, shard_of = np.empty((len(starts), length), np.int64), np.searchsorted(self.ends, starts, side="right")
        for row, start, k, offset in zip(rows, starts, shard_of.tolist(), (starts - self.offsets[shard_of]).tolist()):
            window = self.shards[k][offset:offset + length]
            row[:] = window if len(window) == length else self.read(int(start), length)
        return rows

    @cached_property
    def story_starts(self):
        """Positions of the stories' first tokens (bos), ascending."""
        return np.concatenate([np.flatnonzero(shard == self.bos_id) + offset
                               for shard, offset in zip(self.shards, self.offsets, strict=True)])

    def story(self, i):
        """Ids of story number i, with its bos and eos."""
        start, end = self.story_starts[i], self.story_starts[i + 1] if i + 1 < len(self.story_starts) else len(self)
        return self.read(int(start), int(end - start))

    def story_windows(self, end, block_size):
        """(starts, numbers of targets) of windows over the stories before position `end`, each from its first token."""
        starts = self.story_starts[self.story_starts < end]
        targets = np.diff(starts, append=end) - 1  # the tokens after bos
        windows_per_story = -(-targets // block_size)  # none where `end` leaves only bos: the mean loss would be nan
        index = np.arange(windows_per_story.sum())  # of each window within its story
        index -= np.repeat(np.cumsum(windows_per_story) - windows_per_story, windows_per_story)
        return (np.repeat(starts, windows_per_story) + index * block_size,
                np.minimum(block_size, np.repeat(targets, windows_per_story) - index * block_size))


class Corpus:
    """A prepared corpus: meta.json, the tokenizer, and both splits as memory maps.

    Sizes, hashes and the range of the ids are checked here, once: a second for a gigabyte of shards.
    """

    def __init__(self, data_dir):
        folder = Path(data_dir)
        self.meta = read_json(folder / "meta.json")
        if self.meta is None:
            interrupted = read_json(folder / "partial" / "arguments.json")
            state = "is not finished" if interrupted else "does not exist, or its meta.json is missing or damaged"
            raise UserError(f"the corpus in {folder} {state}. Pass another --data-dir, or run: "
                            f"{prepare_command(folder, interrupted)}")
        arguments = None
        try:
            arguments = self.meta["arguments"]
            path = folder / self.meta["tokenizer"]["file"]
            self.tokenizer = Tokenizer(path.read_bytes(), path)
            if self.tokenizer.sha256 != self.meta["tokenizer"]["sha256"]:
                raise ValueError(f"{path} is not the tokenizer of these shards")
            self.train, self.val = (TokenStream([self._open_shard(folder, shard) for shard in self.meta[split]],
                                                self.tokenizer.bos_id) for split in ("train", "val"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, UserError) as error:
            raise UserError(f"the corpus in {folder} is damaged ({error}): run {prepare_command(folder, arguments)} "
                            "--overwrite") from error
        hashes = [self.tokenizer.sha256, *(shard["sha256"] for shard in self.meta["train"])]
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _open_shard(self, folder, shard):
        ids = np.memmap(folder / shard["file"], dtype="<u2", mode="r")
        if hashlib.sha256(ids).hexdigest() != shard["sha256"]:
            raise ValueError(f"{shard['file']} has changed since it was written")
        if ids.max() >= self.tokenizer.vocab_size:
            raise ValueError(f"{shard['file']} contains token {ids.max()}, the vocabulary ends at "
                             f"{self.tokenizer.vocab_size - 1}")
        return ids


# -----------------------------------------------------------------------------
# Word prompts: a line in front of a story that names three words of it

WORDS = re.compile(r"[^\W\d_]+")


def word_prompt(words):
    return f"Words: {', '.join(words)}.\n\n"


def inflections(word):
    """`word`, and with the regular endings of English plurals, verbs and adjectives."""
    if re.search("[^aeiou]y$", word):
        return {word, word + "ing"} | {word[:-1] + ending for ending in ("ies", "ied", "ier", "iest")}
    plural = word + ("es" if re.search("([sxz]|[cs]h)$", word) else "s")
    stem = word + word[-1] if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", word) else word.removesuffix("e")
    return {word, plural} | {stem + ending for ending in ("ed", "ing", "er", "est")}


def words_used(words, text):
    """Those of `words` that `text` contains, or a plain inflection of them."""
    in_text = set(WORDS.findall(text.lower()))
    return [word for word in words if inflections(word) & in_text]


def read_json(path):
    """The object in a JSON file, None if there is none that can be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_json(path, value):
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def prepare_command(data_dir, arguments=None):
    """The command that prepares `data_dir` with the settings in `arguments`, as one would type it."""
    values = (arguments or {}) | dict(data_dir=str(data_dir))
    typed = [f"{flag(f.name)} {quoted(values[f.name])}" for f in fields(CorpusConfig)
             if values.get(f.name, f.default) != f.default]
    return " ".join(["python preprocess.py prepare-dataset", *typed])


# -----------------------------------------------------------------------------
# Batches

def to_device(rows, device):
    """A tensor on the device; to CUDA it is copied from pinned memory while the GPU computes."""
    tensor = torch.from_numpy(rows)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True)
    pinned.numpy()[:] = rows  # tensor.pin_memory() wakes all cores for the copy, which takes a millisecond
    return pinned.to(device, non_blocking=True)


class TrainLoader:
    """Training windows of block_size + 1 tokens. Window number i depends on the seed and on i alone.

    Each epoch starts at a random offset and wraps around; fewer than block_size tokens are left out of it. With
    align_stories a window starts at a story, or where the window before it in a long story ended, and may run into the
    next story.
    """

    def __init__(self, stream, block_size, seed, align_stories):
        if len(stream) <= block_size:
            raise UserError(f"the corpus has {len(stream):,} training tokens, fewer than one window of "
                            f"{block_size + 1}: prepare more text, or use a shorter --block-size.")
        self.stream, self.block_size, self.seed, self.epoch = stream, block_size, seed, None
        self.story_starts = stream.story_windows(len(stream), block_size)[0] if align_stories else None
        self.windows_per_epoch = len(self.story_starts) if align_stories else len(stream) // block_size

    def window_start(self, window_index):
        """Position of the window's first token."""
        epoch, offset = divmod(window_index, self.windows_per_epoch)
        if epoch != self.epoch:
            rng, starts = np.random.default_rng([self.seed, epoch]), self.story_starts
            if starts is None:
                starts = rng.integers(len(self.stream)) + np.arange(self.windows_per_epoch) * self.block_size
            self.epoch, self.starts = epoch, rng.permutation(starts)
        return self.starts[offset]

    def batches(self, step, batch_size, device, rank=0, world_size=1):
        """Yield (x, y), each (batch_size, block_size), from micro-batch number `step` on; each rank takes its own."""
        while True:
            first = (step * world_size + rank) * batch_size
            starts = np.array([self.window_start(i) for i in range(first, first + batch_size)])
            rows = to_device(self.stream.windows(starts, self.block_size + 1), device)
            yield rows[:, :-1], rows[:, 1:]
            step += 1


class Validation:
    """The first `tokens` tokens of the validation split (0: all), cut inside a story, and what is known of their text.

    The built-in corpus is cut at the end of a story instead, so that its floor is exact.
    """

    def __init__(self, corpus, block_size, tokens, align_stories):
        self.stream, self.block_size, self.floor = corpus.val, block_size, None
        end = max(2, min(tokens or len(self.stream), len(self.stream)))
        nats = corpus.meta.get("val_nats")  # surprisal of each story of the built-in corpus
        if nats:
            story_ends = np.append(self.stream.story_starts[1:], len(self.stream))
            count = max(1, int(np.searchsorted(story_ends, end, side="right")))
            end = int(story_ends[count - 1])
        if align_stories:
            self.starts, self.targets = self.stream.story_windows(end, block_size)
        else:
            self.starts = np.arange(0, end - 1, block_size)
            self.targets = np.minimum(block_size, end - 1 - self.starts)
        self.num_targets = int(self.targets.sum())
        self.text_bytes = int(corpus.tokenizer.byte_lengths()[self.stream.read(0, end)].sum())
        if nats:
            self.floor = math.fsum(nats[:count]) / self.num_targets

    def batches(self, batch_size, device):
        """Yield (x, y), each (up to batch_size, block_size); y is IGNORE_INDEX where nothing is predicted."""
        for i in range(0, len(self.starts), batch_size):
            starts, targets = self.starts[i:i + batch_size], self.targets[i:i + batch_size]
            rows = self.stream.windows(starts, self.block_size + 1)
            predicted = np.arange(self.block_size) < targets[:, None]
            yield to_device(rows[:, :-1], device), to_device(np.where(predicted, rows[:, 1:], IGNORE_INDEX), device)
