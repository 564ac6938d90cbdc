import builtins
import collections
import contextlib
import csv
import datetime
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import grammar
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import preprocess
from config import PRESETS, CorpusConfig, UserError, atomic_write, folder_lock
from data import Corpus

WORDS = "the cat sat on a mat café naïve жила была кошка и она любила ёжика 你好 😀 dogs ran far away home".split()
SMALL = ["--vocab-size", 330]


def tales(count, seed=0, words=WORDS):
    """`count` different short texts with letters of one, two, three and four bytes."""
    rng = random.Random(seed)
    return [f"Tale {i} of {seed}. " + " ".join(rng.choices(words, k=rng.randint(10, 30))) + ".\n\nEnd."
            for i in range(count)]


def prepare(dataset, data_dir, *options, code=0):
    """The output of the command in this process. It must end with `code`, and never in a traceback."""
    arguments = ["prepare-dataset", "--dataset", dataset, "--data-dir", data_dir, *options]
    result = CliRunner().invoke(preprocess.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments):
    """The one error line that the command ends with."""
    line, = re.findall(r"^Error: .*", prepare(*arguments, code=1), re.MULTILINE)
    return line


def stories(data_dir):
    """(training stories, validation stories) that the shards give back; meta.json must count them rightly."""
    corpus = Corpus(data_dir)

    def read(split):
        for shard, entry in zip(getattr(corpus, split).shards, corpus.meta[split], strict=True):
            starts, ends = np.flatnonzero(shard == 1), np.flatnonzero(shard == 2)  # bos, eos
            assert starts[0] == 0 and ends[-1] == len(shard) - 1 and np.array_equal(starts[1:], ends[:-1] + 1)
            texts = [corpus.tokenizer.decode(shard[a:b]) for a, b in zip(starts, ends, strict=True)]
            assert entry["stories"] == len(texts) and entry["tokens"] == len(shard)
            assert entry["bytes"] == sum(len(text.encode()) for text in texts)
            yield from texts
    return list(read("train")), list(read("val"))


def table(data_dir):
    """{row: [stories, bytes]} of the table that the command prints for a corpus."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        preprocess.report(data_dir, json.loads((data_dir / "meta.json").read_text(encoding="utf-8")))
    header, *lines = printed.getvalue().strip("\n").split("\n")
    rows = list(itertools.takewhile(lambda line: line.startswith(("read", "  ")), lines))
    assert header.split() == ["stories", "bytes", "of", "text", "tokens"] and max(map(len, [header, *rows])) <= 60
    return {row[:24].strip(): [int(number.replace(",", "")) for number in row[24:].split()[:2]] for row in rows}


def accounted(data_dir, texts):
    """(training stories, validation stories) of a corpus that was made of `texts` (None: an empty row).

    The table says that they all were read, and its other rows add up to them. No text is on both sides.
    """
    train, val = stories(data_dir)
    read, *sides = [[len(side), sum(len((text or "").encode()) for text in side)] for side in (texts, train, val)]
    (title, first), *rows = table(data_dir).items()
    assert title.startswith("read") and first == read and [size for _, size in rows[:2]] == sides
    assert np.sum([size for _, size in rows], axis=0).tolist() == read and all(any(size) for _, size in rows)
    assert not set(train) & set(val)
    return train, val


def snapshot(folder):
    """{name: bytes} of the files in a folder that training reads."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}, ensure_ascii=False) + "\n"
                            for i, text in enumerate(texts)), encoding="utf-8")
    return path


def write_txt(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def few_parts(monkeypatch):
    """Three shards instead of fifty, where their number does not matter: ten times as fast."""
    monkeypatch.setattr(preprocess, "PARTS", 3)


@pytest.fixture
def stopped(monkeypatch):
    """A function that runs the command up to the moment when everything but moving the files is done."""
    def stop(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "publish", mock.Mock(side_effect=KeyboardInterrupt))
            assert "Rerun the same command to resume." in prepare(*arguments, code=130)
    return stop


TALES = tales(600)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "tales.jsonl", TALES)


@pytest.fixture(scope="session")
def master(tmp_path_factory, source):
    """All of the tales, prepared in the fifty shards of the default."""
    folder = tmp_path_factory.mktemp("prepared") / "master"
    prepare(source, folder, "--vocab-size", 400)
    return folder


@pytest.fixture
def prepared(master, tmp_path):
    """A prepared corpus that a test may damage."""
    return shutil.copytree(master, tmp_path / "data")


# -----------------------------------------------------------------------------
# The built-in corpus

@pytest.fixture(scope="module")
def drawn():
    """[(story, its surprisal)]."""
    return list(preprocess.draw_stories(2000, seed=5))


@pytest.fixture(scope="module")
def parsed(drawn):
    """[choices] of the drawn stories. Each has only one derivation."""
    found = [list(grammar.derivations(story)) for story, _ in drawn]
    assert {len(derivations) for derivations in found} == {1}
    return [derivations[0] for derivations in found]


def test_a_story_gives_back_the_choices_that_made_it_and_their_probability(drawn, parsed):
    assert [preprocess.render(choices) for choices in parsed] == [story for story, _ in drawn]
    assert [grammar.story_nats(story) for story, _ in drawn[:300]] == pytest.approx([nats for _, nats in drawn[:300]])


def test_every_value_of_every_choice_can_be_read_back():
    rng = random.Random(1)
    for name, (parent, tables) in preprocess.GRAMMAR.items():
        for parent_value, table in tables.items():
            for value in table:
                wanted, choices = {parent: parent_value, name: value}, {}
                while any(choices.get(key) != wanted[key] for key in wanted if key):
                    choices = {}
                    for other, (given_by, options) in preprocess.GRAMMAR.items():
                        possible = options[choices.get(given_by)]
                        choices[other] = wanted.get(other) if wanted.get(other) in possible else rng.choice([*possible])
                assert grammar.parse(preprocess.render(choices)) == choices


def test_choices_come_as_often_as_the_grammar_says(parsed):
    """Chi-square of each table: its statistic has mean df and variance 2 df; six sigma would be a wrong table."""
    for name, (parent, tables) in preprocess.GRAMMAR.items():
        for value, table in tables.items():
            values = [choices[name] for choices in parsed if parent is None or choices[parent] == value]
            counts, df = collections.Counter(values), len(table) - 1
            assert set(counts) <= set(table)
            if df and len(values) * min(table.values()) >= 5:
                chi = sum((counts[v] - len(values) * p) ** 2 / (len(values) * p) for v, p in table.items())
                assert chi < df + 6 * math.sqrt(2 * df), (name, value)


def test_the_mean_surprisal_of_stories_is_the_entropy(drawn):
    nats = [nats for _, nats in drawn]
    assert abs(np.mean(nats) - grammar.entropy()) < 4 * np.std(nats) / math.sqrt(len(nats))
    assert 35 < grammar.entropy() < 55


def test_what_was_chosen_early_comes_back_later(drawn, parsed):
    for (story, _), choices in zip(drawn, parsed, strict=True):
        last = re.findall(r"\w+", story.split("\n\n")[-1])
        assert last.count(choices["hero"]) == last.count(choices["friend"]) == 2
        assert story.count(f"{choices['colour']} {choices['thing']}") == 2


def test_a_text_that_is_almost_a_story_is_none(drawn, parsed):
    for (story, _), choices in zip(drawn[:50], parsed):
        head, hero, tail = story.rpartition(choices["hero"])
        other = "Lily" if hero != "Lily" else "Mia"
        for wrong in (head + other + tail, story[:-1], story + " ", story.replace("a ", "an ", 1), ""):
            with pytest.raises(ValueError):
                grammar.parse(wrong)


def test_articles_fit_the_words_that_follow(drawn):
    words = [pair for story, _ in drawn for pair in itertools.pairwise(story.split())]
    after = {article: {next_word[0] for word, next_word in words if word == article} for article in ("a", "an")}
    assert after["an"] and after["an"] <= set("aeiou") and after["a"] and not after["a"] & set("aeiou")


