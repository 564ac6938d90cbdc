"""Text, tokenizer and the shard format: from stories to uint16 token ids on disk, and back."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries are imported: no traceback

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from array import array
from bisect import bisect
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Callable

import click
import numpy as np
import sentencepiece
from tqdm import tqdm

from config import (COMMAND_LINE, CorpusConfig, GroupedCommand, UserError, first_line, pick, replace_file, replacing,
                    setting_options, sole_owner)

FORMAT = 1                          # version of the files in the data folder
PARTS = 50                          # a corpus is cut into this many equal parts ("files")
SEPARATOR = "<|endoftext|>"         # between the stories of a text file, as in TinyStoriesV2-GPT4-train.txt
MAX_HELD_OUT = 5000                 # validation stories taken from a corpus that has no validation split
BATCH_CHARS = 1 << 18               # text handled at a time
CHUNK_CHARS = 1 << 14               # longest text that SentencePiece sees at once: at most 65536 bytes
VOCABULARY_BYTES = 64 * 10**6       # text that the vocabulary is trained on; SentencePiece takes six times this memory
KINDS_OF_FILE = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
OURS = re.compile(r"(train|val)_\d{3}\.bin|tok\d+\.model")


# ---------------------------------------------------------------- Files


def write_json(path, value):
    """Write `value` to `path` so that a reader finds the old file or the new one, never a part."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def read_json(path):
    """The object in a JSON file, None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


# The form of the files that this program writes, for has_form.
SHARD = dict(file=str, tokens=int, bytes=int, stories=int, sha256=str, min_id=int, max_id=int)
META = dict(format=int, source=str, vocab_size=int, tokenizer=dict(file=str, sha256=str), arguments=dict, train=[SHARD],
            val=[SHARD], sha256=str)
FLOOR = dict(nats_per_token=float, bits_per_byte=float)
PLAN = dict(arguments=dict, files=dict, sha256=str)
FILES = {".bin": SHARD, ".model": dict(sha256=str), ".parquet": dict(stories=int, bytes=int)}


def has_form(value, form):
    """Whether a value from a JSON file has the types of `form`: a type, a dict of forms, or a list of one form."""
    if isinstance(form, dict):
        return isinstance(value, dict) and value.keys() == form.keys() and all(
            has_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and bool(value) and all(has_form(item, form[0]) for item in value)
    return type(value) is form and (form is not int or value >= 0)


class Plan:
    """What is known of a folder that is filled file by file: the arguments, and an entry for each finished file.

    Such a folder ends in .partial and has a plan.json. When all its files are finished, they move to where they belong.
    So an interrupted run goes on where it stopped, and what was there before stays usable until the exchange.
    """

    def __init__(self, folder, arguments, files=()):
        self.folder, self.arguments, self.files = folder, arguments, dict(files)

    @classmethod
    def read(cls, folder, name="plan.json"):
        """The plan in a folder, None where there is none that can be read."""
        said = read_json(folder / name)
        whole = has_form(said, PLAN) and said["sha256"] == digest(said) and all(
            has_form(entry, FILES.get(Path(file).suffix)) for file, entry in said["files"].items())
        return cls(folder, said["arguments"], said["files"]) if whole else None

    def write(self, name="plan.json"):
        said = dict(arguments=self.arguments, files=self.files)
        write_json(self.folder / name, said | dict(sha256=digest(said)))

    def add(self, file, entry):
        self.files[file] = entry
        self.write()


def digest(said):
    """The SHA-256 of what a JSON file of ours says, so that a name or number in it that changed is noticed."""
    said = {key: value for key, value in said.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def prepare_command(data_dir, arguments=None, *flags):
    """The command that prepares `data_dir` with `arguments`, as one would type it."""
    words, defaults = ["python preprocess.py prepare-dataset"], asdict(CorpusConfig())
    for name, value in {**(arguments or {}), "data_dir": str(data_dir)}.items():
        if name in defaults and value != defaults[name]:
            text = str(value)
            words.append(f"--{name.replace('_', '-')} " + (f'"{text}"' if " " in text else text))
    return "`" + " ".join([*words, *flags]) + "`"


# ---------------------------------------------------------------- Tokenizer


def chunks(text, limit=CHUNK_CHARS):
    """Cut `text` into pieces of at most `limit` characters, before a space where there is one: no token spans it."""
    start = 0
    while len(text) - start > limit:
        cut = text.rfind(" ", start + 1, start + limit)
        cut = cut if cut > 0 else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


class Tokenizer:
    """A SentencePiece model whose ids for unknown, beginning and end of a story are real pieces."""

    def __init__(self, model_bytes, where="the tokenizer"):
        """`where` names the model in the UserError for bytes that are not one."""
        self.model_bytes = bytes(model_bytes)
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocab_size = self.processor.vocab_size()
        except (RuntimeError, OSError, UnicodeDecodeError):  # the last where its own message quotes the damage
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(f"{where} is not a SentencePiece model: prepare the corpus again with --overwrite.")
        self.unk_id, self.bos_id, self.eos_id = (
            self.processor.unk_id(), self.processor.bos_id(), self.processor.eos_id())
        if min(self.unk_id, self.bos_id, self.eos_id) < 0:
            raise UserError(f"{where} lacks an id for the unknown token or for a story's beginning or end "
                            f"({self.unk_id}, {self.bos_id}, {self.eos_id}): prepare the corpus again with "
                            "--overwrite.")

    @classmethod
    def from_file(cls, path):
        try:
            return cls(Path(path).read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: prepare the corpus again with --overwrite.") from None

    def encode(self, text):
        """Ids of `text` alone. UserError for text that UTF-8 cannot hold (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds {text[error.start]!r} at character {error.start}, half of a "
                            "surrogate pair, which is no character: remove it.") from None
        if len(text) <= CHUNK_CHARS:
            return self.processor.encode(text)
        return list(itertools.chain.from_iterable(map(self.processor.encode, chunks(text))))

    def encode_document(self, text):
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_documents(self, texts):
        """encode_document of each text, one after the other: uint16 of shape (tokens,). Made for threads."""
        if all(len(text) <= CHUNK_CHARS for text in texts):
            # One call: each return to Python waits for the interpreter's lock.
            ids = self.processor.encode(list(texts), add_bos=True, add_eos=True, num_threads=1)
        else:
            ids = map(self.encode_document, texts)
        return np.fromiter(itertools.chain.from_iterable(ids), dtype="<u2")

    def encode_prompt(self, text):
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids):
        """The text of `ids`, control tokens left out."""
        return self.processor.decode([int(i) for i in ids])

    @cached_property
    def byte_values(self):
        """For each id the byte that it stands for, -1 for ids that are not byte pieces. Shape (V,)."""
        is_byte, piece = self.processor.is_byte, self.processor.id_to_piece
        return np.array([int(piece(i)[3:5], 16) if is_byte(i) else -1 for i in range(self.vocab_size)])

    def byte_lengths(self):
        """Bytes of text that each id stands for, int64 of shape (V,); 0 for control tokens."""
        def length(i):
            if self.processor.is_control(i) or self.processor.is_unknown(i):
                return 0
            # U+2581 is SentencePiece's mark for a space.
            return len(self.processor.id_to_piece(i).replace("\u2581", " ").encode())
        return np.where(self.byte_values >= 0, 1, [length(i) for i in range(self.vocab_size)])

    def stream(self, ids):
        """Yield the text of `ids` as they arrive; the pieces joined are decode(all ids).

        A character spelled in bytes is held back until it is whole. Decoding piece by piece is exact because the
        model adds no space of its own at the start of a text.
        """
        pending = []
        for i in ids:
            pending.append(int(i))
            ready = len(pending) - self.unfinished(pending)
            text = self.decode(pending[:ready])
            pending = pending[ready:]
            if text:
                yield text
        if pending:
            yield self.decode(pending)

    def unfinished(self, ids):
        """How many of the last ids (0 to 3) spell the beginning of a UTF-8 character that is not whole yet."""
        for count, i in enumerate(ids[:-4:-1], start=1):
            byte = self.byte_values[i]
            if byte >= 0xC0:
                length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                return count if count < length else 0
            if byte < 0x80:
                return 0
        return 0


