"""Prepare a corpus for train.py: collect the stories, train a vocabulary, write token ids as shards of uint16.

Files are written atomically to DATA-DIR/partial and moved into place at the end. So an interrupted run resumes where it
stopped, and an earlier corpus stays usable until the new one is complete.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries are imported: no traceback

import collections
import csv
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import sentencepiece
from tqdm import tqdm

from config import (CONTEXT_SETTINGS, PRESETS, Command, CorpusConfig, UserError, atomic_write, flag, folder_lock,
                    only_fields, refuse_without_effect, replace_file, setting_options, short_message, wrapped)
from data import WORDS, Corpus, Tokenizer, chunks, read_json, word_prompt, write_json

PARTS = 50                          # the corpus is cut into this many equal parts ("files"), one shard each
SEPARATOR = "<|endoftext|>"         # between the stories of a text file, as in TinyStoriesV2-GPT4-train.txt
PIECE_CHARS = 1 << 18               # longest text handled at once: at most 1 MB
BATCH_BYTES = 1 << 20               # text that is encoded in one call
VOCABULARY_BYTES = 64 * 10**6       # text that the vocabulary is trained on; SentencePiece needs six times this memory
MAX_VAL_STORIES, MAX_VAL_BYTES = 5000, 20 * 10**6  # held out from a corpus without a validation split


def progress(iterable, description, unit=" stories", total=None):
    """A progress bar; without a terminal, a line every 15 seconds."""
    options = {} if sys.stderr.isatty() else dict(mininterval=15, delay=15)
    return tqdm(iterable, description, total, unit=unit, leave=False, **options)


# -----------------------------------------------------------------------------
# 1. Stories: files to rows of text

def split_stories(blocks):
    """Yield (text, starts_story) for the stories in a text that arrives in blocks; a long story takes several pieces.

    Stories are separated by SEPARATOR and the newlines around it. A text without one is a single story.
    """
    text, starts, separated = "", True, False
    for block in blocks:
        *stories, text = (text + block).split(SEPARATOR)
        for story in stories:
            yield (story.strip("\n") if starts else story.rstrip("\n")), starts
            starts = separated = True
        while len(text) > 2 * PIECE_CHARS:  # what stays is long enough for a separator that is still incomplete
            piece = next(chunks(text, PIECE_CHARS))
            yield (piece.lstrip("\n") if starts and separated else piece), starts
            text, starts = text[len(piece):], False
    if separated:
        text = text.strip("\n") if starts else text.rstrip("\n")
    if text or not separated:
        yield text, starts


def read_txt(path, text_field):
    with open(path, encoding="utf-8-sig") as file:
        yield from split_stories(iter(lambda: file.read(PIECE_CHARS), ""))


def read_csv(path, text_field):
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)  # spreadsheets of many countries write semicolons
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)  # else an open quote takes all rows after it
        for row in reader:
            if None in row or None in row.values():  # csv's name for cells that the header, or the row, lacks
                raise csv.Error(f"another number of cells in line {reader.line_num} than in its header")
            yield from record_pieces(path, row, text_field)


def read_json_records(path, text_field):
    """A .json file is an array of objects or, like .jsonl, one object per line."""
    with open(path, encoding="utf-8-sig") as file:
        is_array = file.read(1024).lstrip().startswith("[")
        file.seek(0)
        for record in json.load(file) if is_array else json_lines(file):
            yield from record_pieces(path, record, text_field)


def json_lines(file):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:  # which calls it line 1
                raise ValueError(f"line {number}: {error.msg}") from error


def read_parquet(path, text_field):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        columns = [text_field] if text_field in file.schema_arrow.names else None  # all, for the error to name
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                yield from record_pieces(path, record, text_field)


def record_pieces(path, record, text_field):
    """Yield (text, starts_story) for the text of one record, cut where it is long, with the line ends of read_txt."""
    record = record if isinstance(record, dict) else {}
    if not isinstance(record.get(text_field, 0), str | None):
        raise column_error(path, text_field, record)
    text = re.sub("\r\n?", "\n", record[text_field] or "")
    text.encode()  # ValueError for half of a surrogate pair, which JSON can spell
    for i, piece in enumerate(chunks(text, PIECE_CHARS)):
        yield piece, i == 0


def column_error(source, text_field, columns):
    names = ", ".join(columns) or "none"
    return UserError(f"{source} has no text column {text_field!r} (columns: {names}): choose one that all files have "
                     "with --text-field.")


READERS = {".txt": read_txt, ".json": read_json_records, ".jsonl": read_json_records, ".csv": read_csv,
           ".parquet": read_parquet}


def read_rows(files, text_field):
    """Yield (text, starts_story) for the stories of all files. UserError names the file that cannot be read."""
    for path in files:
        try:
            yield from READERS[path.suffix.lower()](path, text_field)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8, then rerun.") from None
        except csv.Error as error:
            raise UserError(f"{path} cannot be read ({error}): put texts that contain commas, line breaks or double "
                            'quotes in double quotes, each one inside doubled (""), then rerun.') from error
        except (ValueError, OSError) as error:  # includes the errors of json and pyarrow
            raise UserError(f"{path} cannot be read ({short_message(error)}): fix or remove it, then rerun.") from error


def write_table(path, files, text_field):
    """Read text files into one Arrow file: a row per story, several rows for a long one."""
    import pyarrow
    schema = pyarrow.schema([("text", pyarrow.string()), ("starts_story", pyarrow.bool_())])
    rows = iter(progress(read_rows(files, text_field), "reading"))
    with atomic_write(path) as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(rows, 100)):
            writer.write_batch(pyarrow.record_batch([*map(list, zip(*batch))], schema))


def local_files(path):
    """({split: files}, {why files are not read: files}) of a local file or folder. Hidden files are left out."""
    by_format = collections.defaultdict(list)
    names = [""] if path.is_file() else glob.glob("**", root_dir=path, recursive=True)
    for file in sorted(path / name for name in names):
        if not file.is_dir():
            by_format[READERS.get(file.suffix.lower())].append(file)
    others = by_format.pop(None, [])
    if len(by_format) != 1:
        counts = ", ".join(f"{len(files)} {files[0].suffix.lower()}" for files in by_format.values())
        problem = f"mixes formats ({counts})" if counts else "contains no text that can be read, or only in an archive"
        raise UserError(f"{path} {problem}: pass --dataset with a txt, json, jsonl, csv or parquet file, or a folder "
                        "of one of these.")
    files, = by_format.values()
    splits = group_by_split(files)
    used = used_splits(splits)
    return used, {"another format": others, "the test split": [] if "test" in used else splits.get("test", [])}


def group_by_split(files):
    """{split: files} where the layout names the split of every file: train.csv, train-00000-of-00002.parquet, train/...

    Else all are training text: a file called "my test.txt" is no split.
    """
    root, splits = Path(os.path.commonpath([file.parent for file in files])), {}
    for file in files:
        top, *below = file.relative_to(root).parts
        name = top if below else re.sub(r"-\d{5}-of-\d{5}.*", "", file.stem)
        splits.setdefault(name, []).append(file)
    are_splits = "train" in splits and len(splits) > 1 and splits.keys() <= {"train", "validation", "test"}
    return splits if are_splits else {"train": files}


def used_splits(splits):
    """The splits to use: train and then validation, else test; all where none is called train."""
    names = ("train", "validation" if "validation" in splits else "test") if "train" in splits else splits
    return {name: splits[name] for name in names if name in splits}


def local_rows(config, folder):
    """({split: Dataset}, metadata) of local files. They are read once, into an Arrow file per split in `folder`."""
    datasets = import_datasets()
    splits, not_read = local_files(Path(config.dataset))
    for split, files in splits.items():
        if not (folder / f"{split}.arrow").exists():
            write_table(folder / f"{split}.arrow", files, config.text_field)
    return ({split: datasets.Dataset.from_file(str(folder / f"{split}.arrow")) for split in splits},
            dict(files=sum(map(len, splits.values())),
                 not_read={reason: [*map(str, files)] for reason, files in not_read.items() if files}))


@functools.cache
def import_datasets():
    """The `datasets` library, set up so that no request to the Hub waits for long without a line that says so."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read at import; Xet retries silently for minutes
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are reported here, once
    for handler in logging.getLogger("huggingface_hub").handlers:  # says when it retries
        handler.setFormatter(logging.Formatter("%(message).200s"))  # the address of a download is a screenful
        handler.addFilter(lambda record: not re.search("unauthenticated requests|Repo card", record.getMessage()))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    session = huggingface_hub.get_session()
    if hasattr(session, "event_hooks"):  # the list of files would be requested without a time limit
        limit = dict.fromkeys(("connect", "read"), huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        session.event_hooks["request"].append(lambda request: request.extensions.update(timeout=limit))
    return datasets


def latest_commit(name):
    """The newest commit of a data set on the Hub. Without network it fails at once; a busy server is asked again."""
    import_datasets()
    import huggingface_hub
    other = "pass --dataset sample for the built-in corpus, or --dataset with a local file or folder"
    for wait in (2, 6, 18, None):
        try:
            info = huggingface_hub.HfApi().dataset_info(name, timeout=20)
            break
        except huggingface_hub.errors.RepositoryNotFoundError as error:
            raise UserError(f"there is no data set {name} on the Hugging Face Hub, or it needs a login (`hf auth "
                            f"login`): check the name, or {other}.") from error
        except Exception as error:  # the libraries underneath raise anything
            status = getattr(getattr(error, "response", None), "status_code", 0)
            busy = status == 429 or status >= 500
            if not (busy and wait):
                fix = ("rerun in a few minutes" if busy else "log in with `hf auth login`" if status in (401, 403) else
                       "check the network and rerun")
                raise UserError(f"the Hugging Face Hub cannot be reached for {name} ({hub_reason(error)}): {fix}, or "
                                f"{other}.") from error
        click.echo(f"The Hugging Face Hub answers {status}: asking again in {wait} s.", err=True)
        time.sleep(wait)
    if "/" not in name:  # `datasets` requires an owner
        raise UserError(f"the full name of {name} is {info.id}: pass --dataset {info.id}.")
    return info.sha


def hub_reason(error):
    """The server's own words in an error, which come after the number of the request."""
    return short_message(str(error).partition("\n\n")[2] or error)


def hub_rows(config, folder, commit):
    """({split: Dataset}, metadata) of a data set on the Hub. `datasets` keeps the download in its cache."""
    def stop(*_):  # KeyboardInterrupt would wait for the threads that download, up to a minute
        click.echo("\nStopped. Rerun the same command to resume.", err=True)
        os._exit(130)

    datasets = import_datasets()
    name, _, configuration = config.dataset.partition(":")
    previous = signal.signal(signal.SIGINT, stop)
    try:
        builder = datasets.load_dataset_builder(name, configuration or None, revision=commit)
        if builder.name == "text":  # datasets would make every line a story
            import huggingface_hub
            copy = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns="*.txt")
        else:
            splits = datasets.load_dataset(name, configuration or None, revision=commit)
    except Exception as error:  # the libraries underneath raise anything
        while error.__cause__ and not hasattr(error, "response"):  # down to the reason, or the server's own words
            error = error.__cause__
        if listed := re.search(r"(?s)config.*\['(.+?)'\]", str(error), re.I):
            names = listed[1].split("', '")
            raise UserError(f"{name} has the configurations {', '.join(names)}: choose one, such as --dataset "
                            f"{name}:{names[0]}.") from error
        fix = "rerun to resume, or pass --dataset sample for the built-in corpus"
        if "gated" in str(error):
            fix = f"accept its terms at https://huggingface.co/datasets/{name}, log in with `hf auth login`, then rerun"
        raise UserError(f"{config.dataset} could not be read from the Hugging Face Hub ({hub_reason(error)}): "
                        f"{fix}.") from error
    finally:
        signal.signal(signal.SIGINT, previous)
    if builder.name == "text":
        return local_rows(replace(config, dataset=copy), folder)
    field, columns = config.text_field, next(iter(splits.values())).features
    if "string" not in str(getattr(columns.get(field), "dtype", None)):  # a list has no dtype
        raise column_error(config.dataset, field, columns)
    used = used_splits(splits)
    unused = [split for split in splits if split not in used]
    return ({split: rows.select_columns([field]).rename_columns({field: "text"}) for split, rows in used.items()},
            dict(not_read={"other splits": unused} if unused else {}))