def test_stories_repeat_for_a_seed_and_differ_between_seeds(drawn):
    assert list(preprocess.draw_stories(50, seed=5)) == drawn[:50]
    assert not {story for story, _ in preprocess.draw_stories(50, seed=6)} & {story for story, _ in drawn}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The built-in corpus, made smaller."""
    folder = tmp_path_factory.mktemp("sample") / "demo"
    with mock.patch.multiple(preprocess, TRAIN_STORIES=500, VAL_STORIES=200, PARTS=3):
        prepare("sample", folder)
    return folder


def test_the_built_in_corpus_stores_the_exact_surprisal_of_each_validation_story(sample):
    train, val = stories(sample)
    meta = json.loads((sample / "meta.json").read_text(encoding="utf-8"))
    assert len(train) == 500 and len(val) == 200 and not set(train) & set(val) and meta["source"] == "sample"
    assert meta["val_nats"] == pytest.approx([grammar.story_nats(story) for story in val], rel=1e-12)


def test_stories_fit_the_context_of_the_demo_model_and_a_bigram_model_stays_far_above_their_floor(sample, drawn):
    tokenizer = Corpus(sample).tokenizer
    assert tokenizer.vocab_size == 512
    ids = [np.array([1, *tokenizer.encode(story), 2]) for story, _ in drawn]
    assert max(map(len, ids)) <= 160
    pairs = np.concatenate([story[:-1] * 512 + story[1:] for story in ids])
    counts = np.bincount(pairs, minlength=512 * 512).reshape(512, 512)
    best = counts / np.maximum(1, counts.sum(1, keepdims=True))  # of all bigram models, on these very stories
    assert -np.log(best.ravel()[pairs]).sum() > 3 * sum(nats for _, nats in drawn)


# -----------------------------------------------------------------------------
# Files: every story comes back, byte for byte

AWKWARD = ["null", "None", "NA", "nan", "True", "00012", "12345678901234567890", "1e5", "2024-01-01", "#", "[", "'q'",
           'He said: "Come, and\nsee", and went; so\tdid I.', "  two  spaces  ", "e\u0301", "<s></s><unk><0x41>",
           "a\u2028b\x0cc", "one\n\n\n\nfour", ", ,", "\\n", "%s {0}"]
LINE_ENDS = ["\nfirst", "last\n"]  # a txt file has them around its separators too
STORIES = tales(40) + AWKWARD


def as_files(folder, texts):
    """A text a file, in folders below folders, as an editor on Windows and one elsewhere save them."""
    for i, text in enumerate(texts):
        path = folder / ["", "sub", "sub/below", "other"][i % 4] / f"{i:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8-sig" if i % 2 else "utf-8", newline="\r\n" if i % 3 else "\n") as file:
            file.write(text)


def as_separated_text(path, texts):
    write_txt(path, texts)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\n")


def as_json_array(path, texts):
    path.write_text(json.dumps([dict(id=i, text=text) for i, text in enumerate(texts)], indent=1), encoding="utf-8-sig")


def as_lines_of_json(path, texts):
    path.write_text("\ufeff\n" + "\n\n".join(json.dumps(dict(text=text, n=[1])) for text in texts), encoding="utf-8")


def as_csv(path, texts, delimiter=","):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
        csv.writer(file, delimiter=delimiter).writerows([["text", "id"], *([text, i] for i, text in enumerate(texts))])


def as_parquet(path, texts):
    path.mkdir()
    for i, kind in enumerate((pyarrow.string(), pyarrow.large_string())):
        table = pyarrow.table(dict(id=range(len(texts[i::2])), text=pyarrow.array(texts[i::2], kind)))
        pyarrow.parquet.write_table(table, path / f"part-{i}.parquet", row_group_size=7)


@pytest.mark.parametrize("piece_chars", [1 << 18, 11], ids=["", "in pieces"])
@pytest.mark.parametrize("name, write, texts", [
    ("texts", as_files, STORIES), ("a.txt", as_separated_text, STORIES), ("a.json", as_json_array, STORIES + LINE_ENDS),
    ("a.jsonl", as_lines_of_json, STORIES + LINE_ENDS), ("a.csv", as_csv, STORIES + LINE_ENDS),
    ("semicolons.csv", lambda path, texts: as_csv(path, texts, ";"), STORIES + LINE_ENDS),
    ("tabs.csv", lambda path, texts: as_csv(path, texts, "\t"), STORIES + LINE_ENDS),
    ("tables", as_parquet, STORIES + LINE_ENDS)], ids=lambda value: value if isinstance(value, str) else "")
def test_every_story_comes_back_byte_for_byte(tmp_path, monkeypatch, few_parts, name, write, texts, piece_chars):
    monkeypatch.setattr(preprocess, "PIECE_CHARS", piece_chars)
    monkeypatch.setattr(preprocess, "BATCH_BYTES", piece_chars)
    write(tmp_path / name, texts)
    prepare(tmp_path / name, tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", texts)
    assert sorted(train + val) == sorted(texts)


@given(st.lists(st.text("ab\n<|", max_size=30), min_size=1, max_size=6), st.integers(1, 20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_text_is_split_at_separators_wherever_a_block_ends(texts, size):
    text = preprocess.SEPARATOR.join(texts)
    expected = text.split(preprocess.SEPARATOR)
    if len(expected) > 1:  # the newlines around a separator belong to it, and what follows the last may be nothing
        expected = [story.strip("\n") for story in expected]
        expected = expected if expected[-1] else expected[:-1]
    found = preprocess.split_stories(text[i:i + size] for i in range(0, len(text), size))
    assert list(found) == [(story, True) for story in expected]


def test_line_ends_of_windows_and_of_old_macs_become_lf_in_all_formats(tmp_path, few_parts):
    texts = [*tales(40), "of\r\nWindows", "of an old\rMac", "both\r\r\nof them"]
    (tmp_path / "a.txt").write_bytes("<|endoftext|>".join(texts).encode())
    write_jsonl(tmp_path / "a.jsonl", texts)
    as_csv(tmp_path / "a.csv", texts)
    expected = [*tales(40), "of\nWindows", "of an old\nMac", "both\n\nof them"]
    for name in ("a.txt", "a.jsonl", "a.csv"):
        prepare(tmp_path / name, tmp_path / name[2:], *SMALL)
        assert sorted(sum(accounted(tmp_path / name[2:], expected), [])) == sorted(expected)


@pytest.mark.parametrize("row", ['"Once there was a cat.', '"Hello" said Tom.', '"He said \\"hi\\" to me."'],
                         ids=["never closed", "around a word", "with backslashes"])
def test_a_csv_file_with_a_stray_quote_is_refused_instead_of_losing_rows_or_quotes(tmp_path, row):
    (tmp_path / "a.csv").write_text("\n".join(["text", *tales(30), row, *tales(30)]), encoding="utf-8")
    error = refused(tmp_path / "a.csv", tmp_path / "data")
    assert "a.csv cannot be read" in error and 'each one inside doubled ("")' in error


@pytest.mark.parametrize("header, row, line", [("id,text", "{0},{1}", 3), ("text,id", "{1},{0}", 2)])
def test_a_csv_file_with_line_breaks_outside_quotes_is_refused_instead_of_cutting_stories(tmp_path, header, row, line):
    rows = [row.format(i, text.replace(". ", ".\n")) for i, text in enumerate(tales(30))]
    (tmp_path / "a.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    assert f"another number of cells in line {line} than in its header): put texts that contain commas" in refused(
        tmp_path / "a.csv", tmp_path / "data")


def test_empty_rows_are_counted_and_no_stories(tmp_path, few_parts):
    texts = [*itertools.chain.from_iterable(zip(tales(60), itertools.cycle(["", " \n", None])))]
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", texts)
    assert sorted(train + val) == sorted(tales(60))


@pytest.mark.parametrize("name, write", [
    ("a.jsonl", lambda path: write_jsonl(path, STORIES, "story")),
    ("a.csv", lambda path: path.write_text("id,story\n" + "".join(f'7,"{text}"\n' for text in tales(60)), "utf-8")),
    ("a.parquet", lambda path: pyarrow.parquet.write_table(
        pyarrow.table(dict(id=range(len(STORIES)), story=STORIES)), path))], ids=["jsonl", "csv", "parquet"])
def test_a_text_column_of_another_name_is_asked_for_and_then_taken(tmp_path, few_parts, name, write):
    write(tmp_path / name)
    line = refused(tmp_path / name, tmp_path / "data", *SMALL)
    assert str(tmp_path / name) in line and "'text'" in line and "id, story" in line and "--text-field" in line
    prepare(tmp_path / name, tmp_path / "data", *SMALL, "--text-field", "story")
    train, val = stories(tmp_path / "data")
    assert sorted(train + val) == sorted(tales(60) if name == "a.csv" else STORIES)


def test_a_source_is_parsed_once_though_the_command_is_stopped_and_rerun(tmp_path, monkeypatch, few_parts, stopped):
    folder, opened = tmp_path / "texts", collections.Counter()
    for i, text in enumerate(tales(30)):
        write_txt(folder / f"{i}.txt", [text])

    def counting(path, mode="r", **options):
        opened[Path(path).parent == folder, "b" in mode] += 1
        return builtins.open(path, mode, **options)
    monkeypatch.setattr(preprocess, "open", counting, raising=False)
    stopped(folder, tmp_path / "data", *SMALL)
    prepare(folder, tmp_path / "data", *SMALL)
    assert opened[True, False] == 30  # as text; their bytes are hashed at the start of each run
    assert len(accounted(tmp_path / "data", tales(30))[1]) == 1


# -----------------------------------------------------------------------------
# Which files are read, and which split they are

@pytest.mark.parametrize("names", [
    ["cat.txt", "dog.txt", "the train.txt"], ["train.txt", "my test.txt"], ["a.txt", "dev/b.txt"],
    ["train/a.txt", "dev/b.txt"], ["train-1.txt", "test-1.txt"], ["train.txt", "validation.txt", "notes.txt"],
    ["1.TXT", "2.TXT", "3.Txt", "4.txt"], ["train/a.txt", "train/b.txt"], ["test.txt"], ["validation/a.txt"],
    ["the cat's [my] *.txt", "a b/c.txt"]], ids=" + ".join)
def test_words_in_names_are_no_splits_and_every_file_is_read(tmp_path, few_parts, names):
    texts = [tales(20, seed) for seed in range(len(names))]
    for name, part in zip(names, texts):
        write_txt(tmp_path / "my texts" / name, part)
    write_txt(tmp_path / "my texts" / ".hidden" / "x.txt", ["hidden"])
    output = prepare(tmp_path / "my texts", tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", sum(texts, []))
    assert len(val) == 1 and sorted(train + val) == sorted(sum(texts, []))
    assert re.search(rf"^read: {len(names)} files? ", output, re.M) and "not read" not in output


@pytest.mark.parametrize("train_names, val_name", [
    (["train.jsonl"], "validation.jsonl"), (["train.jsonl"], "test.jsonl"), (["train.JSON"], "validation.jsonl"),
    (["train-00000-of-00002.jsonl", "train-00001-of-00002-0ab.jsonl"], "validation-00000-of-00001.jsonl"),
    (["data/train/a.jsonl", "data/train/b/c.jsonl"], "data/test/a.jsonl")],
    ids=["validation", "test", "case", "Hub", "folders"])
def test_a_split_of_its_own_is_kept_and_training_does_without_its_stories(tmp_path, few_parts, train_names, val_name):
    val = tales(30, seed=9)
    parts = [tales(60, seed) + val[:3] for seed in range(len(train_names))]
    for name, part in zip(train_names, parts):
        write_jsonl(tmp_path / "corpus" / name, part)
    write_jsonl(tmp_path / "corpus" / val_name, ["", *val])
    prepare(tmp_path / "corpus", tmp_path / "data", *SMALL)
    assert accounted(tmp_path / "data", [*sum(parts, []), *val, ""]) \
        == ([text for text in sum(parts, []) if text not in val], val)
    rows, copies = table(tmp_path / "data"), sum(len(text.encode()) for text in val[:3])
    assert rows["skipped: in validation"] == [3 * len(parts), copies * len(parts)] and rows["skipped: empty"] == [1, 0]


def test_a_file_that_is_not_read_is_named_with_the_reason(tmp_path, few_parts):
    folder = tmp_path / "texts"
    for name, seed in (("train", 0), ("validation", 1), ("test", 2)):
        write_txt(folder / f"{name}.txt", tales(30, seed))
    for name in ("README.md", "a.png", "b.tar.GZ", "c.zip"):
        (folder / name).touch()
    output = prepare(folder, tmp_path / "data", *SMALL)
    assert accounted(tmp_path / "data", tales(30) + tales(30, 1)) == (tales(30), tales(30, 1))
    assert re.findall("^(?:not )?read.*?: .*", output, re.M) == [
        f"read: 2 files                   60 {sum(map(len, map(str.encode, tales(30) + tales(30, 1)))):13,}",
        "not read (another format): 4 (README.md, a.png, b.tar.GZ, c.zip)", "not read (the test split): 1 (test.txt)"]
    assert prepare(folder, tmp_path / "data", *SMALL) == f"{tmp_path / 'data'} is up to date.\n{output}"


def test_an_archive_alone_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "texts" / "a.jsonl.gz"
    path.parent.mkdir()
    path.touch()
    for dataset in (path.parent, path):
        assert f"{dataset} contains no text that can be read, or only in an archive: pass --dataset with a txt" \
            in refused(dataset, tmp_path / "data")


def test_mixed_formats_are_refused_with_the_count_of_each(tmp_path):
    for name in ("a.txt", "B.TXT", "a.json", "b.jsonl", "c.json", "x.csv", "README.md"):
        (tmp_path / name).touch()
    assert "mixes formats (2 .txt, 3 .json, 1 .csv)" in refused(tmp_path, tmp_path.with_name("data"))


def test_a_path_is_no_pattern(tmp_path, few_parts):
    write_jsonl(tmp_path / "[my] corpus" / "a1.jsonl", tales(30, 1))
    path = write_jsonl(tmp_path / "[my] corpus" / "a[1].jsonl", tales(30))
    prepare(path, tmp_path / "my data", *SMALL)
    train, val = accounted(tmp_path / "my data", tales(30))
    assert sorted(train + val) == sorted(tales(30))


def test_linked_folders_are_read(tmp_path, few_parts):
    for i, text in enumerate(tales(40)):
        write_txt(tmp_path / ("elsewhere" if i % 2 else "texts/sub") / f"{i}.txt", [text])
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    prepare(tmp_path / "texts", tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", tales(40))
    assert sorted(train + val) == sorted(tales(40))


def test_the_built_in_corpus_wins_over_a_folder_of_its_name_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    monkeypatch.setattr(preprocess, "TRAIN_STORIES", 50)
    monkeypatch.setattr(preprocess, "VAL_STORIES", 10)
    assert "./sample" in prepare("sample", "data", "--vocab-size", 320)
    assert "no text that can be read" in refused("./sample", "mine")


# -----------------------------------------------------------------------------
# Validation that is held out

def test_the_side_of_a_text_depends_on_that_text_alone(master, tmp_path, few_parts):
    _, val = accounted(master, TALES)
    others = [*tales(300, 1), *TALES[::2], *TALES] * 2
    random.Random(0).shuffle(others)
    prepare(write_jsonl(tmp_path / "a.jsonl", others), tmp_path / "data", *SMALL)
    train, larger_val = accounted(tmp_path / "data", others)
    assert 2 <= len(val) <= 15 and {text for text in larger_val if text in TALES} == set(val)
    assert collections.Counter(train + larger_val) == collections.Counter(others) - collections.Counter(
        {text: others.count(text) - 1 for text in larger_val})


TEXTS = st.lists(st.text("aбя😀 \n", max_size=60), min_size=1, max_size=12)


def split(folder, texts):
    """(training texts, validation texts, size read, {row: size}) of a file of `texts`, read in tiny pieces."""
    config = CorpusConfig(dataset=str(write_jsonl(folder / "a.jsonl", texts)))
    with mock.patch.multiple(preprocess, PIECE_CHARS=7, BATCH_BYTES=20):
        train, val, *sizes = preprocess.train_val_split(preprocess.local_rows(config, folder)[0], "a")
        found = []
        for side in (train, val):
            found.append([])
            for text, starts in ((text, starts) for batch in side.batches() for text, starts in zip(*batch)):
                found[-1] += [text] if starts else [found[-1].pop() + text]
            assert side.story_bytes().tolist() == [len(text.encode()) for text in found[-1]]
    return *found, *sizes


@given(TEXTS, st.randoms(use_true_random=False))
@example(["a"], random.Random(0))
@example(["😀"], random.Random(0))
@example(["aa aa", "aa aa"], random.Random(0))
@example(["a" * 100], random.Random(0))
@example(["a" * 50 + "\n\n" + "b" * 44 + "\n" + "c" * 5], random.Random(0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_nothing_is_lost_or_on_both_sides_and_validation_is_small(texts, rng):
    with tempfile.TemporaryDirectory() as folder:
        try:
            train, val, read, left_out = split(Path(folder) / "1", texts)
        except UserError as error:
            assert "too little text" in error.message and not any(len(text.strip()) > 1 for text in texts)
            return
        shuffled = rng.sample(texts, len(texts))
        assert sorted(split(Path(folder) / "2", shuffled)[1]) == sorted(val)
    size, held_out = (sum(len(text.encode()) for text in side) for side in (texts, val))
    prepared = [len(train) + len(val), sum(len(text.encode()) for text in train) + held_out]
    assert (prepared + sum(left_out.values())).tolist() == read.tolist() == [len(texts), size]
    if "counted twice (cut)" in left_out:
        assert len(val) == 1 and any(head + val[0] in texts for head in train)
        assert min(0.05 * size, 1) - 1 < held_out <= max(0.1 * size, 4)
    else:
        assert held_out <= 0.05 * size and not set(train) & set(val)
        assert all(text in texts for text in train + val)


NAMES = st.one_of(st.sampled_from(["train", "validation", "test", "the train", "my test", "dev", "a[1]", "Buch ü",
                                   "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]),
                  st.text(st.sampled_from("ab .-_[]*Жé"), min_size=1, max_size=6).map(lambda name: f"n{name.strip()}"))
FOLDERS = st.sampled_from(["", "train", "validation", "test", "sub/deep", ".hidden", "a b"])
CONTENTS = st.lists(st.one_of(st.sampled_from(["", " ", "null", "NA", "0012", "2024-01-01", "a\u2581b", "\u2585 x",
                                               "same", "жила\n\nбыла", "x" * 700]),
                              st.text(st.sampled_from("aé жЯ你😀\n\t\"',;{}[]<|>\\"), max_size=40)), max_size=12)


def write_corpus(path, texts):
    """Write a file of the format of its suffix; returns the documents that are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        texts = [text.strip("\n") for text in texts] or [""]
        write_txt(path, texts)
        return texts[:-1] if len(texts) > 1 and not texts[-1] else texts  # nothing follows the last separator
    if path.suffix.lower() == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(dict(text=pyarrow.array(texts, pyarrow.string()))), path)
    else:
        write_jsonl(path, texts)
    return texts


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(files=st.dictionaries(st.tuples(FOLDERS, NAMES), CONTENTS, min_size=1, max_size=5),
       suffixes=st.sampled_from([[".txt"], [".jsonl", ".JSONL", ".json"], [".csv", ".CSV"], [".parquet"]]),
       others=st.sets(st.sampled_from(["README.md", "cat.png", ".DS_Store", "old.zip"])))