# ---------------------------------------------------------------- Reading a prepared corpus


class TokenStream:
    """The shards of a split as one row of token ids."""

    def __init__(self, shards, bos_id):
        """`shards`: arrays of uint16, usually memory maps."""
        self.shards = [np.asarray(shard) for shard in shards]
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        self.bos_id = bos_id
        self.starts = None

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, stop):
        """Tokens start..stop-1, uint16 of shape (stop - start,), across the borders of shards."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        out, at = np.empty(stop - start, np.uint16), start
        while at < stop:
            k = int(np.searchsorted(self.ends, at, side="right"))
            end = min(stop, int(self.ends[k]))
            offset = int(self.ends[k]) - len(self.shards[k])
            out[at - start:end - start] = self.shards[k][at - offset:end - offset]
            at = end
        return out

    def windows(self, starts, length):
        """The tokens from each of the `starts` (n,) on: uint16 of shape (n, length)."""
        starts = np.asarray(starts, dtype=np.int64)
        out = np.empty((len(starts), length), np.uint16)
        which = np.searchsorted(self.ends, starts, side="right")
        for row, (start, k) in enumerate(zip(starts.tolist(), which.tolist(), strict=True)):
            if k < len(self.shards) and start >= 0 and start + length <= self.ends[k]:
                at = start - int(self.ends[k]) + len(self.shards[k])
                out[row] = self.shards[k][at:at + length]
            else:
                out[row] = self.read(start, start + length)
        return out

    def story_starts(self):
        """Where each story's first token (bos) lies, int64 of shape (stories,), ascending. Found at the first call."""
        if self.starts is None:
            offsets = self.ends - [len(shard) for shard in self.shards]
            self.starts = np.concatenate([np.flatnonzero(shard == self.bos_id) + offset
                                          for shard, offset in zip(self.shards, offsets, strict=True)])
        return self.starts


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: what meta.json says, the tokenizer, and the two splits."""

    meta: dict
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream


def open_corpus(data_dir):
    """The prepared corpus in `data_dir`; UserError if a file is missing or does not fit the others.

    Sizes, hashes and the range of the ids are checked here, once: a second for a gigabyte of shards.
    """
    folder = Path(data_dir)
    meta = read_meta(folder)
    again = prepare_command(folder, meta["arguments"], "--overwrite")
    path = folder / meta["tokenizer"]["file"]
    tokenizer = Tokenizer.from_file(path)
    if tokenizer.sha256 != meta["tokenizer"]["sha256"]:
        raise UserError(f"{path} is not the tokenizer that the shards were made with (its SHA-256 differs from "
                        f"meta.json's): run {again}.")
    streams = {split: TokenStream([open_shard(folder, shard, tokenizer.vocab_size, again)
                                   for shard in meta[split]], tokenizer.bos_id)
               for split in ("train", "val")}
    return Corpus(meta, tokenizer, **streams)


def read_meta(folder):
    """The contents of meta.json; UserError if it is missing or of another version."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: run {prepare_command(folder)} first, or pass --data-dir.")
    meta = read_json(folder / "meta.json")
    if meta is None and not (folder / "meta.json").exists():
        plan = Plan.read(folder / "tokens.partial") or Plan.read(folder / "text.partial")
        if plan or (folder / "text" / "text.json").exists():
            raise UserError(f"the corpus in {folder} is not finished: run "
                            f"{prepare_command(folder, plan and plan.arguments)} to go on.")
        raise UserError(f"there is no prepared corpus in {folder} (no meta.json): run {prepare_command(folder)} first, "
                        "or pass --data-dir.")
    whole = has_form(meta, META) or has_form(meta, META | dict(floor=FLOOR))
    if not whole or meta["format"] != FORMAT or meta["sha256"] != digest(meta) or not all(
            OURS.fullmatch(entry["file"]) and entry.get("stories") != 0
            for entry in [meta["tokenizer"], *meta["train"], *meta["val"]]):
        raise UserError(f"{folder / 'meta.json'} is damaged or not of format {FORMAT}, the one that this version "
                        f"reads: run {prepare_command(folder, None, '--overwrite')}.")
    return meta


def open_shard(folder, shard, vocab_size, again):
    """The ids of a shard as a memory map, checked against meta.json and the vocabulary."""
    path = folder / shard["file"]
    size = path.stat().st_size if path.exists() else None
    if size != 2 * shard["tokens"]:
        found = "is missing" if size is None else f"has {size} bytes instead of {2 * shard['tokens']}"
        raise UserError(f"{path} {found}: run {again}.")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise UserError(f"{path}: token {ids[at]} at position {at} is outside 0..{vocab_size - 1}: run {again}.")
    if hashlib.sha256(ids).hexdigest() != shard["sha256"]:
        raise UserError(f"{path} has changed since it was written (its SHA-256 differs from meta.json's): run {again}.")
    return ids


# ---------------------------------------------------------------- The built-in corpus: a grammar of stories

# Every choice is always made, depends on at most one earlier choice, and can be read off the text. So a story has
# exactly one derivation, its probability is a product, and the entropy of all stories is a sum.

TRAIN_STORIES, VAL_STORIES = 30_000, 1_000