def sample_rows():
    """({split: Dataset}, metadata) of the built-in corpus."""
    from datasets import Dataset
    train, _ = zip(*draw_stories(TRAIN_STORIES, seed=0))
    val, nats = zip(*draw_stories(VAL_STORIES, seed=1))
    return ({"train": Dataset.from_dict({"text": train}), "validation": Dataset.from_dict({"text": val})},
            dict(val_nats=nats))


# -----------------------------------------------------------------------------
# Which stories, on which side

@dataclass
class Stories:
    """Some stories of a split: the numbers of their rows in order, and which of these rows start a story."""

    rows: object            # a datasets.Dataset with a column "text"
    row_bytes: np.ndarray   # of every row of it
    index: np.ndarray
    starts: np.ndarray      # bool, as long as index

    def __len__(self):
        return int(self.starts.sum())

    def select(self, chosen):
        """The stories for which the bool array `chosen` is True."""
        mask = chosen[np.cumsum(self.starts) - 1]
        return replace(self, index=self.index[mask], starts=self.starts[mask])

    def size(self):
        """[stories, bytes]"""
        return np.array([len(self), self.row_bytes[self.index].sum()])

    def story_bytes(self):
        return np.add.reduceat(self.row_bytes[self.index], np.flatnonzero(self.starts))

    def batches(self):
        """Yield (texts, starts) of about BATCH_BYTES each."""
        batch = np.cumsum(self.row_bytes[self.index]) // BATCH_BYTES
        borders = np.flatnonzero(np.diff(batch)) + 1
        for index, starts in zip(np.split(self.index, borders), np.split(self.starts, borders), strict=True):
            yield [text or "" for text in self.rows[index]["text"]], starts