def test_every_document_of_any_names_layout_format_and_contents_is_read_or_spoken_of(few_parts, files, suffixes,
                                                                                      others):
    with tempfile.TemporaryDirectory() as folder:
        source, data_dir, documents = Path(folder) / "[my] corpus", Path(folder) / "data", {}
        files[("train", "filler")] = tales(60)  # enough text for a vocabulary
        for i, ((below, name), contents) in enumerate(files.items()):
            path = source / below / f"{name}{suffixes[i % len(suffixes)]}"
            documents[path] = write_corpus(path, contents)
        for name in others:
            (source / name).write_text("of another kind")
        splits = {name: [text for path in paths for text in documents[path]]
                  for name, paths in preprocess.local_files(source)[0].items()}
        val = splits.get("validation") or splits.get("test")
        if len(splits) > 1 and not any(map(str.strip, val or [])):
            assert "too little text for validation: add some" in refused(source, data_dir, *SMALL)
            return
        output = prepare(source, data_dir, *SMALL)
        not_read = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))["not_read"]
        unread = sum(not_read.values(), [])
        hidden = [path for path in documents if ".hidden" in path.parts]
        accounted(data_dir, [text for path, texts in documents.items() if path not in hidden and str(path) not in unread
                             for text in texts])
        assert {Path(path).name for path in unread if Path(path) not in documents} == others - {".DS_Store"}
        assert all(f"not read ({reason}): {len(paths)} (" in output for reason, paths in not_read.items())