KINDS = {
    "rolls": "ball 9 | bead 5 | top 4",
    "flies": "kite 9 | hat 6 | cap 3",
    "floats": "boat 8 | duck 5 | cup 3",
    "sinks": "key 6 | bell 5 | ring 4",
}
MISHAPS = {
    "rolls": "fell in a hole 5 | rolled down a hill 4 | got stuck in the mud 3 | rolled under a log 2",
    "flies": "flew up a tree 5 | flew over the lake 3 | got stuck in the mud 2",
    "floats": "went out on the lake 5 | got stuck in the mud 3 | fell in a hole 2",
    "sinks": "fell in the grass 5 | fell in a hole 4 | got stuck in the mud 2",
}
# What helps depends on where the thing went: on the last word of the mishap.
FIXES = {
    "hole": "dug and dug 4 | used a stick 3 | went in 2",
    "hill": "ran fast 4 | ran down 3 | slid down 1",
    "log": "dug and dug 4 | used a stick 3 | went in 2",
    "tree": "went up 5 | used a stick 3 | asked a bee 2",
    "lake": "swam out 5 | made a net 3 | asked a fish 2",
    "mud": "dug and dug 4 | used a stick 3 | used a net 2",
    "grass": "looked all day 4 | saw it shine 3 | asked a bee 2",
}


def weighted(line):
    """The probabilities in a line of values and weights: 'red 3 | blue 1' is {'red': 0.75, 'blue': 0.25}."""
    pairs = [entry.strip().rsplit(" ", 1) for entry in line.split("|")]
    total = sum(int(weight) for _, weight in pairs)
    return {value: int(weight) / total for value, weight in pairs}


def always(line):
    """A choice that depends on nothing."""
    return None, {None: weighted(line)}


def given(parent, lines):
    """A choice whose probabilities depend on the value of `parent`."""
    return parent, {value: weighted(line) for value, line in lines.items()}


STORY = """{opening} {toy} {outing} {meeting}

{trouble} {sorrow} {comfort} {rescue}

{thanks} {treat} {ending}"""

GRAMMAR = {
    "opening": always("Once upon a time, there was {a trait} {child} named {hero}. 5 |"
                      "Once there was {a trait} {child} named {hero}. 4 | There was {a trait} {child} named {hero}. 3"),
    "trait": always("little 6 | kind 5 | happy 4 | good 3 | shy 3 | brave 2 | funny 1 | silly 1"),
    "child": always("girl 1 | boy 1"),
    "hero": given("child", {"girl": "Lily 7 | Mia 6 | Sue 5 | Ann 5 | Kim 4 | Eve 3 | Nan 2 | Ava 1",
                            "boy": "Tim 7 | Ben 6 | Tom 5 | Sam 5 | Dan 4 | Bob 3 | Ted 2 | Leo 1"}),
    "toy": always("{He} had {a colour} {thing}. 5 | {He} loved {his} {colour} {thing}. 4 |"
                  "{He} found {a colour} {thing}. 3"),
    "colour": always("red 7 | blue 7 | green 5 | pink 5 | white 4 | black 3 | gray 3 | gold 2 | brown 2 | tan 1"),
    "thing": always(" | ".join(KINDS.values())),
    "outing": always("One {weather} {time}, {he} took it to the {place}. 5 |"
                     "One {weather} {time}, {he} went to the {place}. 4"),
    "weather": always("sunny 8 | warm 6 | windy 5 | cold 4 | hot 3 | rainy 2 | foggy 1"),
    "time": always("day 5 | morning 4 | night 3"),
    "place": always("park 7 | farm 6 | beach 5 | forest 5 | river 4 | shop 3 | zoo 3 | hill 3 | town 2 | garden 1"),
    "meeting": always("There {he} met {a animal} named {friend}. 5 | There {he} saw {a animal} named {friend}. 4"),
    "animal": always("cat 8 | dog 8 | bird 6 | fox 5 | pig 4 | hen 3 | bear 3 | frog 3 | cow 2 | mouse 2 | owl 1 |"
                     "ant 1"),
    "friend": always("Pip 7 | Coco 6 | Momo 5 | Dot 5 | Bo 4 | Lulu 3 | Kit 3 | Pom 2 | Mo 1"),
    "trouble": always("But the {thing} {mishap}. 5 | Then the {thing} {mishap}. 4 | Oh no! The {thing} {mishap}. 3"),
    "mishap": given("thing", {thing: MISHAPS[kind] for kind, line in KINDS.items() for thing in weighted(line)}),
    "sorrow": always("{hero} was {feeling} and {reaction}. 5 | {hero} felt {feeling} and {reaction}. 4"),
    "feeling": always("sad 8 | mad 5 | upset 4 | scared 4 | lost 3 | bad 2"),
    "reaction": always("cried 6 | sat down 5 | ran home 3 | looked up 2 | hid 2 | stood still 1"),
    "comfort": always('"{promise}," said {friend}. 5 | {friend} said, "{promise}." 4'),
    "promise": always("I can help 6 | Do not cry 5 | Let me try 4 | I will get it 3 | I saw it 2 | Be brave 1"),
    "rescue": always("The {animal} {fix} and got the {colour} {thing}. 5 |"
                     "The {animal} {fix} and found the {colour} {thing}. 4"),
    "fix": given("mishap", {mishap: FIXES[mishap.split()[-1]]
                            for line in MISHAPS.values() for mishap in weighted(line)}),
    "thanks": always('"{praise}, {friend}!" said {hero}. 5 | {hero} said, "{praise}, {friend}!" 4'),
    "praise": always("Thank you 6 | You are kind 4 | You are good 3 | Well done 3 | You are brave 2"),
    "treat": always("They had {food}. 5 | They ate {food}. 4 | They shared {food}. 3"),
    "food": always("cake 6 | soup 5 | an apple 4 | a pie 4 | nuts 3 | a pear 2 | bread 2 | eggs 1"),
    "ending": always("{hero} and {friend} {bond}. 5 | Then {hero} and {friend} {bond}. 4"),
    "bond": always("were best friends 6 | played all day 5 | were so happy 4 | sang and sang 3 | went home 2"),
}
PRONOUNS = {"girl": {"He": "She", "he": "she", "his": "her"}, "boy": {"He": "He", "he": "he", "his": "his"}}
SLOT = re.compile(r"\{(a )?(\w+)\}")


def with_article(value):
    return ("an " if value[0] in "aeiou" else "a ") + value


def render(derivation):
    """The story of a derivation, {choice: value}."""
    def fill(slot):
        article, name = slot.groups()
        value = PRONOUNS[derivation["child"]].get(name) or SLOT.sub(fill, derivation[name])
        return with_article(value) if article else value
    return SLOT.sub(fill, STORY)


def parse(story):
    """The derivation of a story; ValueError if the grammar cannot have written it."""
    found = next(derivations(story, 0, split_template(STORY), {}), None)
    if found is None:
        raise ValueError("this text is not a story of the built-in grammar")
    return {name: found[name] for name in GRAMMAR}


@cache
def split_template(template):
    """'A {child}.' as ('A ', ('child', False), '.'); the flag says that an article comes first."""
    parts = SLOT.split(template)
    slots = [(name, bool(article)) for article, name in zip(parts[1::3], parts[2::3], strict=True)]
    return tuple(item for item in itertools.chain(*itertools.zip_longest(parts[::3], slots)) if item)