def scan_stories(rows):
    """(the stories of a Dataset that have text, the hash of each, the size of all stories)."""
    starts = np.ones(len(rows), bool)
    if "starts_story" in rows.column_names:
        starts = rows.data["starts_story"].to_numpy()
    row_bytes, story = np.zeros(len(rows), int), -1
    hashes, has_text = np.zeros(starts.sum(), np.uint64), np.zeros(starts.sum(), bool)
    texts = (text for batch in rows.iter(batch_size=100) for text in batch["text"])
    for row, text in enumerate(progress(texts, "counting", total=len(rows))):
        data = (text or "").encode()
        if starts[row]:
            story, hasher = story + 1, hashlib.blake2b(digest_size=8)
        hasher.update(data)
        hashes[story] = int.from_bytes(hasher.digest(), "big")
        has_text[story] |= bool(text) and not text.isspace()
        row_bytes[row] = len(data)
    stories = Stories(rows, row_bytes, np.arange(len(rows)), starts)
    return stories.select(has_text), hashes[has_text], stories.size()


def train_val_split(splits, name):
    """(training stories, validation stories, size of all that was read, {row of the report: size}).

    Without a split of its own, validation is held out from the training text. A training story that is also in it is
    left out. The sizes of both sides and of the rows add up to what was read.
    """
    train_name, *val_name = splits
    if train_name != "train" and val_name:
        raise UserError(f"{name} has no split named train, but {', '.join(splits)}: pass another --dataset.")
    train, hashes, read = scan_stories(splits[train_name])
    left_out = {"skipped: empty": read - train.size()}
    if val_name:
        val, val_hashes, val_read = scan_stories(splits[val_name[0]])
        read += val_read
        left_out["skipped: empty"] += val_read - val.size()
        keep = ~np.isin(hashes, val_hashes)
        left_out["skipped: in validation"] = train.select(~keep).size()
    else:
        held_out, limit = held_out_stories(train.story_bytes(), hashes)
        is_val = np.isin(np.arange(len(train)), held_out)
        keep = ~np.isin(hashes, hashes[held_out])
        left_out["skipped: in validation"] = train.select(~keep & ~is_val).size()
        if train.story_bytes()[held_out].sum() > limit:  # a single long story
            number = int(held_out[0])
            train = cut_story(train, number, max(1, int(limit)))
            is_val, keep = np.insert(is_val, number, False), np.insert(keep, number, True)
            left_out["counted twice (cut)"] = np.array([-1, 0])
        val = train.select(is_val)
    train = train.select(keep)
    for side, stories in ("training", train), ("validation", val):
        if not stories.size()[1]:
            raise UserError(f"{name} contains too little text for {side}: add some, or pass --dataset sample.")
    return train, val, read, left_out