def test_a_long_document_gives_the_end_of_a_paragraph_to_validation(tmp_path, few_parts):
    text = "\n\n".join(tales(300))
    prepare(write_txt(tmp_path / "book.txt", [text]), tmp_path / "data", *SMALL)
    (head,), (tail,) = stories(tmp_path / "data")
    assert head + tail == text and head.endswith("\n\n") and not tail.startswith("\n")
    assert list(accounted(tmp_path / "data", [text])) == [[head], [tail]]
    assert table(tmp_path / "data")["counted twice (cut)"] == [-1, 0]
    assert 0.05 <= len(tail.encode()) / len(text.encode()) < 0.06


def test_what_a_cut_document_keeps_is_counted_where_the_selection_leaves_it_out(tmp_path):
    note = " ".join(tales(40))
    for seed in range(1, 20):  # either of two documents may be the one that is cut
        texts = [note, " ".join(tales(60, seed))]
        if note in split(tmp_path / f"{seed}", texts)[0]:
            break
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "data", *SMALL, "--num-files", 25)
    train, (tail,) = stories(tmp_path / "data")
    assert train == [note] and texts[1].endswith(tail) and accounted(tmp_path / "data", texts)
    head_bytes = len(texts[1].encode()) - len(tail.encode())
    assert list(table(tmp_path / "data").items())[3:] == [("counted twice (cut)", [-1, 0]),
                                                          ("skipped: not selected", [1, head_bytes])]


@pytest.mark.parametrize("train, val, options, percent", [
    (tales(60), tales(6, 1), [], None), (tales(60), tales(20, 1), [], 24), (tales(60), None, [], None),
    (tales(60), tales(6, 1), ["--num-files", 1], None)],
    ids=["a tenth", "a quarter", "held out", "of more than is selected"])
def test_validation_of_over_a_tenth_of_the_text_is_warned_of(tmp_path, few_parts, train, val, options, percent):
    for name, texts in ("train", train), ("validation", val):
        if texts:
            write_jsonl(tmp_path / "texts" / f"{name}.jsonl", texts)
    output = prepare(tmp_path / "texts", tmp_path / "data", *options, "--vocab-size", 310)
    assert accounted(tmp_path / "data", train + (val or []))
    warnings = re.findall(r"Warning: validation is (\d+)% of the text, .*, then rerun with --overwrite\.", output)
    assert warnings == [str(percent)] * (percent is not None)


# -----------------------------------------------------------------------------
# Parts and sampling

def all_stories(texts):
    return preprocess.scan_stories(datasets.Dataset.from_dict(dict(text=texts)))[0]


def selected(texts, **settings):
    """The texts of each part."""
    parts = preprocess.select_parts(all_stories(texts), CorpusConfig(**settings))
    return {name: [text for batch, _ in part.batches() for text in batch] for name, part in parts.items()}


@pytest.mark.parametrize("count", [1, 7, 49, 50, 51, 1000])
def test_fifty_equal_parts_lose_nothing(count):
    texts = tales(count)
    parts = selected(texts)
    assert list(parts) == sorted(parts) and sum(parts.values(), []) == texts
    sizes = {len(part) for part in parts.values()}
    assert len(parts) == min(count, 50) and max(sizes) - min(sizes) <= 1


def test_selections_are_nested_random_and_repeat_for_a_seed():
    texts = tales(1000)
    assert selected(texts, num_files=20) == dict(list(selected(texts).items())[:20])
    sizes, larger = [], texts
    for rate in (0.5, 0.3, 0.1):
        chosen = sum(selected(texts, sample_rate=rate).values(), [])
        assert chosen == [text for text in larger if text in set(chosen)] and len(chosen) < len(larger)
        assert abs(len(chosen) - 1000 * rate) < 4 * math.sqrt(1000 * rate * (1 - rate))
        sizes, larger = [len(part) for part in selected(texts, sample_rate=rate).values()], chosen
    assert len(sizes) > 40 and max(sizes) < 10  # from everywhere
    other = sum(selected(texts, sample_rate=0.1, seed=7).values(), [])
    assert other != larger and len(set(other) & set(larger)) < 40


@pytest.mark.parametrize("options", [["--num-files", 20], ["--sample-rate", 0.3],
                                     ["--num-files", 1, "--sample-rate", 0.5]])
def test_a_selection_never_touches_validation(master, source, tmp_path, options):
    prepare(source, tmp_path / "data", *options, *SMALL)
    all_train, all_val = stories(master)
    train, val = accounted(tmp_path / "data", TALES)
    assert val == all_val and 0 < len(train) < 0.6 * len(all_train)
    assert train == [text for text in all_train if text in set(train)]
    assert table(tmp_path / "data")["skipped: not selected"][0] == len(all_train) - len(train)


# -----------------------------------------------------------------------------
# The vocabulary

@pytest.fixture
def trained_on(monkeypatch):
    """The list of the texts that SentencePiece gets."""
    seen, real = [], sentencepiece.SentencePieceTrainer.train

    def train(sentence_iterator, **options):
        seen[:] = list(sentence_iterator)
        return real(sentence_iterator=iter(seen), **options)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    return seen


def test_the_vocabulary_is_trained_on_the_selected_training_text_alone(master, source, tmp_path, trained_on):
    prepare(source, tmp_path / "all", "--vocab-size", 400)
    assert trained_on == stories(master)[0] and snapshot(tmp_path / "all") == snapshot(master)
    prepare(source, tmp_path / "part", "--num-files", 20, "--sample-rate", 0.5, *SMALL)
    assert trained_on == stories(tmp_path / "part")[0]