def derivations(text, at, items, chosen):
    """Yield each way to read `items` (see split_template) from text[at:], as `chosen` with what was read added."""
    if not items:
        if at == len(text):
            yield chosen
        return
    item, rest = items[0], items[1:]
    if isinstance(item, tuple):
        name, article = item
        fixed = PRONOUNS[chosen.get("child", "boy")].get(name) or chosen.get(name)
        if fixed is None:
            parent, tables = GRAMMAR[name]
            for value in tables[chosen.get(parent)]:
                words = split_template(value)
                if article:
                    words = (with_article(value),)
                yield from derivations(text, at, words + rest, {**chosen, name: value})
            return
        item = with_article(fixed) if article else fixed
    if text.startswith(item, at):
        yield from derivations(text, at + len(item), rest, chosen)


def sample_stories(count, seed):
    """`count` stories drawn from the grammar, always the same for a seed."""
    rng = random.Random(seed)
    tables = {(name, value): (list(table), list(itertools.accumulate(table.values())))
              for name, (_, given_value) in GRAMMAR.items() for value, table in given_value.items()}
    stories = []
    for _ in range(count):
        derivation = {}
        for name, (parent, _) in GRAMMAR.items():
            values, cumulative = tables[name, derivation.get(parent)]
            # Rounding may leave the last sum a hair below 1.
            derivation[name] = values[min(bisect(cumulative, rng.random()), len(values) - 1)]
        stories.append(render(derivation))
    return stories


def story_nats(story):
    """-ln of the story's probability under the grammar; ValueError if it has none."""
    derivation = parse(story)
    return -sum(math.log(tables[derivation.get(parent)][derivation[name]])
                for name, (parent, tables) in GRAMMAR.items())


def sample_entropy():
    """Mean of story_nats over all stories, exactly: choices that depend on one other form a tree."""
    marginals, nats = {None: {None: 1.0}}, 0.0
    for name, (parent, tables) in GRAMMAR.items():
        marginals[name] = {}
        for value, weight in marginals[parent].items():
            for choice, p in tables[value].items():
                marginals[name][choice] = marginals[name].get(choice, 0.0) + weight * p
                nats -= weight * p * math.log(p)
    return nats


# ---------------------------------------------------------------- Where the stories come from


@dataclass(frozen=True)
class Split:
    """One split of a corpus: `read()` yields the text of each row, None where a row has none, in order."""

    read: Callable
    rows: int | None = None         # None: not known without reading


def open_source(config):
    """The (train, validation or None) splits of the corpus that `config` names."""
    path = Path(config.dataset)
    if config.dataset == "sample":
        return sample_source()
    if path.exists():
        return local_source(config, path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", config.dataset) or path.suffix.lower() in KINDS_OF_FILE:
        raise UserError(f"{path} does not exist: pass --dataset with a file, a folder, a name on the Hub, or sample.")
    return hub_source(config)


def sample_source():
    """The built-in corpus. No validation story occurs in train."""
    held = sample_stories(VAL_STORIES, seed=1)
    unseen = set(held)
    train = [story for story in sample_stories(TRAIN_STORIES, seed=0) if story not in unseen]
    return Split(lambda: iter(train), len(train)), Split(lambda: iter(held), len(held))


def fingerprint(config):
    """A hash that changes when a local corpus does: the names, sizes and times of its files. None for others."""
    path = Path(config.dataset)
    if config.dataset == "sample" or not path.exists():
        return None
    folder = Path(config.data_dir).resolve()
    if path.is_dir() and folder.is_relative_to(path.resolve()):
        raise UserError(f"--data-dir {config.data_dir} lies inside --dataset {path}: the prepared files would become "
                        "part of the corpus. Pass another --data-dir.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def local_source(config, path):
    """A folder in the Hub's layout, or a file. Text files are read here, all else through `datasets`."""
    kind = KINDS_OF_FILE.get(path.suffix.lower())
    if path.is_file() and not kind:
        raise UserError(f"{path}: a corpus is a parquet, json, jsonl, csv or txt file, or a folder of them.")
    if path.is_file() and kind == "text":
        return Split(lambda: read_text_files([path])), None
    datasets = import_datasets()
    try:
        if path.is_file():
            builder = datasets.load_dataset_builder(kind, data_files={"train": [str(path)]})
        else:
            builder = datasets.load_dataset_builder(str(path))
    except Exception as error:
        raise UserError(f"{path} holds no corpus that can be read ({first_line(error)}): it needs parquet, json, "
                        "jsonl, csv or txt files.") from error
    if builder.name == "text":
        return choose_splits({str(name): Split(lambda files=files: read_text_files(files))
                              for name, files in builder.config.data_files.items()}, path)
    return dataset_splits(builder, config, path)


def hub_source(config):
    """A data set on the Hugging Face Hub, streamed."""
    datasets = import_datasets()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    other = "pass --dataset sample for the built-in corpus, or --dataset with a local file or folder"
    try:
        # Asked first because it fails at once without a network, where `datasets` tries again for half a minute.
        revision = HfApi().dataset_info(config.dataset, timeout=20).sha
        builder = datasets.load_dataset_builder(config.dataset, revision=revision)
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no data set {config.dataset} on the Hugging Face Hub, or it needs a login "
                        f"(`hf auth login`): {other}.") from error
    except Exception as error:
        raise UserError(f"{config.dataset} could not be read from the Hugging Face Hub ({first_line(error)}): "
                        f"check the network, or {other}.") from error
    return dataset_splits(builder, config, config.dataset)


def import_datasets():
    """The `datasets` library, without its log lines: what goes wrong is reported here, once."""
    import logging
    import datasets
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    return datasets


def dataset_splits(builder, config, where):
    """The splits of a `datasets` builder, with their row counts where files or metadata have them."""
    rows = {name: info.num_examples for name, info in (builder.info.splits or {}).items()}
    files = builder.config.data_files or {}
    splits = {}
    for name in map(str, rows or files):
        if name not in rows and builder.name == "parquet":
            rows[name] = count_parquet_rows(files[name])
        splits[name] = Split(lambda name=name: read_split(builder, name, config.text_field, where), rows.get(name))
    return choose_splits(splits, where)


def count_parquet_rows(paths):
    """Rows of parquet files from their footers, None where one cannot be read (the error comes when it is)."""
    import fsspec
    import pyarrow.parquet
    try:
        total = 0
        for path in paths:
            with fsspec.open(path, "rb") as file:
                total += pyarrow.parquet.ParquetFile(file).metadata.num_rows
        return total
    except Exception:
        return None


def choose_splits(splits, where):
    """(train, validation or else test or None) of named splits."""
    train = splits.get("train") or (next(iter(splits.values())) if len(splits) == 1 else None)
    if train is None:
        raise UserError(f"{where} has no split named train, but {', '.join(splits) or 'none at all'}: pass --dataset "
                        "with another corpus.")
    return train, splits.get("validation") or splits.get("test")


def read_split(builder, name, field, where):
    """Yield the text of each row. Whatever the reading libraries raise becomes a UserError that names the corpus."""
    try:
        if builder.name == "parquet":
            batches_of_rows = read_parquet(builder.config.data_files[name], field)
        else:
            batches_of_rows = builder.as_streaming_dataset(split=name).iter(batch_size=256)
        for rows in batches_of_rows:
            if field not in rows:
                raise UserError(f"{where} has no column {field!r}, but {', '.join(rows)}: pass --text-field.")
            for text in rows[field]:
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{where}: the column {field!r} holds {type(text).__name__}, not text: pass "
                                    "--text-field.")
                yield text
    except (UserError, GeneratorExit):
        raise
    except StopIteration:               # what `datasets` raises for an empty json file
        return
    except Exception as error:
        raise UserError(f"{where} ({name}) cannot be read: {first_line(error)}. Mend it, then run the same command "
                        "again.") from error