def held_out_stories(story_bytes, hashes):
    """(numbers of the stories to hold out, the limit on their bytes): those with the lowest hashes, 1% of all texts.

    The limit is about 5% of the text. Where even the first story exceeds it, only that one is returned.
    """
    limit = min(0.05 * story_bytes.sum(), MAX_VAL_BYTES)
    _, first = np.unique(hashes, return_index=True)  # sorted by hash, equal texts once
    candidates = first[:max(1, np.searchsorted(hashes[first], np.uint64(2**64 // 100)))]
    count = np.searchsorted(np.cumsum(story_bytes[candidates]), limit, side="right")
    return candidates[:min(max(1, count), MAX_VAL_STORIES)], limit


def cut_story(stories, number, limit):
    """All stories, one of them cut in two: its last `limit` bytes, or some more, from the end of a paragraph on."""
    datasets = import_datasets()
    sizes = stories.row_bytes[stories.index]
    row = np.append(np.flatnonzero(stories.starts), len(sizes))[number + 1] - 1
    tail_size = limit  # of the row to cut: what the rows after it lack
    while tail_size > sizes[row]:
        tail_size -= sizes[row]
        row -= 1
    data = stories.rows[int(stories.index[row])]["text"].encode()
    cut = latest = len(data) - tail_size
    for mark in (b" ", b"\n", b"\n\n"):
        found = data.rfind(mark, max(0, latest - limit), latest)
        cut = found + len(mark) if found >= 0 else cut
    while data[cut] & 0xC0 == 0x80:  # not inside a character
        cut -= 1
    halves = datasets.Dataset.from_dict({"text": [data[:cut].decode(), data[cut:].decode()]})
    rows = datasets.concatenate_datasets([stories.rows.select_columns("text"), halves])
    index = np.insert(stories.index, row + 1, len(rows) - 1)
    index[row] = len(rows) - 2
    return Stories(rows, np.append(stories.row_bytes, [cut, len(data) - cut]), index,
                   np.insert(stories.starts, row + 1, True))


def is_sampled(item, rate, seed):
    """Whether `item` (a number or a word) is in a fixed random choice of a fraction `rate`."""
    digest = hashlib.blake2b(f"{seed} {item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


def select_parts(train, config):
    """{shard name: Stories}: the first --num-files of PARTS equal parts, and of these the fraction --sample-rate."""
    part = np.arange(len(train)) * PARTS // len(train)
    keep = np.array([is_sampled(i, config.sample_rate, config.seed) for i in range(len(train))])
    keep &= part < config.num_files
    parts = {f"train_{n:03d}.bin": train.select(keep & (part == n)) for n in np.unique(part[keep])}
    if not parts:
        raise UserError(f"--num-files {config.num_files} and --sample-rate {config.sample_rate:g} keep none of the "
                        f"{len(train):,} training stories: increase them.")
    return parts


# -----------------------------------------------------------------------------
# 2. Vocabulary

def sampled_text(parts, seed):
    """Yield a fixed random choice of the training stories, about VOCABULARY_BYTES of them, the long ones in chunks."""
    rate = VOCABULARY_BYTES / sum(int(stories.size()[1]) for stories in parts)
    texts = (chunk for stories in parts for batch, _ in stories.batches() for text in batch for chunk in chunks(text))
    return (text for i, text in enumerate(texts) if is_sampled(i, rate, f"vocabulary {seed}"))


def train_vocabulary(parts, vocab_size, seed):
    """A Tokenizer trained on sampled_text. UserError if the size does not fit the text."""
    texts = list(sampled_text(parts, seed))
    # The rarest characters are spelled in bytes. Text with thousands of different ones (Chinese) needs more of that.
    for coverage in (0.9999, 0.98):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                character_coverage=coverage, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True, max_sentence_length=65536,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3,
                num_threads=16)  # it is stored in the model: a machine's own number would give each another hash
            return Tokenizer(model.getvalue())
        except RuntimeError as error:
            message = str(error)
        if "required_chars" not in message:
            break
    if most := re.search(r"value <= (\d+)", message):
        raise UserError(f"the text is too small for a vocabulary of {vocab_size}: pass --vocab-size {most[1]} or less.")
    if least := re.search(r"\d+ vs (\d+)", message):
        raise UserError(f"the text has too many different characters for a vocabulary of {vocab_size}: pass "
                        f"--vocab-size {least[1]} or more.")
    raise UserError(f"SentencePiece cannot train on this text ({message[-120:]}): pass --dataset with more text.")


def given_tokenizer(config):
    """The Tokenizer of --tokenizer, None without it. UserError unless preprocess.py trained it."""
    if not config.tokenizer:
        return None
    path, probe = Path(config.tokenizer), " a  b\n\n12\r\n\t\u00e9\U0001f600 "
    if not path.is_file():
        raise UserError(f"there is no file {path} for --tokenizer: pass the tok*.model of a prepared corpus.")
    tokenizer = Tokenizer(path.read_bytes(), path)
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        raise UserError(f"--tokenizer {path} does not reproduce every text: pass the tok*.model of a prepared corpus.")
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(f"--vocab-size {config.vocab_size} contradicts --tokenizer {path}, which has "
                        f"{tokenizer.vocab_size} tokens: omit --vocab-size.")
    return tokenizer


# -----------------------------------------------------------------------------
# 3. Word prompts

def content_words(parts, seed, most):
    """{"words", "held_out_words"}: the content words of the training text, of which a fixed fifth serves to judge.

    A content word has three letters or more. It is in 0.08% to `most` of the stories in lower case and, unlike a name,
    in at most a fifth as many with a capital.
    """
    counts = collections.Counter()
    for total, text in enumerate(sampled_text(parts, seed), 1):
        counts.update(set(re.findall(r"[^\W\d_]{3,}+(?!['\u2019])", text)))  # possessive: nothing of wouldn't
    words = sorted(word for word, count in counts.items() if word.islower()
                   and 0.0008 * total <= count <= most * total and counts[word.capitalize()] <= count / 5)
    held_out = [word for word in words if is_sampled(word, 0.2, f"held-out words {seed}")]
    if len(words) < len(held_out) + 3:  # reinforce.py asks for three of the others
        raise UserError(f"the stories differ in too few words ({', '.join(words) or 'none'}) for word prompts: omit "
                        "--word-prompts, or pass --dataset with more stories.")
    return dict(words=[word for word in words if word not in held_out], held_out_words=held_out)


def with_word_prompts(name, stories, words, config, fits):
    """Yield (texts, starts) of --copies of the stories of shard `name`. A fraction --word-prompts begin with a prompt.

    It names three of `words` that the story contains; one that has fewer, or that would no longer fit, gets none.
    """
    number = itertools.count()
    for texts, starts in itertools.chain.from_iterable(stories.batches() for _ in range(config.copies)):
        for i in np.flatnonzero(starts):
            rng = random.Random(f"{config.seed} {name} {next(number)}")
            found = [*dict.fromkeys(word for word in WORDS.findall(texts[i]) if word in words)]
            if rng.random() < config.word_prompts and len(found) >= 3:
                text = word_prompt(rng.sample(found, 3)) + texts[i]
                texts[i] = text if fits(text) else texts[i]
        yield texts, starts


# -----------------------------------------------------------------------------
# 4. Token ids

def write_shard(path, batches, tokenizer, threads):
    """Write the ids of the stories in `batches` as uint16, each story between bos and eos."""
    with atomic_write(path) as file:
        separator = [tokenizer.bos_id]
        for texts, starts in batches:
            ids = []
            for text_ids, is_start in zip(tokenizer.encode_batch(texts, threads), starts, strict=True):
                if is_start:
                    ids += separator
                    separator = [tokenizer.eos_id, tokenizer.bos_id]
                ids += text_ids
            file.write(np.array(ids, dtype="<u2"))
        file.write(np.array([tokenizer.eos_id], dtype="<u2"))


def describe_shard(path, tokenizer):
    """The entry of a shard in meta.json."""
    ids = np.memmap(path, dtype="<u2", mode="r")
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    return dict(file=path.name, tokens=len(ids), bytes=int(counts @ tokenizer.byte_lengths()),
                stories=int(counts[tokenizer.bos_id]), sha256=hashlib.sha256(ids).hexdigest())


# -----------------------------------------------------------------------------
# The folder

def arguments_of(config, tokenizer):
    """What decides the prepared files; compared between runs."""
    path, values = Path(config.dataset), asdict(config)
    del values["data_dir"]
    values |= dict(tokenizer_sha256=tokenizer and tokenizer.sha256, files_sha256=None)
    values["vocab_size"] = (tokenizer or config).vocab_size or (512 if config.dataset == "sample" else 4096)
    if config.dataset != "sample" and path.exists():
        digest = hashlib.sha256()
        for file in sorted(sum(local_files(path)[0].values(), [])):
            digest.update(f"{file.relative_to(path)}\n".encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        values["files_sha256"] = digest.hexdigest()
    return values


def changes(existing, arguments):
    """The differences between two arguments_of, in words; '' if there is none."""
    existing = asdict(CorpusConfig()) | existing  # those of an earlier version have fewer settings
    differ = [name for name in arguments if existing.get(name) != arguments[name]]
    words = [f"{flag(name)} {existing.get(name)} (now {arguments[name]})" for name in differ if "sha256" not in name]
    if differ and not words:
        return f"other contents in the files of {'--dataset' if 'files_sha256' in differ else '--tokenizer'}"
    return ", ".join(words)


def open_partial(config, arguments, overwrite, commit):
    """(DATA-DIR/partial, the commit on the Hub to read). `commit`: that of a corpus to repair, None for the newest."""
    folder = Path(config.data_dir) / "partial"
    existing = read_json(folder / "arguments.json") or {}
    if changed := changes(existing, arguments):
        if any(folder.glob("*.bin")) and not overwrite:
            raise UserError(f"{folder} contains an interrupted preparation with {changed}: rerun its command to resume "
                            "it, or pass --overwrite or another --data-dir.")
        if folder.exists():
            shutil.rmtree(folder)  # must succeed: a shard left here would count as finished
        if config.dataset != "sample" and not arguments["files_sha256"]:
            commit = commit or latest_commit(config.dataset.partition(":")[0])
        existing = arguments | dict(commit=commit)
        write_json(folder / "arguments.json", existing)
    return folder, existing["commit"]


def publish(folder, data_dir, meta):
    """Move the finished files into place, meta.json last. Can be interrupted and repeated at any time."""
    names = [entry["file"] for entry in (meta["tokenizer"], *meta["train"], *meta["val"])]
    (data_dir / "meta.json").unlink(missing_ok=True)
    for path in data_dir.iterdir():
        if re.fullmatch(r"(train|val)_\d{3}\.bin|tok\d+\.model", path.name) and path.name not in names:
            path.unlink()
    for name in names:
        if (folder / name).exists():
            replace_file(folder / name, data_dir / name)
    write_json(data_dir / "meta.json", meta)
    shutil.rmtree(folder)


def prepare(config, threads, overwrite):
    """Prepare a corpus; what an interrupted run with the same arguments has finished is not done again."""
    data_dir, given = Path(config.data_dir), given_tokenizer(config)
    is_sample, path = config.dataset == "sample", Path(config.dataset)
    if is_sample and path.exists():
        click.echo("sample is the built-in corpus; type ./sample for the folder of that name.")
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", config.dataset)
    if not (is_sample or path.exists() or hub_name and path.suffix.lower() not in READERS):
        raise UserError(f"{path} does not exist: pass --dataset with a file, a folder, a name on the Hugging Face Hub, "
                        "or sample.")
    if not is_sample and path.is_dir() and data_dir.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--data-dir {data_dir} is inside --dataset {path}: pass another --data-dir.")
    arguments, meta, commit = arguments_of(config, given), read_json(data_dir / "meta.json"), None
    if meta and not overwrite:
        if changed := changes(meta.get("arguments", {}), arguments):
            raise UserError(f"{data_dir} was prepared with {changed}: pass --overwrite or another --data-dir.")
        try:
            Corpus(data_dir)
            click.echo(f"{data_dir} is up to date.")
            return report(data_dir, meta)
        except UserError:
            click.echo(f"The corpus in {data_dir} is damaged: preparing it again.")
            commit = meta.get("commit")

    folder, commit = open_partial(config, arguments, overwrite, commit)
    splits, metadata = (sample_rows() if is_sample else local_rows(config, folder) if path.exists()
                        else hub_rows(config, folder, commit))
    train, val, read, left_out = train_val_split(splits, config.dataset)
    parts = select_parts(train, config)
    selected = sum(stories.size() for stories in parts.values())
    left_out["skipped: not selected"] = train.size() - selected
    most = 0.15 if is_sample else 0.06  # the grammar has few words, so each is in many stories
    words = content_words(parts.values(), config.seed, most) if config.word_prompts else {}

    model_path = folder / f"tok{arguments['vocab_size']}.model"
    if not model_path.exists():
        tokenizer = given or train_vocabulary(parts.values(), arguments["vocab_size"], config.seed)
        with atomic_write(model_path) as file:
            file.write(tokenizer.model_bytes)
    tokenizer = Tokenizer(model_path.read_bytes(), model_path)

    def fits(text):  # with bos and eos: the demo preset's windows start at stories
        return not is_sample or len(tokenizer.encode(text)) < PRESETS["demo"]["block_size"]

    all_words = frozenset().union(*words.values())
    for name, stories in progress({"val_000.bin": val, **parts}.items(), "encoding", " shards"):
        if not (folder / name).exists():
            batches = (with_word_prompts(name, stories, all_words, config, fits) if words and name in parts
                       else stories.batches())
            write_shard(folder / name, batches, tokenizer, threads)

    shards = [describe_shard(folder / name, tokenizer) for name in parts]
    if words:
        written = np.sum([[shard["stories"], shard["bytes"]] for shard in shards], axis=0)
        left_out["less: further copies"] = (1 - config.copies) * selected
        left_out["less: word prompts"] = config.copies * selected - written
    meta = dict(format=2, source=config.dataset, arguments=arguments, commit=commit, read=read.tolist(), **metadata,
                left_out={row: size.tolist() for row, size in left_out.items() if size.any()},
                vocab_size=tokenizer.vocab_size, tokenizer=dict(file=model_path.name, sha256=tokenizer.sha256),
                val=[describe_shard(folder / "val_000.bin", tokenizer)], train=shards, **words)
    splits = train = val = parts = stories = batches = None
    gc.collect()  # Windows cannot move or delete a file that is still memory-mapped
    publish(folder, data_dir, meta)
    report(data_dir, meta)


def report(data_dir, meta):
    """Print the table of a prepared corpus: what was read, and the indented rows that add up to it."""
    files, read, left_out = meta.get("files"), meta.get("read", []), meta["left_out"]
    sides = {title: [sum(shard[key] for shard in meta[split]) for key in ("stories", "bytes", "tokens")]
             for title, split in (("training", "train"), ("validation", "val"))}
    rows = {f"read: {files:,} file{'s' * (files > 1)}" if files else "read": read}
    rows |= {f"  {title}": numbers for title, numbers in (sides | left_out).items()}
    click.echo(f"\n{'':24} {'stories':>9} {'bytes of text':>13} {'tokens':>11}")
    for title, numbers in rows.items():
        click.echo(f"{title:24}" + "".join(f" {number:>{width},}" for number, width in zip(numbers, (9, 13, 11))))
    for reason, paths in meta.get("not_read", {}).items():
        names = ", ".join(Path(path).name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        click.echo(wrapped(f"not read ({reason}): {len(paths):,} ({names})", sys.stdout))
    stories, size, tokens = sides["training"]
    click.echo(f"bytes per token: {size / (tokens - 2 * stories):.2f}")
    click.echo(f"vocabulary: {meta['vocab_size']:,} tokens, {data_dir / meta['tokenizer']['file']}")
    if files and (fraction := sides["validation"][1] / read[1]) > 0.1:
        click.echo(wrapped(f"Warning: validation is {fraction:.0%} of the text, and a tenth is enough: move text from "
                           "it to training or add text, then rerun with --overwrite.", sys.stdout))


# -----------------------------------------------------------------------------
# The command

@click.group(context_settings=CONTEXT_SETTINGS)
def main():
    """Prepare a corpus for train.py."""


@main.command("prepare-dataset", cls=Command)
@setting_options(CorpusConfig)
@click.option("--workers", type=click.IntRange(1, 1024), default=os.cpu_count(), metavar="N",
              help="encoding threads  [default: all cores]")
@click.option("--overwrite", is_flag=True, help="replace a corpus that was prepared with other arguments")
def prepare_dataset(workers, overwrite, **values):
    """Prepare a corpus: read or download the stories, train a vocabulary, write token ids.

    If interrupted, rerun the same command to resume.
    """
    config = CorpusConfig(**(given := only_fields(CorpusConfig, values)))
    refuse_without_effect(given, {"copies": (not config.word_prompts, "without --word-prompts: add --word-prompts 0.8, "
                                             "or omit it.")})
    try:
        with folder_lock(config.data_dir):
            prepare(config, workers, overwrite)
    except KeyboardInterrupt:
        click.echo("\nStopped. Rerun the same command to resume.", err=True)
        sys.exit(130)


# -----------------------------------------------------------------------------
# The built-in corpus: a grammar of stories in which every choice has a known probability
#
# Every choice is always made and depends on at most one earlier choice. So the probability of a story is a product, and
# the lowest loss that any model can reach on it, its surprisal -ln p, is known exactly.

TRAIN_STORIES, VAL_STORIES = 30_000, 1_000

MISHAPS = {  # of things that roll, fly, float and sink
    "ball 9 | bead 5 | top 4":
        "fell in a hole 5 | rolled down a hill 4 | got stuck in the mud 3 | rolled under a log 2",
    "kite 9 | hat 6 | cap 3": "flew up a tree 5 | flew over the lake 3 | got stuck in the mud 2",
    "boat 8 | duck 5 | cup 3": "went out on the lake 5 | got stuck in the mud 3 | fell in a hole 2",
    "key 6 | bell 5 | ring 4": "fell in the grass 5 | fell in a hole 4 | got stuck in the mud 2",
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


def parse_weights(line):
    """The probabilities in a line of values and weights: 'red 3 | blue 1' is {'red': 0.75, 'blue': 0.25}."""
    pairs = [entry.strip().rsplit(" ", 1) for entry in line.split("|")]
    total = sum(int(weight) for _, weight in pairs)
    return {value: int(weight) / total for value, weight in pairs}


STORY = """{opening} {toy} {outing} {meeting}

{trouble} {sorrow} {comfort} {rescue}

{thanks} {treat} {ending}"""

# {name: line, or (the choice that it depends on, {value of that choice: line})}
CHOICES = {
    "opening": "Once upon a time, there was {a trait} {child} named {hero}. 5 |"
               "Once there was {a trait} {child} named {hero}. 4 |"
               "There was {a trait} {child} named {hero}. 3",
    "trait": "little 6 | kind 5 | happy 4 | good 3 | shy 3 | brave 2 | funny 1 | silly 1",
    "child": "girl 1 | boy 1",
    "hero": ("child", {"girl": "Lily 7 | Mia 6 | Sue 5 | Ann 5 | Kim 4 | Eve 3 | Nan 2 | Ava 1",
                       "boy": "Tim 7 | Ben 6 | Tom 5 | Sam 5 | Dan 4 | Bob 3 | Ted 2 | Leo 1"}),
    "toy": "{He} had {a colour} {thing}. 5 | {He} loved {his} {colour} {thing}. 4 | {He} found {a colour} {thing}. 3",
    "colour": "red 7 | blue 7 | green 5 | pink 5 | white 4 | black 3 | gray 3 | gold 2 | brown 2 | tan 1",
    "thing": " | ".join(MISHAPS),
    "outing": "One {weather} {time}, {he} took it to the {place}. 5 |"
              "One {weather} {time}, {he} went to the {place}. 4",
    "weather": "sunny 8 | warm 6 | windy 5 | cold 4 | hot 3 | rainy 2 | foggy 1",
    "time": "day 5 | morning 4 | night 3",
    "place": "park 7 | farm 6 | beach 5 | forest 5 | river 4 | shop 3 | zoo 3 | hill 3 | town 2 | garden 1",
    "meeting": "There {he} met {a animal} named {friend}. 5 | There {he} saw {a animal} named {friend}. 4",
    "animal": "cat 8 | dog 8 | bird 6 | fox 5 | pig 4 | hen 3 | bear 3 | frog 3 | cow 2 | mouse 2 | owl 1 | ant 1",
    "friend": "Pip 7 | Coco 6 | Momo 5 | Dot 5 | Bo 4 | Lulu 3 | Kit 3 | Pom 2 | Mo 1",
    "trouble": "But the {thing} {mishap}. 5 | Then the {thing} {mishap}. 4 | Oh no! The {thing} {mishap}. 3",
    "mishap": ("thing", {thing: line for things, line in MISHAPS.items() for thing in parse_weights(things)}),
    "sorrow": "{hero} was {feeling} and {reaction}. 5 | {hero} felt {feeling} and {reaction}. 4",
    "feeling": "sad 8 | mad 5 | upset 4 | scared 4 | lost 3 | bad 2",
    "reaction": "cried 6 | sat down 5 | ran home 3 | looked up 2 | hid 2 | stood still 1",
    "comfort": '"{promise}," said {friend}. 5 | {friend} said, "{promise}." 4',
    "promise": "I can help 6 | Do not cry 5 | Let me try 4 | I will get it 3 | I saw it 2 | Be brave 1",
    "rescue": "The {animal} {fix} and got the {colour} {thing}. 5 |"
              "The {animal} {fix} and found the {colour} {thing}. 4",
    "fix": ("mishap", {mishap: FIXES[mishap.split()[-1]]
                       for line in MISHAPS.values() for mishap in parse_weights(line)}),
    "thanks": '"{praise}, {friend}!" said {hero}. 5 | {hero} said, "{praise}, {friend}!" 4',
    "praise": "Thank you 6 | You are kind 4 | You are good 3 | Well done 3 | You are brave 2",
    "treat": "They had {food}. 5 | They ate {food}. 4 | They shared {food}. 3",
    "food": "cake 6 | soup 5 | an apple 4 | a pie 4 | nuts 3 | a pear 2 | bread 2 | eggs 1",
    "ending": "{hero} and {friend} {bond}. 5 | Then {hero} and {friend} {bond}. 4",
    "bond": "were best friends 6 | played all day 5 | were so happy 4 | sang and sang 3 | went home 2",
}


def probability_tables(choice):
    """(the choice that it depends on or None, {value of that choice: probabilities})"""
    parent, lines = choice if isinstance(choice, tuple) else (None, {None: choice})
    return parent, {value: parse_weights(line) for value, line in lines.items()}


GRAMMAR = {name: probability_tables(choice) for name, choice in CHOICES.items()}
PRONOUNS = {"girl": {"He": "She", "he": "she", "his": "her"}, "boy": {"He": "He", "he": "he", "his": "his"}}
SLOT = re.compile(r"\{(a )?(\w+)\}")


def with_article(value):
    return ("an " if value[0] in "aeiou" else "a ") + value


def render(choices):
    """The story that a dict {name: value} of choices makes."""
    def fill(slot):
        article, name = slot.groups()
        value = PRONOUNS[choices["child"]].get(name) or SLOT.sub(fill, choices[name])
        return with_article(value) if article else value
    return SLOT.sub(fill, STORY)


def draw_stories(count, seed):
    """Yield `count` stories, each with its surprisal in nats; always the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        choices, nats = {}, 0.0
        for name, (parent, tables) in GRAMMAR.items():
            table = tables[choices.get(parent)]
            choices[name], = rng.choices(list(table), table.values())
            nats -= math.log(table[choices[name]])
        yield render(choices), nats


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