def test_the_vocabulary_of_a_large_corpus_is_trained_on_a_part_of_it_from_everywhere(source, tmp_path, trained_on,
                                                                                      monkeypatch):
    monkeypatch.setattr(preprocess, "VOCABULARY_BYTES", 20_000)
    prepare(source, tmp_path / "data", "--num-files", 48, *SMALL)
    train, places = stories(tmp_path / "data")[0], []
    assert 15_000 < sum(len(text.encode()) for text in trained_on) < 25_000 < sum(map(len, train)) / 2
    places = [train.index(text) * 8 // len(train) for text in trained_on]
    assert places == sorted(places) and min(collections.Counter(places)[i] for i in range(8)) > len(places) / 16
    first = list(trained_on)
    prepare(source, tmp_path / "data", "--num-files", 48, "--seed", 5, "--overwrite", *SMALL)
    assert trained_on != first


def test_no_token_has_two_digits(tmp_path, few_parts):
    texts = [f"In 2024 and 2024 it was 2024, said {text}" for text in tales(40)]
    prepare(write_txt(tmp_path / "a.txt", texts), tmp_path / "data", *SMALL)
    tokens = [token.decode("utf-8", "replace") for token in Corpus(tmp_path / "data").tokenizer.token_bytes]
    assert {"1", "2", "4"} <= set(tokens) and max(map(len, tokens)) > 5
    assert not [token for token in tokens if re.search(r"\d", token) and len(token.strip()) > 1]


def test_another_language_is_learned_and_unknown_characters_are_spelled_in_bytes(tmp_path, few_parts):
    texts = tales(80, words="从前有一只小猫它喜欢在山上玩红色的球大狗跑回家了")
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "data", "--vocab-size", 340)
    tokenizer = Corpus(tmp_path / "data").tokenizer
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode()) / 2
    assert tokenizer.decode(tokenizer.encode("Ελλάδα 日本語 😀")) == "Ελλάδα 日本語 😀"


@pytest.mark.parametrize("texts, options, says", [
    (tales(50), [], r"too small for a vocabulary of 4096: pass (--vocab-size) (\d+) or less"),
    (["The cat sat on the mat.\nThe dog saw the cat, and the cat saw the dog. They sat and sat and sat.\n"], [],
     r"too small for a vocabulary of 4096: pass (--vocab-size) (\d+) or less"),
    (["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) for i in range(100)], ["--vocab-size", 300],
     r"too many different characters for a vocabulary of 300: pass (--vocab-size) (\d+) or more")],
    ids=["little text", "one short text", "many characters"])
def test_a_vocabulary_that_does_not_fit_names_a_size_that_does(tmp_path, few_parts, texts, options, says):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    fits = re.search(says, refused(path, tmp_path / "data", *options)).groups()
    prepare(path, tmp_path / "data", *fits)
    train, val = stories(tmp_path / "data")
    assert "".join(sorted("".join(train + val))) == "".join(sorted("".join(texts)))
    assert Corpus(tmp_path / "data").tokenizer.vocab_size == int(fits[1])


def test_a_given_tokenizer_is_used_as_it_is(master, tmp_path, few_parts):
    path, options = write_txt(tmp_path / "new.txt", tales(40, 3)), ["--tokenizer", master / "tok400.model"]
    prepare(path, tmp_path / "data", *options)
    assert (tmp_path / "data" / "tok400.model").read_bytes() == (master / "tok400.model").read_bytes()
    train, val = accounted(tmp_path / "data", tales(40, 3))
    assert sorted(train + val) == sorted(tales(40, 3))
    assert "up to date" in prepare(path, tmp_path / "data", *options)
    assert "--overwrite" in refused(path, tmp_path / "data", "--vocab-size", 400)


def test_a_given_tokenizer_that_has_changed_is_noticed(master, source, tmp_path, few_parts):
    path, model = write_txt(tmp_path / "new.txt", tales(40, 3)), tmp_path / "tok.model"
    shutil.copy(master / "tok400.model", model)
    prepare(path, tmp_path / "data", "--tokenizer", model)
    prepare(source, tmp_path / "other", "--vocab-size", 400, "--num-files", 1)
    shutil.copy(tmp_path / "other" / "tok400.model", model)
    line = refused(path, tmp_path / "data", "--tokenizer", model)
    assert "other contents in the files of --tokenizer" in line and "--overwrite" in line
    prepare(path, tmp_path / "data", "--tokenizer", model, "--overwrite")
    assert (tmp_path / "data" / "tok400.model").read_bytes() == model.read_bytes()


def test_what_is_no_tokenizer_of_ours_is_refused_with_the_file_to_name(master, tmp_path):
    path = write_txt(tmp_path / "new.txt", tales(40))
    with open(tmp_path / "foreign.model", "wb") as file:  # it changes spaces and knows no bytes
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(tales(50)), model_writer=file, vocab_size=70,
                                                 minloglevel=3)
    with open(tmp_path / "spaces.model", "wb") as file:  # like ours, but it removes spaces
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(tales(50)), model_writer=file, vocab_size=330,
                                                 model_type="bpe", byte_fallback=True, minloglevel=3)
    for wrong in (path, master, tmp_path / "no.model", tmp_path / "foreign.model", tmp_path / "spaces.model"):
        line = refused(path, tmp_path / "data", "--tokenizer", wrong)
        assert str(wrong) in line and "tok*.model of a prepared corpus" in line
    missing = refused(path, tmp_path / "data", "--tokenizer", "none.model")
    assert "there is no file none.model for --tokenizer: pass the tok" in missing
    line = refused(path, tmp_path / "data", "--tokenizer", master / "tok400.model", "--vocab-size", 330)
    assert "330" in line and "400 tokens" in line and "omit --vocab-size" in line
    assert os.listdir(tmp_path / "data") == ["lock"]


# -----------------------------------------------------------------------------
# Word prompts

def content_words(texts, seed=1):
    """(content words, those of them that are held out)."""
    found = preprocess.content_words([all_stories(texts)], seed, most=0.06)
    assert not set(found["words"]) & set(found["held_out_words"])
    return set(sum(found.values(), [])), found["held_out_words"]


def test_content_words_are_neither_names_nor_rare_nor_frequent_nor_parts_of_words():
    words = {"fox fox": 150, "sun": 151, "owl": 2, "elk": 1, "rose": 50, "Rose": 11, "bell": 50, "Bell": 10, "Tom": 99,
             "ox": 50, "ёжик": 50, "猫猫猫": 50, "couldn't": 50, "isn\u2019t": 50, "can_": 50, "HAT": 50, "iPod": 50}
    texts = [""] * 2500  # 0.08% of them are 2, 6% are 150
    for word, count in words.items():
        for i in range(count):
            texts[i] += f' "{word}," no. 7.'
    found = content_words([text or "The end." for text in texts])[0]
    assert found == {"fox", "owl", "bell", "ёжик", "can"}


SYLLABLES = "ba ke lo mi nu pa ri so tu va we zi".split()
NOUNS = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]


def worded(count, seed=0):
    """`count` texts with 0 to 7 of 144 content words, each of which is in about 3% of them."""
    rng = random.Random(seed)
    return [f"Lily saw it, tale {i} of {seed}:\n\n" + " and ".join(rng.sample(NOUNS, rng.randint(0, 7))) + "."
            for i in range(count)]


def test_content_words_do_not_depend_on_the_order_of_the_stories_and_a_fixed_fifth_is_held_out():
    texts = worded(600)
    words, held_out = content_words(texts)
    assert words == set(NOUNS) and 14 <= len(held_out) <= 44 and held_out == sorted(held_out)
    assert content_words(texts[::-1]) == (words, held_out) != content_words(texts, seed=2)
    assert len(set(content_words(texts, seed=2)[1]) & set(held_out)) < len(held_out) / 2


def prompted(texts, starts=None, rate=1.0, seed=0, name="train_000.bin", fits=lambda text: True):
    batches = [([text], np.array([start])) for text, start in zip(texts, starts or [True] * len(texts))]
    config = CorpusConfig(word_prompts=rate, seed=seed)
    stories = SimpleNamespace(batches=lambda: batches)
    return [text for (text,), _ in preprocess.with_word_prompts(name, stories, NOUNS, config, fits)]


def named(text):
    """(the words in the prompt of a text or [], the story itself)."""
    line, words, story = re.fullmatch(r"(Words: (\w+, \w+, \w+)\.\n\n)?(.*)", text, re.DOTALL).groups()
    return words.split(", ") if line else [], story


def test_a_story_of_fewer_than_three_content_words_gets_no_prompt_and_a_long_one_only_at_its_start():
    texts = ["bake bake lolo Tutu", "bake lolo tutu bake", "bake lolo tutu", "lolo bake mimi tutu"]
    found = prompted(texts, [True, True, False, True])
    assert [named(text)[1] for text in found] == texts and found[0] == texts[0] and found[2] == texts[2]
    assert sorted(named(found[1])[0]) == ["bake", "lolo", "tutu"] and len(set(named(found[3])[0])) == 3
    assert prompted(texts, fits=lambda text: text.endswith("mimi tutu"))[:3] == texts[:3]