def read_parquet(paths, field):
    """Yield the rows of parquet files, here or on the Hub, as {column: values}, a few at a time.

    `datasets` finds the files; reading them through it holds a whole file in memory (measured with 5.2: 2.3 GB for a
    file of 1 GB) and takes ten times as long.
    """
    import fsspec
    import pyarrow.parquet
    for path in paths:
        with fsspec.open(path, "rb") as source, pyarrow.parquet.ParquetFile(source, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                yield dict.fromkeys(names)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield {field: batch.column(0).to_pylist()}


def read_text_files(paths):
    """Yield the stories of text files: split at <|endoftext|> where that occurs, else a file is a story."""
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:
                yield from split_stories(iter(lambda: file.read(1 << 20), ""))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a block): save it as "
                            "UTF-8, then run the same command again.") from None


def split_stories(blocks):
    """Yield the stories in a text that arrives in blocks. Newlines beside a separator belong to it."""
    parts, seen = [], False
    for block in blocks:
        # A separator may lie across the border of two blocks, so its possible beginning joins the next block.
        tail = (parts.pop() if parts else "") + block
        *stories, rest = tail.split(SEPARATOR)
        for story in stories:
            yield "".join([*parts, story]).strip("\n")
            parts, seen = [], True
        keep = max(0, len(rest) - len(SEPARATOR) + 1)
        parts += [rest[:keep], rest[keep:]]
    text = "".join(parts)
    yield text.strip("\n") if seen else text


# ---------------------------------------------------------------- Which stories, in which file


def text_hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def kept(index, rate, seed):
    """Whether a fixed choice by `seed`, with probability `rate`, keeps number `index`."""
    return rate >= 1 or text_hash(f"{seed} {index}") < rate * 2**64


def is_story(text):
    return bool(text and text.strip())