def test_which_words_are_named_and_in_which_order_is_random_and_repeats_for_a_seed():
    texts = ["bake lolo tutu mimi nunu"] * 2000
    found = [named(text)[0] for text in prompted(texts)]
    counts = collections.Counter(map(tuple, found))
    assert len(counts) == 5 * 4 * 3 and max(counts.values()) < 70
    assert found[:2] == [["nunu", "lolo", "bake"], ["lolo", "mimi", "nunu"]], "another draw than on other machines"
    others = [prompted(texts[:9], seed=1), prompted(texts[:9], name="train_001.bin")]
    assert prompted(texts[:9]) == prompted(texts)[:9] and prompted(texts[:9]) not in others
    assert abs(sum(text.startswith("Words") for text in prompted(texts, rate=0.3)) - 600) < 4 * math.sqrt(420)


PROMPTS = ["--word-prompts", 0.8, "--copies", 3, *SMALL]


def test_a_fraction_of_the_training_stories_names_three_of_its_words_and_other_ones_in_each_copy(tmp_path, few_parts):
    texts = worded(1000)
    output = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "data", *PROMPTS)
    prepare(tmp_path / "a.jsonl", tmp_path / "plain", *SMALL)
    train, val = accounted(tmp_path / "data", texts)
    plain_train, plain_val = stories(tmp_path / "plain")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text(encoding="utf-8"))
    assert set(NOUNS) == {*meta["words"], *meta["held_out_words"]} and val == plain_val
    assert (tmp_path / "data" / "tok330.model").read_bytes() == (tmp_path / "plain" / "tok330.model").read_bytes()
    copies, words, place = {text: [] for text in plain_train}, [], 0
    for shard in meta["train"]:  # each holds its stories three times, copy after copy
        here = [named(text) for text in train[place:place + shard["stories"]]]
        place, third = place + len(here), len(here) // 3
        assert [story for _, story in here] == 3 * [story for _, story in here[:third]]
        for words, story in here:
            copies[story].append(words)
            assert set(words) <= set(re.findall(r"\w+", story)) & set(NOUNS) and len(set(words)) in (0, 3)
    with_three = [drawn for story, drawn in copies.items() if len(set(re.findall(r"\w+", story)) & set(NOUNS)) >= 3]
    total = 3 * len(with_three)
    assert 400 < len(with_three) < 800 and sum(map(len, copies.values())) == 3 * len(plain_train)
    assert abs(sum(map(bool, sum(with_three, []))) - 0.8 * total) < 4 * math.sqrt(0.16 * total)
    assert sum(map(bool, sum(copies.values(), []))) == sum(map(bool, sum(with_three, [])))
    both = [(first, second) for first, second, _ in with_three if first and second]
    assert sum(first == second for first, second in both) < len(both) / 8
    size, added = sum(len(text.encode()) for text in plain_train), sum(len(text) for text in train) - sum(
        len(named(text)[1]) for text in train)
    rows = table(tmp_path / "data")
    assert rows["less: further copies"] == [-2 * len(plain_train), -2 * size]
    assert rows["less: word prompts"] == [0, -added]
    assert prepare(tmp_path / "a.jsonl", tmp_path / "data", *PROMPTS).endswith(output)


def test_an_interrupted_preparation_with_word_prompts_ends_with_the_same_files(tmp_path, few_parts, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", worded(300))
    prepare(tmp_path / "a.jsonl", tmp_path / "unbroken", *PROMPTS, "--workers", 1)
    real = preprocess.write_shard
    for last in ("val_000.bin", "train_000.bin", "train_001.bin"):
        def stopping(path, *arguments):
            real(path, *arguments)
            if path.name == last:
                raise KeyboardInterrupt
        monkeypatch.setattr(preprocess, "write_shard", stopping)
        prepare(tmp_path / "a.jsonl", tmp_path / "data", *PROMPTS, code=130)
    prepare(tmp_path / "a.jsonl", tmp_path / "data", *PROMPTS)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "unbroken")


def test_word_prompts_of_the_built_in_corpus_fit_the_window_of_the_demo_model(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "TRAIN_STORIES", 500)
    monkeypatch.setattr(preprocess, "VAL_STORIES", 200)
    monkeypatch.setattr(preprocess, "PARTS", 3)
    prepare("sample", tmp_path / "data", "--word-prompts", 1, "--copies", 2)
    corpus, (train, val) = Corpus(tmp_path / "data"), stories(tmp_path / "data")
    plain_train, plain_val = stories(sample)
    words = {*corpus.meta["words"], *corpus.meta["held_out_words"]}
    assert 60 < len(words) < 90 and val == plain_val and corpus.meta["val_nats"] == Corpus(sample).meta["val_nats"]
    assert sorted(named(text)[1] for text in train) == sorted(2 * plain_train)
    assert not {"words", "held_out_words"} & set(Corpus(sample).meta)
    sizes = {text: len(corpus.tokenizer.encode(text)) + 2 for text in train}  # with bos and eos
    window = PRESETS["demo"]["block_size"] + 1
    without = [text for text in train if not named(text)[0]]
    too_long = [text for text in without if len(words & set(re.findall(r"\w+", text))) >= 3]
    assert max(sizes.values()) in (window - 1, window) and len(without) < 100
    assert 0 < len(too_long) < 30 and min(sizes[text] for text in too_long) > window - 25


def test_copies_do_not_hide_that_validation_is_over_a_tenth_of_the_text(tmp_path, few_parts):
    for name, texts in ("train", worded(100)), ("validation", worded(25, 1)):
        write_jsonl(tmp_path / "texts" / f"{name}.jsonl", texts)
    plain, copied = (re.findall("Warning.*", prepare(tmp_path / "texts", tmp_path / f"{i}", *SMALL, *options))
                     for i, options in enumerate([[], PROMPTS]))
    assert plain == copied and "validation is 21% of the text" in copied[0]


def test_word_prompts_that_cannot_be_or_copies_without_them_are_refused_with_what_to_type(source, tmp_path):
    line = refused(source, tmp_path / "data", *SMALL, "--copies", 3)
    assert "--copies has no effect without --word-prompts: add --word-prompts 0.8, or omit it." in line
    line = refused(write_jsonl(tmp_path / "a.jsonl", tales(50, words=["the"])), tmp_path / "data", *PROMPTS)
    assert "differ in too few words (none) for word prompts: omit --word-prompts" in line


# -----------------------------------------------------------------------------
# Doing it twice

def test_a_second_run_says_up_to_date_also_where_files_were_copied(source, prepared, tmp_path):
    copy, before = tmp_path / "copy.jsonl", snapshot(prepared)
    shutil.copyfile(source, copy)
    os.replace(copy, source)
    for path in (source, *prepared.iterdir()):
        os.utime(path, (time.time() + 1000,) * 2)
    output = prepare(source, prepared, "--vocab-size", 400)
    assert "is up to date" in output and "vocabulary: 400 tokens" in output and snapshot(prepared) == before


def test_a_corpus_of_an_earlier_version_without_some_settings_is_up_to_date(source, prepared):
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    del meta["arguments"]["word_prompts"], meta["arguments"]["copies"]
    (prepared / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert "up to date" in prepare(source, prepared, "--vocab-size", 400)
    assert "--word-prompts 0.0 (now 0.5)" in refused(source, prepared, "--vocab-size", 400, "--word-prompts", 0.5)


def test_other_arguments_are_refused_in_words_until_overwrite(source, prepared):
    before = snapshot(prepared)
    for options, says in ((["--sample-rate", 0.5], "--sample-rate 1.0 (now 0.5)"),
                          (["--word-prompts", 0.8], "--word-prompts 0.0 (now 0.8)"),
                          (["--seed", 1], "--seed 1337 (now 1)"), (SMALL, "--vocab-size 400 (now 330)")):
        line = refused(source, prepared, "--vocab-size", 400, *options)
        assert says in line and "pass --overwrite" in line and "another --data-dir" in line
    assert snapshot(prepared) == before
    prepare(source, prepared, "--vocab-size", 330, "--num-files", 2, "--overwrite")
    train, _ = accounted(prepared, TALES)
    assert len(train) < 30 and sorted(snapshot(prepared)) == ["lock", "meta.json", "tok330.model", "train_000.bin",
                                                              "train_001.bin", "val_000.bin"]


def test_changed_contents_are_refused_until_overwrite(tmp_path, few_parts):
    texts, folder, data_dir = tales(60), tmp_path / "texts", tmp_path / "data"
    for i, text in enumerate(texts):
        write_txt(folder / f"{i:02d}.txt", [text])
    prepare(folder, data_dir, *SMALL)
    os.replace(folder / "03.txt", folder / "03 b.txt")  # names decide the order and the splits
    assert "other contents in the files of --dataset" in refused(folder, data_dir, *SMALL)
    os.replace(folder / "03 b.txt", folder / "03.txt")
    (folder / "notes.md").touch()
    assert "up to date" in prepare(folder, data_dir, *SMALL)
    write_txt(folder / "03.txt", ["Changed."])
    assert "other contents in the files of --dataset" in refused(folder, data_dir, *SMALL)
    prepare(folder, data_dir, *SMALL, "--overwrite")
    assert "Changed." in sum(accounted(data_dir, [*texts[:3], "Changed.", *texts[4:]]), [])


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "train_003.bin").unlink(), lambda folder: os.truncate(folder / "val_000.bin", 10),
    lambda folder: (folder / "tok400.model").write_bytes(b"?"), lambda folder: (folder / "meta.json").write_text("{"),
    lambda folder: (folder / "meta.json").unlink()])
def test_a_damaged_corpus_is_repaired_by_the_same_command(source, master, prepared, damage):
    damage(prepared)
    assert "up to date" not in prepare(source, prepared, "--vocab-size", 400)
    assert snapshot(prepared) == snapshot(master) and not (prepared / "partial").exists()


def test_an_interrupted_run_is_resumed_by_its_own_arguments_only(source, prepared, tmp_path, stopped):
    before = snapshot(prepared)
    options = ["--num-files", 3, "--overwrite"]
    stopped(source, prepared, *SMALL, *options)
    assert snapshot(prepared) == before and accounted(prepared, TALES)
    stopped(source, tmp_path / "new", *SMALL)
    assert "is not finished" in refused_to_open(tmp_path / "new")
    line = refused(source, tmp_path / "new", "--vocab-size", 340)
    assert "an interrupted preparation with --vocab-size 330 (now 340)" in line and "--overwrite" in line
    prepare(source, tmp_path / "new", "--vocab-size", 340, "--num-files", 3, "--overwrite")
    assert Corpus(tmp_path / "new").tokenizer.vocab_size == 340 and len(stories(tmp_path / "new")[0]) < 60


def refused_to_open(folder):
    with pytest.raises(UserError) as caught:
        Corpus(folder)
    return caught.value.message


# -----------------------------------------------------------------------------
# Interrupted at any moment

def prepare_until(name, arguments, errors):
    """Run the command in a process of its own, up to the middle of writing the file `name`."""
    @contextlib.contextmanager
    def waiting(path, *mode):
        with atomic_write(path, *mode) as file:
            yield file
            if path.name == name:
                time.sleep(60)
    preprocess.atomic_write = waiting
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the script does: it may be ignored here
    with open(errors, "w", encoding="utf-8") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        preprocess.main(["prepare-dataset", *map(str, arguments)])


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything when they start, so that a test spends its time on what they do."""
    if os.name != "posix":
        pytest.skip("needs SIGKILL")
    from multiprocessing import forkserver
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_preprocess"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent)])):
        forkserver.ensure_running()
    return context


def interrupted(processes, number, path, arguments, errors):
    """The exit code of a command that gets a signal while it writes the file `path`."""
    process = processes.Process(target=prepare_until, args=(path.name, arguments, errors))
    process.start()
    while process.is_alive() and not path.with_name(f"{path.name}.tmp").exists():
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(30)
    return process.exitcode


def finished_pieces(folder):
    """{name: what tells one writing of a file from another}."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "partial").glob("*")
            if path.suffix != ".tmp"}


def test_killed_at_any_moment_the_same_command_ends_with_the_same_files(processes, source, prepared, tmp_path):
    """Again and again, while it replaces an earlier corpus, which stays usable until the files are moved."""
    arguments = ["--dataset", source, "--vocab-size", 360, "--workers", 3, "--overwrite", "--data-dir", prepared]
    before, errors, pieces = snapshot(prepared), tmp_path / "errors", {}
    for name, count in ("arguments.json", 0), ("train.arrow", 1), ("tok360.model", 2), ("train_007.bin", 11), (
            "train_031.bin", 35):
        assert interrupted(processes, signal.SIGKILL, prepared / "partial" / name, arguments, errors) == -signal.SIGKILL
        assert snapshot(prepared) == before and Corpus(prepared)
        found = finished_pieces(prepared)
        assert len(found) == count and found.items() >= pieces.items(), "a finished piece was written again"
        pieces = found
    assert interrupted(processes, signal.SIGKILL, prepared / "meta.json", arguments, errors) == -signal.SIGKILL
    assert "is not finished" in refused_to_open(prepared)
    for seconds in (0.1, 0.2, 0.3):
        process = processes.Process(target=prepare_until, args=(None, arguments, errors))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
    prepare(source, prepared, "--vocab-size", 360, "--overwrite")
    prepare(source, tmp_path / "unbroken", "--vocab-size", 360, "--workers", 1)
    assert snapshot(prepared) == snapshot(tmp_path / "unbroken")
    assert not list(prepared.rglob("*.tmp")) and not (prepared / "partial").exists()


def test_a_kill_between_any_two_moves_is_repaired_by_the_same_command(source, prepared, tmp_path, monkeypatch):
    options = ["--vocab-size", 330, "--num-files", 4, "--overwrite"]
    prepare(source, tmp_path / "unbroken", *options)
    for stop_after in (0, 1, 4, 6):  # at 6 all are moved, and only meta.json is missing
        moves = itertools.count()

        def stopping(source, target):
            if source.parent.name == "partial" and target.parent.name != "partial" and next(moves) == stop_after:
                raise KeyboardInterrupt
            os.replace(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "replace_file", stopping)
            if stop_after == 6:
                patch.setattr(preprocess, "write_json", mock.Mock(side_effect=KeyboardInterrupt))
            prepare(source, prepared, *options, code=130)
        assert "is not finished" in refused_to_open(prepared)
    prepare(source, prepared, *options)
    assert snapshot(prepared) == snapshot(tmp_path / "unbroken") and not (prepared / "partial").exists()


def test_an_up_to_date_corpus_keeps_the_interrupted_preparation_that_was_to_replace_it(source, prepared, stopped):
    stopped(source, prepared, "--vocab-size", 400, "--num-files", 3, "--overwrite")
    assert "up to date" in prepare(source, prepared, "--vocab-size", 400) and finished_pieces(prepared)