def divide(train, val, where):
    """(train, validation stories, hashes of all validation stories, number of training rows).

    Where the corpus has no validation split, the 1% of its texts with the smallest hashes are it: the same text is
    always on the same side, whatever part of the corpus is used.
    """
    if val is not None:
        stories = list(filter(is_story, val.read()))
        rows = train.rows
        if rows is None:
            rows = sum(map(is_story, Progress(train.read(), "counting", "stories", None)))
        return train, stories, {text_hash(text) for text in stories}, rows
    hashes, sole = array("Q"), None
    for text in filter(is_story, Progress(train.read(), "dividing", "stories", train.rows)):
        hashes.append(text_hash(text))
        sole = text if len(hashes) == 1 else None
    if not hashes:
        raise UserError(f"{where} holds no text: pass --dataset with another corpus, or sample.")
    if sole is not None:
        head, tail = cut_document(sole)
        return Split(lambda: iter([head])), [tail], {text_hash(tail)}, 1
    hashes = np.array(hashes)
    distinct = np.unique(hashes)
    held = set(distinct[:min(MAX_HELD_OUT, max(1, len(distinct) // 100))].tolist())
    return train, held_out_stories(train, held), held, int((~np.isin(hashes, list(held))).sum())


def held_out_stories(split, held):
    """The stories whose hash is in `held`, in order, each once."""
    stories = {}
    for text in filter(is_story, split.read()):
        if len(stories) < len(held) and text_hash(text) in held:
            stories.setdefault(text_hash(text), text)
    return list(stories.values())


def cut_document(text):
    """A document in two: its last 5% or a little more, from the end of a paragraph (else a line, a word) on."""
    limit = int(len(text) * 0.95)
    for mark in ("\n\n", "\n", " "):
        cut = text.rfind(mark, len(text) // 2, limit)
        if cut >= 0:
            return text[:cut + len(mark)], text[cut + len(mark):]
    return text[:limit], text[limit:]


def select(train, held, rows, config):
    """Yield (part, story) of the training stories that --num-files and --sample-rate keep, in order."""
    index = 0
    ends = [-(-(part + 1) * rows // PARTS) for part in range(config.num_files)]
    if config.num_files == PARTS:
        ends[-1] = math.inf             # metadata that promises too few rows loses none
    for text in train.read():
        if not is_story(text) or text_hash(text) in held:
            continue
        if index >= ends[-1]:
            return
        if kept(index, config.sample_rate, config.seed):
            yield bisect(ends, index), text
        index += 1


def batches(texts, limit=BATCH_CHARS):
    """Group texts into lists of about `limit` characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_text_file(path, texts):
    """Write stories to a parquet file, a batch at a time; how many there are, and their bytes."""
    import pyarrow
    import pyarrow.parquet
    schema = pyarrow.schema([("text", pyarrow.string())])
    stories = size = 0
    options = dict(compression="zstd", write_page_checksum=True)
    with replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for batch in batches(texts, 4 * BATCH_CHARS):
            writer.write_table(pyarrow.table({"text": batch}, schema))
            stories += len(batch)
            size += sum(len(text.encode()) for text in batch)
    return dict(stories=stories, bytes=size)


def read_text_file(path, entry):
    """Yield the stories of a file for which write_text_file returned `entry`; UserError where it has changed since."""
    import pyarrow.parquet
    stories = size = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                for text in file.read_row_group(group).column("text").to_pylist():
                    stories, size = stories + 1, size + len(text.encode())
                    yield text
        # The footer has no checksum: rows may be missing, or bytes in the place of text.
        if dict(stories=stories, bytes=size) != entry:
            raise ValueError(f"{stories} stories in {size} bytes instead of {entry['stories']} in {entry['bytes']}")
    except (OSError, KeyError, ValueError, AttributeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): delete the folder {path.parent}, then run "
                        "`python preprocess.py prepare-dataset` again.") from error


# ---------------------------------------------------------------- The stages

class Progress:
    """Iterate over `items`; on a terminal a bar, elsewhere a line now and then, with rate and time left.

    `total` is None where nobody knows it.
    """

    def __init__(self, items, label, unit, total, size=lambda item: 1, seconds=15):
        """`size(item)` says how many of the `total` units an item is; `seconds`: between two lines."""
        self.items, self.label, self.unit, self.total, self.size = items, label, unit, total, size
        self.seconds = seconds

    def __iter__(self):
        bar = tqdm(total=self.total and round(self.total), desc=self.label, unit=f" {self.unit}", unit_scale=True,
                   disable=None, leave=False)
        done, start = 0, time.monotonic()
        last = start
        with bar:
            for item in self.items:
                done += self.size(item)
                bar.update(self.size(item))
                yield item
                now = time.monotonic()
                if bar.disable and now - last >= self.seconds:
                    last, rate = now, done / (now - start)
                    line = f"{self.label}: {done:,} {self.unit}, {rate:,.0f} a second"
                    if self.total:
                        line += f", {max(0.0, self.total - done) / rate:,.0f} s left"
                    click.echo(line)


def text_arguments(config):
    """The settings that decide which text is used. They are compared between runs."""
    names = ("dataset", "text_field", "num_files", "sample_rate", "seed")
    return {name: getattr(config, name) for name in names} | {"files": fingerprint(config)}


def all_arguments(config, tokenizer):
    """The settings that decide what is prepared; `tokenizer` is the one of --tokenizer, None where one is trained."""
    arguments = text_arguments(config) | vocabulary_arguments(config.vocab_size, config.dataset)
    if tokenizer:
        arguments |= dict(vocab_size=tokenizer.vocab_size, tokenizer=config.tokenizer,
                          tokenizer_sha256=tokenizer.sha256)
    return arguments


def vocabulary_arguments(vocab_size, dataset):
    vocab_size = vocab_size or (512 if dataset == "sample" else 4096)
    return dict(vocab_size=vocab_size, tokenizer=None, tokenizer_sha256=None)


def given_tokenizer(config):
    """The vocabulary that --tokenizer names, None without it. UserError unless it is one that this program made."""
    path = config.tokenizer
    if path is None:
        return None
    which = "pass the tok*.model in the folder of the corpus that its model was trained on, such as data/tok4096.model"
    try:
        tokenizer = Tokenizer(Path(path).read_bytes(), path)
        text = " a  b\n\n12\r\n\t\u00e9\U0001f600 "
        ours = ((tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2) and tokenizer.vocab_size <= 65536
                and tokenizer.decode(tokenizer.encode(text)) == text)
    except OSError as error:
        raise UserError(f"--tokenizer {path} cannot be read ({error.strerror}): {which}.") from error
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"--tokenizer {path} is not a vocabulary that preprocess.py made: {which}. A checkpoint gives "
                        "its own: `python export.py --format tokenizer --checkpoint out/best.pt --output tok.model`.")
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(f"--vocab-size {config.vocab_size} contradicts --tokenizer {path}, which has "
                        f"{tokenizer.vocab_size} tokens: leave --vocab-size out.")
    return tokenizer


def check_same(there, arguments, what, overwrite):
    """Raise UserError if `what` was made with other arguments and may not be overwritten."""
    differ = [name for name in arguments if there.get(name) != arguments[name]]
    if differ and not overwrite:
        said = [f"--{name.replace('_', '-')} {there.get(name)} (not {arguments[name]})" for name in differ
                if name not in ("files", "tokenizer_sha256")]
        newer = "--dataset" if "files" in differ else "--tokenizer"
        reason = f"was prepared with {', '.join(said)}" if said else f"is older than the files of {newer}"
        raise UserError(f"{what} {reason}: pass --overwrite to replace it, or another --data-dir to keep both.")
    return not differ


def open_plan(folder, arguments, overwrite):
    """The plan of a folder that is being filled, an empty one where nothing is finished yet."""
    plan = Plan.read(folder)
    if plan and plan.files and check_same(plan.arguments, arguments, f"the unfinished corpus in {folder}", overwrite):
        return plan
    shutil.rmtree(folder, ignore_errors=True)
    return Plan(folder, arguments)


def download(config, overwrite):
    """Bring the chosen stories to <data-dir>/text, a parquet file for each part."""
    arguments, data_dir = text_arguments(config), Path(config.data_dir)
    folder, partial = data_dir / "text", data_dir / "text.partial"
    unfinished = Plan.read(partial)
    if not unfinished or unfinished.arguments != arguments:
        there = Plan.read(folder, "text.json")
        if there and check_same(there.arguments, arguments, f"the text in {folder}", overwrite) and not overwrite:
            return click.echo(f"text: already in {folder}.")
        if folder.exists() and not there:
            raise UserError(f"{folder} exists and was not made by this program: pass another --data-dir.")
    fill_text(config, open_plan(partial, arguments, overwrite))
    shutil.rmtree(folder, ignore_errors=True)
    replace_file(partial, folder)


def fill_text(config, plan):
    """Write the text files that the plan lacks, and text.json when all are there."""
    if (plan.folder / "text.json").exists():
        return
    click.echo(f"text: reading {config.dataset} ...")
    train, val = open_source(config)
    train, val_stories, held, rows = divide(train, val, config.dataset)
    if not val_stories:
        raise UserError(f"the validation split of {config.dataset} holds no text: pass --dataset with another corpus.")
    wanted = -(-config.num_files * rows // PARTS)
    stories = Progress(select(train, held, rows, config), "text", "stories", wanted * config.sample_rate)
    groups = itertools.chain([("val_000.parquet", val_stories)],
                             ((f"train_{part:03d}.parquet", (text for _, text in group))
                              for part, group in itertools.groupby(stories, key=lambda story: story[0])))
    for name, texts in groups:
        if name not in plan.files:
            plan.add(name, write_text_file(plan.folder / name, texts))
    if len(plan.files) < 2 and config.num_files == PARTS and config.sample_rate == 1:
        raise UserError(f"{config.dataset} holds too little text: beside what validation needs, none is left to train "
                        "on. Pass --dataset with more of it.")
    if len(plan.files) < 2:
        raise UserError(f"--num-files {config.num_files} and --sample-rate {config.sample_rate:g} keep none of the "
                        f"{rows:,} training stories of {config.dataset}: raise them.")
    plan.write("text.json")


def finished_text(data_dir):
    """What text.json says about the text in a data folder; UserError if there is none."""
    text = Plan.read(data_dir / "text", "text.json")
    if text is None or "val_000.parquet" not in text.files or len(text.files) < 2:
        raise UserError(f"there is no text in {data_dir}: run `python preprocess.py download` (with --data-dir) first.")
    return text


def finished_meta(data_dir, overwrite):
    """What meta.json says, None where there is none; a damaged one is an error unless it is to be overwritten."""
    path = data_dir / "meta.json"
    try:
        return read_meta(data_dir) if path.exists() else None
    except UserError:
        if overwrite:
            return None
        raise


def training_text(text):
    """Yield the training stories of the text that a plan describes, in order."""
    for name in sorted(text.files):
        if name.startswith("train"):
            yield from read_text_file(text.folder / name, text.files[name])


def train_vocab(data_dir, vocab_size, overwrite):
    """Train the tokenizer on the training text and leave it in tokens.partial."""
    text = finished_text(data_dir)
    arguments = text.arguments | vocabulary_arguments(vocab_size, text.arguments["dataset"])
    plan, name = open_plan(data_dir / "tokens.partial", arguments, overwrite), tokenizer_file(arguments)
    if name in plan.files:
        return click.echo(f"vocabulary: already in {plan.folder / name}.")
    meta = finished_meta(data_dir, overwrite)
    if meta and not overwrite and check_same(meta["arguments"], arguments, f"the corpus in {data_dir}", overwrite):
        return click.echo(f"vocabulary: already in {data_dir / name}.")
    start = time.monotonic()
    total = sum(entry["bytes"] for file, entry in text.files.items() if file.startswith("train"))
    rate, seed = min(1.0, VOCABULARY_BYTES / total), arguments["seed"]
    pieces = itertools.chain.from_iterable(map(chunks, training_text(text)))
    chosen = (piece for index, piece in enumerate(pieces) if kept(index, rate, f"vocabulary {seed}"))
    tokenizer = put_tokenizer(plan, Tokenizer(train_sentencepiece(chosen, arguments["vocab_size"])))
    click.echo(f"vocabulary: {tokenizer.vocab_size} tokens from {min(total, VOCABULARY_BYTES) / 1e6:.1f} MB of text in "
               f"{time.monotonic() - start:.1f} s.")


def tokenizer_file(arguments):
    return f"tok{arguments['vocab_size']}.model"


def put_tokenizer(plan, tokenizer):
    """Write a tokenizer into the plan's folder, unless it is there already; the tokenizer."""
    name = tokenizer_file(plan.arguments)
    if name not in plan.files:
        with replacing(plan.folder / name) as file:
            file.write(tokenizer.model_bytes)
        plan.add(name, dict(sha256=tokenizer.sha256))
    return tokenizer


def train_sentencepiece(texts, vocab_size):
    """The bytes of a BPE model. UserError, with a size that fits, where the text is too small or too varied."""
    texts = list(texts)
    # The rarest characters are spelled in bytes. A text with thousands of different ones (Chinese) needs more of that.
    for coverage in (0.9999, 0.98):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                character_coverage=coverage, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True, max_sentence_length=65536,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3,
                # Written into the model: with the machine's own number its hash would differ from machine to machine.
                num_threads=16)
            return model.getvalue()
        except RuntimeError as error:
            message = str(error)
        if "required_chars" not in message:
            break
    most, least = re.search(r"value <= (\d+)", message), re.search(r"\d+ vs (\d+)", message)
    if most and int(most[1]) >= 260:
        raise UserError(f"the text is too small for a vocabulary of {vocab_size}: pass --vocab-size {most[1]} or less.")
    if least:
        raise UserError(f"the text has too many different characters for a vocabulary of {vocab_size}: pass "
                        f"--vocab-size {least[1]} or more.")
    raise UserError(f"SentencePiece cannot make a vocabulary of {vocab_size} from this text ({message[-120:]}): "
                    "pass --dataset with more text.")


def encode_files(tokenizer, files, workers):
    """Yield (path, stories, ids) batch by batch, in order, encoded on `workers` threads; `files`: {path: its entry}.

    Threads are enough, and no process can outlive its parent: SentencePiece works outside the interpreter's lock.
    """
    tasks = ((path, batch) for path, entry in files.items() for batch in batches(read_text_file(path, entry)))
    waiting = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        # A bounded window: Executor.map would read the whole corpus before the first result.
        for path, batch in tasks:
            waiting.append((path, batch, pool.submit(tokenizer.encode_documents, batch)))
            if len(waiting) > 2 * workers:
                path, batch, future = waiting.popleft()
                yield path, batch, future.result()
        for path, batch, future in waiting:
            yield path, batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_shard(path, encoded):
    """Write the ids of `encoded` (see encode_files) to a shard; its entry in meta.json."""
    digest, low, high = hashlib.sha256(), 65535, 0
    tokens = size = stories = 0
    with replacing(path) as file:
        for _, batch, ids in encoded:
            file.write(ids)
            digest.update(ids)
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            tokens, stories = tokens + len(ids), stories + len(batch)
            size += sum(len(text.encode()) for text in batch)
    return dict(file=path.name, tokens=tokens, bytes=size, stories=stories, sha256=digest.hexdigest(),
                min_id=low, max_id=high)


def pretokenize(data_dir, workers, overwrite):
    """Encode the text to shards on all cores, then put shards, tokenizer and meta.json in place."""
    text, start = finished_text(data_dir), time.monotonic()
    plan, meta = Plan.read(data_dir / "tokens.partial"), finished_meta(data_dir, overwrite)
    if plan is None and meta and not overwrite:
        check_same(meta["arguments"], text.arguments, f"the corpus in {data_dir}", overwrite)
        return click.echo(f"tokens: already in {data_dir}.")
    if plan is None and meta:           # the vocabulary of the finished corpus does for `pretokenize --overwrite` alone
        plan = Plan(data_dir / "tokens.partial", meta["arguments"] | text.arguments)
        put_tokenizer(plan, Tokenizer.from_file(data_dir / meta["tokenizer"]["file"]))
    if plan and any(plan.arguments.get(name) != value for name, value in text.arguments.items()):
        raise UserError(f"the vocabulary in {plan.folder} was made from other text than that in {text.folder}: run "
                        "`python preprocess.py train-vocab --overwrite` first.")
    if plan is None or tokenizer_file(plan.arguments) not in plan.files:
        raise UserError(f"there is no vocabulary in {data_dir}: run `python preprocess.py train-vocab` first.")
    shards = {file: Path(file).stem + ".bin" for file in sorted(text.files)}
    missing = [file for file in shards if shards[file] not in plan.files]
    if missing:
        tokenizer = Tokenizer.from_file(plan.folder / tokenizer_file(plan.arguments))
        size = sum(text.files[file]["bytes"] for file in missing)
        encoded = encode_files(tokenizer, {text.folder / file: text.files[file] for file in missing}, workers)
        counted = Progress(encoded, "tokens", "bytes", size, lambda item: sum(map(len, item[1])))
        for path, group in itertools.groupby(counted, key=lambda item: item[0]):
            plan.add(shards[path.name], write_shard(plan.folder / shards[path.name], group))
        seconds = time.monotonic() - start
        tokens = sum(plan.files[shards[file]]["tokens"] for file in missing)
        click.echo(f"tokens: {tokens:,} in {seconds:.1f} s, {tokens / seconds:,.0f} a second.")
    finish(data_dir, plan, text)


def finish(data_dir, plan, text):
    """Move the finished files in place, meta.json last. Can be stopped and repeated at any moment."""
    arguments, files, name = plan.arguments, plan.files, tokenizer_file(plan.arguments)
    shards = [entry for file, entry in sorted(files.items()) if file.endswith(".bin")]
    meta = dict(format=FORMAT, source=arguments["dataset"], vocab_size=arguments["vocab_size"],
                tokenizer=dict(file=name, sha256=files[name]["sha256"]), arguments=arguments,
                train=[entry for entry in shards if entry["file"].startswith("train")],
                val=[entry for entry in shards if entry["file"].startswith("val")])
    if arguments["dataset"] == "sample":
        stories = read_text_file(text.folder / "val_000.parquet", text.files["val_000.parquet"])
        meta["floor"] = floor(stories, meta["val"])
    meta["sha256"] = digest(meta)
    (data_dir / "meta.json").unlink(missing_ok=True)
    for path in sorted(data_dir.iterdir()):
        if OURS.fullmatch(path.name) and path.name not in files:
            path.unlink()
    for file in files:
        if (plan.folder / file).exists():
            replace_file(plan.folder / file, data_dir / file)
    write_json(data_dir / "meta.json", meta)
    shutil.rmtree(plan.folder, ignore_errors=True)


def floor(stories, shards):
    """The least loss possible on stories of the built-in grammar: their -ln p over what a model predicts."""
    nats = sum(map(story_nats, stories))
    predicted = sum(shard["tokens"] - shard["stories"] for shard in shards)     # every token but a story's first
    return dict(nats_per_token=nats / predicted,
                bits_per_byte=nats / math.log(2) / sum(shard["bytes"] for shard in shards))


# ---------------------------------------------------------------- Commands


def report(data_dir, seconds):
    """Print the table of a finished corpus. `seconds` is what it took, None where nothing had to be done."""
    corpus = open_corpus(data_dir)
    meta, text = corpus.meta, Path(data_dir) / "text"
    used = np.zeros(corpus.tokenizer.vocab_size, dtype=bool)
    for shard in corpus.train.shards:
        used |= np.bincount(shard, minlength=len(used)) > 0
    total = {split: {key: sum(shard[key] for shard in meta[split]) for key in ("stories", "tokens", "bytes")}
             for split in ("train", "val")}
    rows = [("stories", *(f"{total[split]['stories']:,}" for split in total)),
            ("tokens", *(f"{total[split]['tokens']:,}" for split in total)),
            ("bytes a token", *(f"{total[split]['bytes'] / (total[split]['tokens'] - 2 * total[split]['stories']):.2f}"
                                for split in total))]
    click.echo(f"\n{'':20}{'train':>14}{'validation':>14}")
    for name, train, val in rows:
        click.echo(f"{name:20}{train:>14}{val:>14}")
    click.echo(f"{'vocabulary used':20}{used.mean():>14.1%}   of {len(used)} tokens")
    if "floor" in meta:
        click.echo(f"{'floor':20}{meta['floor']['nats_per_token']:>14.4f}   nats a token: no model can score lower")
    if seconds is not None:
        click.echo(f"{'seconds':20}{seconds:>14.1f}")
    click.echo(f"{'where':20}{str(data_dir):>14}")
    if text.exists():
        size = sum(path.stat().st_size for path in text.iterdir())
        click.echo(f"The text itself stays in {text} ({size / 1e6:.1f} MB), for another vocabulary size without "
                   "another download. Training does not need it.")


def own(data_dir):
    """Keep every other preparation out of `data_dir` until this command ends."""
    click.get_current_context().with_resource(sole_owner(data_dir, "preparation"))


def prepare(config, workers, overwrite):
    """All stages, each going on where it stopped."""
    start, data_dir, tokenizer = time.monotonic(), Path(config.data_dir), given_tokenizer(config)
    arguments = all_arguments(config, tokenizer)
    own(data_dir)
    if (data_dir / "meta.json").exists() and not overwrite:
        meta = read_meta(data_dir)
        check_same(meta["arguments"], arguments, f"the corpus in {data_dir}", overwrite)
        click.echo(f"The corpus in {data_dir} is prepared already, with the same arguments; nothing to do.")
        return report(data_dir, None)
    plan = open_plan(data_dir / "tokens.partial", arguments, overwrite)
    going_on = bool(plan.files)
    download(config, overwrite and not going_on)
    if tokenizer:
        put_tokenizer(plan, tokenizer)
        click.echo(f"vocabulary: {tokenizer.vocab_size} tokens of {config.tokenizer}.")
    else:
        train_vocab(data_dir, arguments["vocab_size"], overwrite)
    pretokenize(data_dir, workers, overwrite)
    report(data_dir, time.monotonic() - start)


class Stages(click.Group):
    """The commands, with Ctrl-C ending in a line instead of a traceback."""

    def list_commands(self, ctx):
        return list(self.commands)      # as they stand below: the one that most people need first

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nStopped. The same command goes on where this one stopped.", err=True)
            ctx.exit(130)


@click.group(cls=Stages, context_settings=COMMAND_LINE)
def main():
    """Prepare a corpus for train.py: choose stories, train a vocabulary, write token ids.

    prepare-dataset does all of it; the other commands are its stages, one at a time. Their options:
    `python preprocess.py prepare-dataset --help`.
    """


def working_options(command):
    # Where the system says which cores this process may use, a container's share counts and not the whole machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = click.option("--overwrite", is_flag=True, help="replace what was prepared with other arguments")(command)
    return click.option("--workers", type=click.IntRange(1, 1024), default=cores, metavar="N",
                        help="threads that encode  [default: all cores]")(command)


@main.command("prepare-dataset", cls=GroupedCommand)
@setting_options(CorpusConfig)
@working_options
def prepare_dataset(workers, overwrite, **values):
    """Prepare a corpus from beginning to end."""
    prepare(CorpusConfig(**pick(CorpusConfig, values)), workers, overwrite)


@main.command("download", cls=GroupedCommand)
@setting_options(CorpusConfig, omit=("vocab_size", "tokenizer"))
@click.option("--overwrite", is_flag=True, help="replace text that was chosen with other arguments")
def download_command(overwrite, **values):
    """Bring the chosen stories to DATA-DIR/text."""
    config = CorpusConfig(**pick(CorpusConfig, values))
    fingerprint(config)  # refuses a folder inside the corpus before anything is written there
    own(config.data_dir)
    download(config, overwrite)
    files = finished_text(Path(config.data_dir)).files.values()
    click.echo(f"text: {sum(file['stories'] for file in files):,} stories, "
               f"{sum(file['bytes'] for file in files) / 1e6:.1f} MB.")


@main.command("train-vocab", cls=GroupedCommand)
@setting_options(CorpusConfig, omit=("dataset", "text_field", "tokenizer", "num_files", "sample_rate", "seed"))
@click.option("--overwrite", is_flag=True, help="replace a vocabulary of another size")
def train_vocab_command(overwrite, **values):
    """Train the vocabulary on the text."""
    config = CorpusConfig(**pick(CorpusConfig, values))
    own(config.data_dir)
    train_vocab(Path(config.data_dir), config.vocab_size, overwrite)


@main.command("pretokenize", cls=GroupedCommand)
@setting_options(CorpusConfig, omit=("dataset", "text_field", "vocab_size", "tokenizer", "num_files", "sample_rate",
                                     "seed"))
@working_options
def pretokenize_command(workers, overwrite, **values):
    """Write the text as token ids."""
    config, start = CorpusConfig(**pick(CorpusConfig, values)), time.monotonic()
    own(config.data_dir)
    pretokenize(Path(config.data_dir), workers, overwrite)
    report(config.data_dir, time.monotonic() - start)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