def test_ctrl_c_says_how_to_resume_and_keeps_what_is_finished(processes, source, tmp_path):
    arguments, errors = ["--dataset", source, "--data-dir", tmp_path / "data", *SMALL], tmp_path / "errors"
    path = tmp_path / "data" / "partial" / "train_005.bin"
    assert interrupted(processes, signal.SIGINT, path, arguments, errors) == 130
    message = errors.read_text(encoding="utf-8")
    assert "Stopped. Rerun the same command to resume." in message and "Traceback" not in message
    assert set(finished_pieces(tmp_path / "data")) == {"arguments.json", "train.arrow", "tok330.model", "val_000.bin",
                                                       *(f"train_{n:03d}.bin" for n in range(5))}
    assert not (tmp_path / "data" / "meta.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_while_the_libraries_are_imported_prints_no_traceback(tmp_path):
    (tmp_path / "sentencepiece.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / "preprocess.py"], cwd=tmp_path, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    while not (tmp_path / "importing").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


def test_a_second_preparation_at_the_same_time_is_refused(source, prepared):
    before = snapshot(prepared)
    with folder_lock(prepared):
        line = refused(source, prepared, *SMALL, "--overwrite")
    assert str(prepared) in line and "in use by another process" in line and snapshot(prepared) == before


# -----------------------------------------------------------------------------
# What can be wrong with a source

BAD_SOURCES = {
    "column": ("a.jsonl", write_jsonl, ["--text-field", "story"], "no text column 'story' (columns: id, text)"),
    "numbers": ("a.jsonl", write_jsonl, ["--text-field", "id"], "no text column 'id' (columns: id, text)"),
    "dates": ("a.parquet", lambda path, texts: pyarrow.parquet.write_table(
        pyarrow.table(dict(text=[datetime.date(2024, 1, 1)])), path), [], "no text column 'text' (columns: text)"),
    "no columns": ("a.json", lambda path, texts: path.write_text(json.dumps(texts)), [], "(columns: none)"),
    "bare commas": ("a.csv", lambda path, texts: path.write_text("text\nOne\nHello, world\n"), [],
                    "another number of cells in line 3 than in its header"),
    "broken line": ("a.jsonl", lambda path, texts: path.write_text('{"text": "one"}\n\n{"text":\n'), [],
                    "cannot be read (line 3: Expecting value): fix or remove it, then rerun."),
    "broken array": ("a.json", lambda path, texts: path.write_text('[{"text": "one"},'), [], "cannot be read"),
    "surrogate": ("a.jsonl", lambda path, texts: path.write_text('{"text": "one \\ud83d"}\n'), [],
                  "surrogates not allowed"),
    "Latin-1 txt": ("a.txt", lambda path, texts: path.write_bytes("café".encode("latin-1")), [], "not UTF-8"),
    "UTF-16 txt": ("a.txt", lambda path, texts: path.write_bytes("café".encode("utf-16")), [], "not UTF-8"),
    "Latin-1 csv": ("a.csv", lambda path, texts: path.write_bytes("text\ncafé\n".encode("latin-1")), [], "not UTF-8"),
    "no parquet": ("a.parquet", lambda path, texts: path.write_bytes(b"no parquet"), [], "cannot be read"),
    "empty txt": ("a.txt", lambda path, texts: path.touch(), [], "too little text"),
    "empty json": ("a.jsonl", lambda path, texts: path.touch(), [], "too little text"),
    "blank": ("a.jsonl", lambda path, texts: write_jsonl(path, ["", " \n", None]), [], "too little text"),
    "one letter": ("a.txt", lambda path, texts: write_txt(path, ["a"]), [], "too little text"),
    "one word": ("a.txt", lambda path, texts: write_txt(path, ["again", "again"]), [], "too small for a vocabulary"),
    "docx": ("a.docx", lambda path, texts: path.touch(), [], "txt, json, jsonl, csv or parquet"),
    "empty folder": ("nothing", lambda path, texts: path.mkdir(), [], "txt, json, jsonl, csv or parquet"),
    "missing": ("no.jsonl", lambda path, texts: None, [], "does not exist"),
    "nothing kept": ("a.jsonl", write_jsonl, ["--sample-rate", 1e-9], "--sample-rate 1e-09 keep none"),
}


@pytest.mark.parametrize("name, write, options, says", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_is_named_in_one_line_and_harms_nothing(prepared, tmp_path, name, write, options, says):
    path, before = tmp_path / "bad" / name, snapshot(prepared)
    path.parent.mkdir()
    write(path, tales(30))
    line = refused(path, tmp_path / "new", *options, *SMALL)
    assert says in line and (str(path) in line or options or "vocabulary" in line)
    assert not (tmp_path / "new" / "meta.json").exists()
    assert refused(path, prepared, *options, *SMALL, "--overwrite") == line and snapshot(prepared) == before


def test_files_with_different_columns_are_refused_with_the_file_that_lacks_the_column_and_its_columns(tmp_path):
    write_jsonl(tmp_path / "texts" / "a.jsonl", tales(30))
    path = write_jsonl(tmp_path / "texts" / "b.jsonl", tales(30), "story")
    assert f"{path} has no text column 'text' (columns: id, story): choose one that all files have with --text-field." \
        in refused(tmp_path / "texts", tmp_path / "data")


def test_a_validation_split_without_text_is_named_with_what_to_do(tmp_path, few_parts):
    for texts in ([], ["", " \n", None]):
        write_jsonl(tmp_path / "texts" / "train.jsonl", tales(60))
        path = write_jsonl(tmp_path / "texts" / "validation.jsonl", texts)
        assert f"{path.parent} contains too little text for validation: add some, or pass --dataset sample." \
            in refused(path.parent, tmp_path / "data", *SMALL)
    path.unlink()
    prepare(path.parent, tmp_path / "data", *SMALL)
    assert len(accounted(tmp_path / "data", tales(60))[1]) == 1


def test_damage_inside_a_parquet_file_is_laid_at_its_door(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(dict(text=tales(60))), path)
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(200) + data[400:])
    assert f"{path} cannot be read" in refused(path, tmp_path / "data", *SMALL)


def test_a_bad_file_among_good_ones_is_named_and_once_repaired_the_same_command_works(tmp_path, few_parts):
    for i, text in enumerate(tales(30)):
        write_txt(tmp_path / "texts" / f"{i:02d}.txt", [text])
    bad = tmp_path / "texts" / "old" / "letter.txt"
    bad.parent.mkdir()
    bad.write_bytes("жила была".encode("cp1251"))
    line = refused(tmp_path / "texts", tmp_path / "data", *SMALL)
    assert str(bad) in line and "UTF-8" in line
    write_txt(bad, ["жила была"])
    prepare(tmp_path / "texts", tmp_path / "data", *SMALL)
    assert "жила была" in sum(accounted(tmp_path / "data", [*tales(30), "жила была"]), [])


def test_a_data_folder_inside_the_corpus_is_refused(tmp_path):
    write_txt(tmp_path / "a.txt", tales(30))
    for data_dir in (tmp_path, tmp_path / "sub" / "data"):
        assert "inside --dataset" in refused(tmp_path, data_dir, *SMALL)
    prepare(tmp_path / "a.txt", tmp_path / "data", *SMALL)


# -----------------------------------------------------------------------------
# The Hugging Face Hub

@pytest.fixture
def hub(monkeypatch):
    """A data set on the Hub: what it holds, its newest commit, and what was asked for."""
    hub = SimpleNamespace(splits={"train": tales(100), "validation": tales(30, 1)}, commit="c1", asked=[],
                          format="parquet")

    def load(name, configuration, revision):
        hub.asked.append((name, configuration, revision))
        return {split: datasets.Dataset.from_dict(dict(id=list(range(len(texts))), text=texts))
                for split, texts in hub.splits.items()}
    monkeypatch.setattr(preprocess, "latest_commit", lambda name: f"{hub.commit} of {name}")
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: SimpleNamespace(name=hub.format))
    return hub


def test_a_data_set_on_the_hub_is_read_at_its_newest_commit_and_stays_there(hub, tmp_path, few_parts, stopped):
    options = ["owner/tales:small", tmp_path / "data", *SMALL]
    hub.splits["train"] += ["", None, *tales(2, 1)]
    stopped(*options)
    hub.commit = "c2"
    prepare(*options)
    assert hub.asked == [("owner/tales", "small", "c1 of owner/tales")] * 2
    assert accounted(tmp_path / "data", [*hub.splits["train"], *tales(30, 1)]) == (tales(100), tales(30, 1))
    assert json.loads((tmp_path / "data" / "meta.json").read_text())["commit"] == "c1 of owner/tales"
    assert "up to date" in prepare(*options) and len(hub.asked) == 2
    (tmp_path / "data" / "val_000.bin").unlink()
    assert "damaged" in prepare(*options) and hub.asked.pop() == hub.asked[0], "repaired from another commit"
    prepare(*options, "--overwrite")
    assert hub.asked[2:] == [("owner/tales", "small", "c2 of owner/tales")]


def test_a_single_split_is_training_text_whatever_its_name(hub, tmp_path, few_parts):
    hub.splits = {"test": tales(100)}
    prepare("tales", tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", tales(100))
    assert sorted(train + val) == sorted(tales(100)) and len(train) > 90
    hub.splits = {"part1": tales(9), "part2": tales(9)}
    assert "no split named train, but part1, part2" in refused("tales", tmp_path / "other", *SMALL)


def test_splits_on_the_hub_that_are_not_read_are_named(hub, tmp_path, few_parts):
    hub.splits |= {"test": tales(9, 2), "unsupervised": tales(9, 3)}
    output = prepare("owner/tales", tmp_path / "data", *SMALL)
    assert accounted(tmp_path / "data", tales(100) + tales(30, 1)) == (tales(100), tales(30, 1))
    assert "not read (other splits): 2 (test, unsupervised)\n" in output


def test_text_files_on_the_hub_follow_the_rules_of_local_ones(hub, tmp_path, few_parts, monkeypatch):
    """`datasets` would make a story of every line."""
    hub.format, asked = "text", []

    def download(name, **options):
        asked.append((name, options["repo_type"], options["revision"]))
        return str(write_txt(tmp_path / "cache" / "a.txt", tales(60)).parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    prepare("owner/tales", tmp_path / "data", *SMALL)
    train, val = accounted(tmp_path / "data", tales(60))
    assert sorted(train + val) == sorted(tales(60)) and asked == [("owner/tales", "dataset", "c1 of owner/tales")]


def test_what_the_hub_cannot_give_is_said_in_one_line(hub, tmp_path, monkeypatch):
    line = refused("owner/tales", tmp_path / "data", "--text-field", "story")
    assert "no text column 'story' (columns: id, text)" in line and "--text-field" in line
    assert "no text column 'id'" in refused("owner/tales", tmp_path / "other", "--text-field", "id")

    def fails(*args, **options):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
    monkeypatch.setattr(datasets, "load_dataset", fails)
    line = refused("owner/tales", tmp_path / "third")
    assert "owner/tales has the configurations a, b" in line and "--dataset owner/tales:a." in line
    assert "does not exist" in refused("no such name", tmp_path / "fourth")


def test_without_a_network_the_default_ends_in_one_line_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refused("roneneldan/TinyStories", tmp_path / "data")
    assert "cannot be reached for roneneldan/TinyStories" in line and "--dataset sample" in line
    assert os.listdir(tmp_path / "data") == ["lock"]
    response = mock.Mock(status_code=404, headers={}, request=mock.Mock())
    missing = huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", mock.Mock(side_effect=missing))
    line = refused("owner/no", tmp_path / "data")
    assert "there is no data set owner/no" in line and "login" in line and "--dataset sample" in line
