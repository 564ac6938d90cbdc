import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT, damages
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import preprocess
from config import UserError
from preprocess import Tokenizer, TokenStream, open_corpus

TINYSTORIES = Path(ROOT).parent / "shared" / "data" / "tinystories"
# Any text that UTF-8 can hold; U+2581 is SentencePiece's own mark for a space and comes back as one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
TRICKY = ["", " ", "  two  spaces  ", "One.\n\n\tTwo.\r\n", "café", "你好", "😀👩‍👩‍👧", "<s></s><unk><0x41>", "a\x00b",
          "e\u0301"]


def run(*arguments, code=0):
    """The output of `python preprocess.py ...` in this process. It must end with `code`, and never in a traceback."""
    result = CliRunner().invoke(preprocess.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments):
    """The one error line that a command ends with."""
    lines = [line for line in run(*arguments, code=1).splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    return lines[0]


def snapshot(folder):
    """{name: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepared(folder):
    """The bytes of what a run leaves for training: tokenizer, shards, meta.json."""
    return {name: data for name, data in snapshot(folder).items() if os.sep not in name}


def stories_of(stream, tokenizer):
    """The texts in a TokenStream."""
    ids, starts = stream.read(0, len(stream)), [*stream.story_starts(), len(stream)]
    return [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)]


def tales(count, seed=0):
    """`count` different short texts."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and saw one red ball roll down hills while big dogs ran far away home".split()
    return [f"Tale {i}. " + " ".join(rng.choices(words, k=rng.randint(5, 30))) + ".\n\nEnd." for i in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(preprocess.train_sentencepiece(tales(300), 400))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "tales.jsonl", tales(600))


@pytest.fixture(scope="session")
def master(tmp_path_factory, corpus_file):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    run("prepare-dataset", "--dataset", corpus_file, "--vocab-size", 400, "--data-dir", folder)
    return folder


@pytest.fixture
def data(master, tmp_path):
    """A prepared corpus that a test may spoil."""
    return Path(shutil.copytree(master, tmp_path / "data"))


# ---------------------------------------------------------------- tokenizer


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


@pytest.mark.parametrize("text", [*TRICKY, "x" * 50_000, "long words and spaces " * 5000])
def test_tricky_and_very_long_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_is_cut_without_changing_its_tokens(tokenizer):
    text = " ".join(tales(900))
    assert len(text) > 2 * preprocess.CHUNK_CHARS
    assert tokenizer.encode(text) == tokenizer.processor.encode(text)
    assert max(map(len, preprocess.chunks(text))) <= preprocess.CHUNK_CHARS


def test_special_ids_are_real_single_and_never_come_from_text(tokenizer):
    special = [tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id]
    assert special == [0, 1, 2]
    ids = tokenizer.encode_document("<s> Hi </s> <unk> 你")
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert not set(ids[1:-1]) & set(special)
    assert tokenizer.encode_prompt("Hi") == tokenizer.encode_document("Hi")[:-1]


def test_many_documents_encode_as_each_alone(tokenizer):
    texts = [*TRICKY, *tales(20)]
    for batch in (texts, [*texts, "very long " * 5000]):
        together = tokenizer.encode_documents(batch)
        assert together.dtype == np.uint16
        assert together.tolist() == list(itertools.chain.from_iterable(map(tokenizer.encode_document, batch)))


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_byte_lengths_add_up_to_the_texts_bytes(tokenizer, text):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode_document(text)].sum() == len(text.encode())


def test_a_lone_surrogate_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("bad \ud800 text")


@pytest.mark.parametrize("damage", [b"", b"no model at all", None])
def test_damaged_tokenizer_bytes_are_refused(tokenizer, damage):
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tokenizer.model_bytes[:2000] if damage is None else damage)


def test_a_tokenizer_without_a_real_bos_is_refused():
    import io
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(tales(50)), model_writer=model, vocab_size=300,
                                             model_type="bpe", byte_fallback=True, bos_id=-1, minloglevel=3)
    with pytest.raises(UserError, match="beginning"):
        Tokenizer(model.getvalue())


@given(TEXTS)
@settings(max_examples=200, deadline=None)
@example("😀 你好 café\n")
def test_streamed_text_equals_whole_decode(tokenizer, text):
    pieces = list(tokenizer.stream(tokenizer.encode_document(text)))
    assert "".join(pieces) == text
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@given(st.lists(st.integers(0, 399), max_size=40), st.lists(st.integers(3, 258), max_size=12))
@settings(max_examples=500, deadline=None)
def test_streaming_any_ids_equals_whole_decode(tokenizer, ids, byte_ids):
    """Also where the bytes are no UTF-8 and control tokens lie between them, as a young model writes."""
    for sequence in (ids, byte_ids, ids + byte_ids, byte_ids + ids):
        assert "".join(tokenizer.stream(sequence)) == tokenizer.decode(sequence)


def test_streaming_holds_back_at_most_one_character(tokenizer):
    given_out, arrived = 0, []
    ids = tokenizer.encode("ab 😀 cd 你 " * 20)

    def arriving():
        for i in ids:
            arrived.append(i)
            yield i
    for piece in tokenizer.stream(arriving()):
        given_out += len(piece.encode())
        assert tokenizer.byte_lengths()[arrived].sum() - given_out <= 3


# ---------------------------------------------------------------- token streams


@pytest.fixture(scope="module")
def pieces():
    """Three shards and the same tokens in one row."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(1, 9, size).astype(np.uint16) for size in (7, 1, 20)]
    return TokenStream(shards, bos_id=1), np.concatenate(shards)


def test_reading_across_shards_equals_reading_one_row(pieces):
    stream, row = pieces
    assert len(stream) == len(row)
    for start, stop in itertools.combinations(range(len(row) + 1), 2):
        assert np.array_equal(stream.read(start, stop), row[start:stop])
    with pytest.raises(IndexError):
        stream.read(20, 29)


def test_windows_equal_slices_of_the_row(pieces):
    stream, row = pieces
    starts = np.array([0, 5, 6, 7, 8, 3, 22])
    windows = stream.windows(starts, 6)
    assert windows.dtype == np.uint16
    assert np.array_equal(windows, [row[start:start + 6] for start in starts])
    with pytest.raises(IndexError):
        stream.windows(np.array([23]), 6)


def test_story_starts_are_where_bos_is(pieces):
    stream, row = pieces
    assert stream.story_starts().dtype == np.int64
    assert np.array_equal(stream.story_starts(), np.flatnonzero(row == 1))


# ---------------------------------------------------------------- the grammar


@pytest.fixture(scope="module")
def stories():
    return preprocess.sample_stories(3000, seed=5)


@pytest.fixture(scope="module")
def derived(stories):
    return [preprocess.parse(story) for story in stories]


def test_rendering_a_parsed_story_gives_it_back(stories, derived):
    assert [preprocess.render(derivation) for derivation in derived] == stories


def test_a_story_has_exactly_one_derivation(stories):
    template = preprocess.split_template(preprocess.STORY)
    for story in stories[:300]:
        assert len(list(preprocess.derivations(story, 0, template, {}))) == 1


def test_every_value_of_every_choice_parses_back():
    """Also the rare ones: a derivation with each value in it survives."""
    rng = random.Random(1)
    for name, (parent, tables) in preprocess.GRAMMAR.items():
        for given_value, table in tables.items():
            for value in table:
                derivation = next(d for d in forced(rng, {parent: given_value, name: value}) if d)
                assert preprocess.parse(preprocess.render(derivation)) == derivation


def forced(rng, wanted):
    """Yield derivations with the wanted values (None where chance went another way)."""
    while True:
        derivation = {}
        for name, (parent, tables) in preprocess.GRAMMAR.items():
            table = tables[derivation.get(parent)]
            value = wanted.get(name)
            derivation[name] = value if value in table else rng.choice(list(table))
        yield derivation if all(derivation.get(name, value) == value for name, value in wanted.items()) else None


def test_choices_come_as_often_as_the_grammar_says(derived):
    """Chi-square of each table: its statistic has mean df and variance 2 df; six sigma would be a wrong table."""
    for name, (parent, tables) in preprocess.GRAMMAR.items():
        for value, table in tables.items():
            drawn = [d[name] for d in derived if parent is None or d[parent] == value]
            counts = collections.Counter(drawn)
            assert set(counts) <= set(table)
            if len(table) > 1 and len(drawn) * min(table.values()) >= 5:
                chi = sum((counts[v] - len(drawn) * p) ** 2 / (len(drawn) * p) for v, p in table.items())
                df = len(table) - 1
                assert chi < df + 6 * math.sqrt(2 * df), (name, value, chi, df)


def test_mean_surprise_of_stories_is_the_entropy(stories):
    nats = [preprocess.story_nats(story) for story in stories]
    error = np.std(nats) / math.sqrt(len(nats))
    assert abs(np.mean(nats) - preprocess.sample_entropy()) < 4 * error
    assert 35 < preprocess.sample_entropy() < 55


def test_what_was_chosen_early_comes_back_later(stories, derived):
    for story, derivation in zip(stories[:500], derived[:500], strict=True):
        last = story.split("\n\n")[-1]
        assert derivation["hero"] in last and derivation["friend"] in last
        assert story.count(f"{derivation['colour']} {derivation['thing']}") == 2


def test_a_story_with_another_name_at_the_end_is_not_of_the_grammar(stories, derived):
    for story, derivation in zip(stories[:50], derived[:50], strict=True):
        hero, other = derivation["hero"], "Lily" if derivation["hero"] != "Lily" else "Mia"
        head, _, tail = story.rpartition(hero)
        for wrong in (head + other + tail, story[:-1], story + " ", story.replace("a ", "an ", 1), ""):
            with pytest.raises(ValueError):
                preprocess.parse(wrong)


def test_articles_fit_the_words_that_follow(stories):
    words = [pair for story in stories for pair in itertools.pairwise(story.replace("\n", " ").split(" "))]
    assert {after[0] for before, after in words if before == "an"} <= set("aeiou")
    assert not {after[0] for before, after in words if before == "a"} & set("aeiou")


def test_stories_repeat_for_a_seed_and_differ_between_seeds(stories):
    assert preprocess.sample_stories(50, seed=5) == stories[:50]
    assert not set(preprocess.sample_stories(50, seed=6)) & set(stories)


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "demo"
    run("prepare-dataset", "--dataset", "sample", "--data-dir", folder)
    return folder


def test_the_sample_corpus_has_its_floor_and_fits_the_demo_model(sample_folder):
    corpus = open_corpus(sample_folder)
    held, train = stories_of(corpus.val, corpus.tokenizer), stories_of(corpus.train, corpus.tokenizer)
    assert corpus.meta["source"] == "sample" and corpus.tokenizer.vocab_size == 512
    assert len(held) == 1000 and len(train) == 30_000 and not set(held) & set(train)
    nats = sum(map(preprocess.story_nats, held))
    assert corpus.meta["floor"]["nats_per_token"] == pytest.approx(nats / (len(corpus.val) - 1000))
    size = sum(len(story.encode()) for story in held)
    assert corpus.meta["floor"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    for stream in (corpus.train, corpus.val):
        assert np.diff(stream.story_starts(), append=len(stream)).max() < 160


def test_a_bigram_model_stays_far_above_the_floor(sample_folder):
    corpus = open_corpus(sample_folder)
    V = corpus.tokenizer.vocab_size

    def pairs(stream):
        ids = stream.read(0, len(stream)).astype(np.int64)
        return (ids[:-1] * V + ids[1:])[ids[1:] != corpus.tokenizer.bos_id]
    counts = np.bincount(pairs(corpus.train), minlength=V * V).reshape(V, V) + 0.01
    loss = -np.log(counts / counts.sum(1, keepdims=True)).ravel()[pairs(corpus.val)].mean()
    assert loss > 3 * corpus.meta["floor"]["nats_per_token"]


# ---------------------------------------------------------------- from a corpus to shards


def test_decoding_the_shards_gives_back_the_stories_in_order(master):
    corpus, texts = open_corpus(master), tales(600)
    train, held = stories_of(corpus.train, corpus.tokenizer), stories_of(corpus.val, corpus.tokenizer)
    assert len(held) == 6
    assert train == [text for text in texts if text not in set(held)]
    assert held == [text for text in texts if text in set(held)]


def test_meta_describes_the_shards(master):
    corpus = open_corpus(master)
    assert len(corpus.meta["train"]) == 50 and len(corpus.meta["val"]) == 1
    for shard in corpus.meta["train"] + corpus.meta["val"]:
        ids = np.fromfile(master / shard["file"], dtype="<u2")
        assert shard["tokens"] == len(ids) and shard["min_id"] == ids.min() and shard["max_id"] == ids.max()
        assert shard["stories"] == (ids == corpus.tokenizer.bos_id).sum() == (ids == corpus.tokenizer.eos_id).sum()
        assert shard["bytes"] == corpus.tokenizer.byte_lengths()[ids].sum()
        assert shard["sha256"] == hashlib.sha256(ids).hexdigest()


@pytest.mark.parametrize("options", [
    ["--num-files", 20], ["--sample-rate", 0.3], ["--num-files", 20, "--sample-rate", 0.5],
    ["--sample-rate", 0.3, "--seed", 7]])
def test_options_thin_the_training_stories_and_leave_validation_alone(master, corpus_file, tmp_path, options):
    run("prepare-dataset", "--dataset", corpus_file, "--vocab-size", 400, "--data-dir", tmp_path / "data", *options)
    whole, part = open_corpus(master), open_corpus(tmp_path / "data")
    everything, chosen = stories_of(whole.train, whole.tokenizer), stories_of(part.train, part.tokenizer)
    held = stories_of(part.val, part.tokenizer)
    assert held == stories_of(whole.val, whole.tokenizer)
    assert not set(held) & set(chosen)
    if "--num-files" in options:
        assert len(part.meta["train"]) == 20
        everything = everything[:math.ceil(len(everything) * 20 / 50)]
    rate = options[options.index("--sample-rate") + 1] if "--sample-rate" in options else 1.0
    assert chosen == [text for text in everything if text in set(chosen)]
    assert abs(len(chosen) - rate * len(everything)) <= 4 * math.sqrt(len(everything) * rate * (1 - rate))


def test_only_the_rows_that_are_needed_are_read():
    """--num-files 2 of a data set that knows its row count reads 2 of 50 parts and one row more."""
    texts, read = tales(1000), []

    def rows():
        for text in texts:
            read.append(text)
            yield text
    config = preprocess.CorpusConfig(num_files=2)
    val = preprocess.Split(lambda: iter(tales(5, seed=3)), 5)
    train, _, held, count = preprocess.divide(preprocess.Split(rows, 1000), val, "here")
    chosen = list(preprocess.select(train, held, count, config))
    assert chosen == [(part, text) for part in (0, 1) for text in texts[20 * part:20 * part + 20]]
    assert len(read) == 41


@pytest.mark.parametrize("with_card", [True, False])
def test_row_counts_come_from_the_card_or_the_files(tmp_path, with_card):
    as_parquet(tmp_path / "train-00000.parquet", tales(70))
    as_parquet(tmp_path / "test-00000.parquet", tales(9, seed=1))
    if with_card:
        card = "".join(f"  - name: {name}\n    num_bytes: 1\n    num_examples: {rows}\n" for name, rows in
                       (("train", 70), ("test", 9)))
        (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{card}---\n", encoding="utf-8")
    train, val = preprocess.open_source(preprocess.CorpusConfig(dataset=str(tmp_path)))
    assert (train.rows, val.rows) == (70, 9)
    assert list(train.read()) == tales(70) and list(val.read()) == tales(9, seed=1)


@pytest.mark.parametrize("rows", [1, 7, 49, 50, 51, 1000])
def test_parts_are_equal_and_lose_nothing(rows):
    texts = tales(rows)
    config = preprocess.CorpusConfig()
    chosen = list(preprocess.select(preprocess.Split(lambda: iter(texts)), set(), rows, config))
    assert [text for _, text in chosen] == texts
    sizes = collections.Counter(part for part, _ in chosen)
    assert sizes[0] == math.ceil(rows / 50) and max(sizes.values()) - min(sizes.values()) <= 1


def test_another_seed_keeps_other_stories():
    kept = [[i for i in range(1000) if preprocess.kept(i, 0.3, seed)] for seed in (1, 2)]
    assert kept[0] != kept[1] and 240 < len(kept[0]) < 360


def test_a_corpus_with_its_own_validation_keeps_it(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts, held = tales(200), tales(40, seed=9)
    write_jsonl(folder / "train-00000.jsonl", texts + held[:3])      # three validation stories slipped into train
    write_jsonl(folder / "validation-00000.jsonl", held)
    run("prepare-dataset", "--dataset", folder, "--vocab-size", 300, "--sample-rate", 0.5,
        "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    assert stories_of(corpus.val, corpus.tokenizer) == held
    assert not set(stories_of(corpus.train, corpus.tokenizer)) & set(held)


def test_the_same_text_is_always_on_the_same_side(tmp_path):
    texts = tales(150) * 3
    run("prepare-dataset", "--dataset", write_jsonl(tmp_path / "a.jsonl", texts), "--vocab-size", 300,
        "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    held, train = stories_of(corpus.val, corpus.tokenizer), stories_of(corpus.train, corpus.tokenizer)
    assert len(held) == 1 and held[0] not in train and len(train) == len(texts) - 3


def test_one_document_gives_its_end_to_validation(tmp_path):
    text = "\n\n".join(tales(300))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    run("prepare-dataset", "--dataset", tmp_path / "book.txt", "--vocab-size", 300, "--num-files", 1,
        "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    (head,), (tail,) = stories_of(corpus.train, corpus.tokenizer), stories_of(corpus.val, corpus.tokenizer)
    assert head + tail == text and head.endswith("\n\n")
    assert 0.05 <= len(tail) / len(text) < 0.06


def as_parquet(path, texts):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def as_csv(path, texts):
    import csv
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


def as_text(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n", encoding="utf-8")


@pytest.mark.parametrize("name, write", [
    ("a.parquet", as_parquet), ("a.csv", as_csv), ("a.txt", as_text),
    ("a.json", lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8"))])
def test_every_kind_of_file_gives_the_same_corpus(tmp_path, name, write):
    texts = [*tales(120), "café 😀", "a, \"quoted\" line\nand another"]
    write(tmp_path / name, texts)
    run("prepare-dataset", "--dataset", tmp_path / name, "--vocab-size", 320, "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    found = stories_of(corpus.train, corpus.tokenizer) + stories_of(corpus.val, corpus.tokenizer)
    assert sorted(found) == sorted(texts)


def test_a_folder_of_text_files_is_a_corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = tales(30)
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    run("prepare-dataset", "--dataset", folder, "--vocab-size", 290, "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    held = stories_of(corpus.val, corpus.tokenizer)
    assert stories_of(corpus.train, corpus.tokenizer) == [text for text in texts if text not in held]


@given(st.lists(st.text("ab\n<|", max_size=30), min_size=1, max_size=6), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_stories_are_split_at_separators_wherever_a_block_ends(texts, size):
    text = preprocess.SEPARATOR.join(texts)
    blocks = [text[i:i + size] for i in range(0, len(text), size)]
    expected = text.split(preprocess.SEPARATOR)
    expected = [story.strip("\n") for story in expected] if len(expected) > 1 else expected
    assert list(preprocess.split_stories(blocks)) == expected


def test_empty_rows_are_no_stories(tmp_path):
    texts = tales(100)
    mixed = itertools.chain.from_iterable(zip(texts, itertools.cycle(["", " \n", None])))
    path = write_jsonl(tmp_path / "a.jsonl", mixed)
    run("prepare-dataset", "--dataset", path, "--vocab-size", 300, "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    found = stories_of(corpus.train, corpus.tokenizer) + stories_of(corpus.val, corpus.tokenizer)
    assert sorted(found) == sorted(texts)


def test_the_stages_one_at_a_time_give_the_same_files(master, corpus_file, tmp_path):
    run("download", "--dataset", corpus_file, "--data-dir", tmp_path)
    run("train-vocab", "--vocab-size", 400, "--data-dir", tmp_path)
    assert "finished" in refused_to_open(tmp_path)
    run("pretokenize", "--data-dir", tmp_path, "--workers", 1)
    assert prepared(tmp_path) == prepared(master)
    before = snapshot(tmp_path)
    for stage in (["download", "--dataset", corpus_file], ["train-vocab", "--vocab-size", 400], ["pretokenize"]):
        assert "already" in run(*stage, "--data-dir", tmp_path)
    assert snapshot(tmp_path) == before


def test_another_vocabulary_needs_no_new_download(data, corpus_file, tmp_path):
    text = snapshot(data / "text")
    assert "--overwrite" in refused("train-vocab", "--vocab-size", 350, "--data-dir", data)
    run("train-vocab", "--vocab-size", 350, "--data-dir", data, "--overwrite")
    assert open_corpus(data).tokenizer.vocab_size == 400        # usable until the exchange
    run("pretokenize", "--data-dir", data)
    assert open_corpus(data).tokenizer.vocab_size == 350 and snapshot(data / "text") == text
    assert not (data / "tok400.model").exists()


def test_preparing_twice_says_so_and_does_nothing(data, corpus_file):
    before = snapshot(data)
    arguments = ["prepare-dataset", "--dataset", corpus_file, "--vocab-size", 400, "--data-dir", data]
    assert "prepared already" in run(*arguments)
    for other in (["--sample-rate", 0.5], ["--vocab-size", 300], ["--seed", 1]):
        assert "--overwrite" in refused(*arguments, *other)
    assert snapshot(data) == before
    run(*arguments, "--sample-rate", 0.5, "--overwrite")
    assert len(open_corpus(data).train) < 0.7 * len(before["train_000.bin"]) / 2 * 50


def test_a_changed_source_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tales(100))
    arguments = ["prepare-dataset", "--dataset", path, "--vocab-size", 300, "--data-dir", tmp_path / "data"]
    run(*arguments)
    write_jsonl(path, tales(120))
    assert "--overwrite" in refused(*arguments)
    run(*arguments, "--overwrite")
    assert sum(shard["stories"] for shard in open_corpus(tmp_path / "data").meta["train"]) == 119


# ---------------------------------------------------------------- what can be wrong


def refused_to_open(folder):
    with pytest.raises(UserError) as error:
        open_corpus(folder)
    assert "\n" not in error.value.message and "preprocess.py" in error.value.message
    return error.value.message


def test_a_missing_folder_and_a_missing_preparation_say_what_to_run(tmp_path):
    assert str(tmp_path / "no") in refused_to_open(tmp_path / "no")
    assert "meta.json" in refused_to_open(tmp_path)
    assert not (tmp_path / "no").exists()


def test_an_id_outside_the_vocabulary_names_file_and_position(data):
    ids = np.fromfile(data / "train_003.bin", dtype="<u2")
    ids[17] = 400
    ids.tofile(data / "train_003.bin")
    message = refused_to_open(data)
    assert "train_003.bin" in message and "token 400 at position 17" in message and "--overwrite" in message


@pytest.mark.parametrize("size", [0, 11, None])
def test_a_truncated_or_missing_shard_is_named(data, size):
    if size is None:
        (data / "val_000.bin").unlink()
    else:
        os.truncate(data / "val_000.bin", size)
    assert "val_000.bin" in refused_to_open(data)


def test_a_tokenizer_that_does_not_match_is_named(data, tokenizer):
    (data / "tok400.model").write_bytes(tokenizer.model_bytes)
    assert "tok400.model" in refused_to_open(data) and "SHA-256" in refused_to_open(data)
    (data / "tok400.model").unlink()
    with pytest.raises(UserError, match="tok400.model is missing"):
        open_corpus(data)


def test_another_format_version_and_a_damaged_meta_are_named(data):
    (data / "meta.json").write_text('{"format": 99}', encoding="utf-8")
    assert "meta.json" in refused_to_open(data)
    (data / "meta.json").write_text('{"form', encoding="utf-8")
    assert "meta.json is damaged" in refused_to_open(data)


def test_a_flipped_bit_is_found_at_opening(data, corpus_file):
    ids = np.fromfile(data / "train_000.bin", dtype="<u2")
    ids[5] = 300 if ids[5] != 300 else 301
    ids.tofile(data / "train_000.bin")
    assert "train_000.bin has changed" in refused_to_open(data)
    arguments = ["prepare-dataset", "--dataset", corpus_file, "--vocab-size", 400, "--data-dir", data]
    assert "train_000.bin" in refused(*arguments)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A prepared corpus of few files that the next tests spoil and mend."""
    folder = tmp_path_factory.mktemp("small")
    source = write_jsonl(folder / "a.jsonl", tales(150))
    run("prepare-dataset", "--dataset", source, "--vocab-size", 300, "--num-files", 2, "--data-dir", folder / "data")
    return folder / "data"


@contextlib.contextmanager
def damaged(path, damage):
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    try:
        yield
    finally:
        path.write_bytes(whole)


CASES = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[
    HealthCheck.function_scoped_fixture])


@CASES
@given(st.sampled_from(["meta.json", "tok300.model", "train_000.bin", "train_001.bin", "val_000.bin"]), damages())
def test_any_damage_to_a_corpus_is_found_at_opening_or_makes_no_difference(small, name, damage):
    def contents():
        corpus = open_corpus(small)
        return corpus.meta, corpus.tokenizer.model_bytes, [
            stream.read(0, len(stream)).tolist() for stream in (corpus.train, corpus.val)]
    expected = contents()
    with damaged(small / name, damage):
        try:
            assert contents() == expected
        except UserError as error:
            assert len(error.message.splitlines()) == 1 and "--overwrite" in error.message


@CASES
@given(st.sampled_from(["text.json", "train_001.parquet", "val_000.parquet"]), damages())
def test_any_damage_to_the_text_is_found_in_reading_or_makes_no_difference(small, name, damage):
    def contents():
        text = preprocess.finished_text(small)
        return text.arguments, {name: list(preprocess.read_text_file(text.folder / name, entry))
                                for name, entry in text.files.items()}
    expected = contents()
    with damaged(small / "text" / name, damage):
        try:
            assert contents() == expected
        except UserError as error:
            assert len(error.message.splitlines()) == 1


@pytest.mark.parametrize("gone", ["val", "train"])
def test_a_forged_text_json_without_validation_or_training_text_is_none(small, gone):
    def forge(data):
        said = json.loads(data)
        said["files"] = {name: entry for name, entry in said["files"].items() if not name.startswith(gone)}
        return json.dumps(said | dict(sha256=preprocess.digest(said))).encode()
    with damaged(small / "text" / "text.json", forge), pytest.raises(UserError, match="there is no text in"):
        preprocess.finished_text(small)


def test_rows_that_a_spoiled_footer_hides_are_missed(small):
    """The pages of a parquet file have checksums, its footer has none: each single bit of it in turn."""
    text = preprocess.finished_text(small)
    path, entry = text.folder / "val_000.parquet", text.files["val_000.parquet"]
    whole, stories = path.read_bytes(), list(preprocess.read_text_file(path, entry))
    silent = 0
    for at in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
        with damaged(path, lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:]):
            try:
                assert list(preprocess.read_text_file(path, entry)) == stories
                silent += 1
            except UserError as error:
                assert "is damaged" in error.message
    assert silent < len(whole) / 2


@CASES
@given(st.binary(max_size=300))
def test_bytes_that_are_no_tokenizer_are_refused(data):
    with pytest.raises(UserError, match="not a SentencePiece model|lacks an id"):
        Tokenizer(data)


def bad_sources(folder):
    """{what is wrong: (dataset, options, what the line must name)}."""
    write_jsonl(folder / "a.jsonl", tales(50))
    (folder / "bad.jsonl").write_text('{"text": "one"}\n{"text":\n', encoding="utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").touch()
    write_jsonl(folder / "blank.jsonl", ["", " "])
    (folder / "bad.parquet").write_bytes(b"no parquet")
    (folder / "numbers.csv").write_text("text,n\none,1\ntwo,2\n", encoding="utf-8")
    (folder / "notes.docx").touch()
    (folder / "nothing").mkdir()
    return {
        "column": ("a.jsonl", ["--text-field", "story"], "text"), "type": ("numbers.csv", ["--text-field", "n"], "'n'"),
        "broken json": ("bad.jsonl", [], "bad.jsonl"), "latin txt": ("latin.txt", [], "UTF-8"),
        "latin csv": ("latin.csv", [], "latin.csv"), "empty txt": ("empty.txt", [], "no text"),
        "empty jsonl": ("empty.jsonl", [], "no text"), "blank": ("blank.jsonl", [], "no text"),
        "parquet": ("bad.parquet", [], "bad.parquet"), "kind": ("notes.docx", [], "parquet, json"),
        "empty folder": ("nothing", [], "nothing"), "missing": ("no.jsonl", [], "does not exist"),
        "too small": ("a.jsonl", ["--vocab-size", "5000"], "--vocab-size"),
        "nothing kept": ("a.jsonl", ["--sample-rate", "1e-9"], "raise"),
    }


def test_each_bad_source_ends_in_one_line_and_harms_nothing(data, tmp_path):
    before = prepared(data)
    for what, (dataset, options, named) in bad_sources(tmp_path).items():
        options = options if "--vocab-size" in options else [*options, "--vocab-size", "300"]
        new = tmp_path / ("new " + what)
        assert named in refused("prepare-dataset", "--dataset", tmp_path / dataset, "--data-dir", new, *options), what
        assert not (new / "meta.json").exists()
        refused("prepare-dataset", "--dataset", tmp_path / dataset, "--data-dir", data, "--overwrite", *options)
        assert prepared(data) == before, what
    open_corpus(data)


def test_the_size_that_the_error_names_fits(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tales(50))
    arguments = ["prepare-dataset", "--dataset", path, "--data-dir", tmp_path / "data"]
    fits = refused(*arguments).split("--vocab-size ")[1].split()[0]
    run(*arguments, "--vocab-size", fits)
    assert open_corpus(tmp_path / "data").tokenizer.vocab_size == int(fits)


def test_many_different_characters_get_a_larger_size(tmp_path):
    texts = ["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    arguments = ["prepare-dataset", "--dataset", path, "--vocab-size", 300, "--data-dir", tmp_path / "data"]
    assert "or more" in refused(*arguments)


def test_a_data_folder_inside_the_corpus_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", tales(50))
    assert "inside" in refused("prepare-dataset", "--dataset", tmp_path, "--data-dir", tmp_path / "data")


def test_a_folder_named_text_that_is_not_ours_stays(tmp_path, corpus_file):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "novel.txt").write_text("mine", encoding="utf-8")
    assert "not made by this program" in refused("prepare-dataset", "--dataset", corpus_file, "--data-dir", tmp_path,
                                                 "--overwrite")
    assert (tmp_path / "text" / "novel.txt").exists()


def test_stages_without_what_they_need_say_which_comes_first(tmp_path, corpus_file):
    assert "download" in refused("train-vocab", "--data-dir", tmp_path)
    assert "download" in refused("pretokenize", "--data-dir", tmp_path)
    run("download", "--dataset", corpus_file, "--data-dir", tmp_path)
    assert "train-vocab" in refused("pretokenize", "--data-dir", tmp_path)


def command(*arguments, **environment):
    return subprocess.Popen([sys.executable, str(ROOT / "preprocess.py"), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)


def test_no_network_ends_in_one_line_that_names_the_way_out(tmp_path):
    started = time.monotonic()
    process = command("prepare-dataset", "--data-dir", tmp_path / "data", HF_HUB_OFFLINE="1",
                      HF_HOME=str(tmp_path / "hf"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert "roneneldan/TinyStories" in err and "--dataset sample" in err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["lock"] and time.monotonic() - started < 20


def test_reading_a_corpus_is_the_only_thing_that_imports_datasets(master):
    code = ("import sys, preprocess; preprocess.open_corpus(sys.argv[1]); "
            "print([m for m in ('datasets', 'pyarrow', 'torch', 'matplotlib') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code, str(master)], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    assert result.stdout == "[]\n"


# ---------------------------------------------------------------- killed and continued


def finished_files(folder):
    """{name: time} of the files that a killed run has noted as finished."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for name in ("text.partial/plan.json", "text/text.json")
             if (path := folder / name).exists()]
    return {name: path.stat().st_mtime_ns for plan in plans for name in plan["files"]
            for path in folder.glob(f"text*/{name}")}


@pytest.mark.parametrize("moment", ["text.partial/train_020.parquet", "text/text.json", "tokens.partial/tok400.model",
                                    "tokens.partial/train_010.bin", "train_005.bin"])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_files(large, tmp_path, moment):
    source, whole = large
    arguments, folder = ["prepare-dataset", "--dataset", source, "--vocab-size", 400, "--data-dir"], tmp_path / "data"
    process = command(*arguments, folder)
    while not (folder / moment).exists() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode in (0, -9)            # 0: it was faster than this test
    if not (folder / "meta.json").exists():
        assert "not finished" in refused_to_open(folder)
    finished = finished_files(folder)
    assert finished
    run(*arguments, folder)
    assert finished_files(folder).items() >= finished.items(), "a finished file was made again"
    assert prepared(folder) == whole
    assert not list(folder.rglob("*.tmp")) and not list(folder.glob("*.partial"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A source that takes a moment to prepare, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("large")
    source = write_jsonl(folder / "a.jsonl", tales(1500))
    run("prepare-dataset", "--dataset", source, "--vocab-size", 400, "--data-dir", folder / "whole")
    return source, prepared(folder / "whole")


def test_a_kill_between_the_last_moves_is_repaired(data, corpus_file, monkeypatch):
    """The exchange of old for new files, stopped after each of its steps."""
    arguments = ["prepare-dataset", "--dataset", corpus_file, "--vocab-size", 300, "--data-dir", data, "--overwrite"]
    for stop_after in (0, 1, 30):
        moved = []

        def failing(source, target, moved=moved, stop_after=stop_after):
            if source.parent.name == "tokens.partial":
                if len(moved) == stop_after:
                    raise KeyboardInterrupt
                moved.append(target)
            os.replace(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "replace_file", failing)
            assert "same command goes on" in run(*arguments, code=130)
        assert "not finished" in refused_to_open(data)
    run(*arguments)
    assert open_corpus(data).tokenizer.vocab_size == 300 and not (data / "tok400.model").exists()


def test_a_run_that_overwrites_leaves_the_old_corpus_usable_until_the_end(data, corpus_file, monkeypatch):
    before = prepared(data)

    def stopped(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(preprocess, "finish", stopped)
    arguments = ["prepare-dataset", "--dataset", corpus_file, "--vocab-size", 300, "--data-dir", data, "--overwrite"]
    run(*arguments, code=130)
    assert prepared(data) == before
    monkeypatch.undo()
    run(*arguments)
    assert open_corpus(data).tokenizer.vocab_size == 300


def test_an_exception_in_a_worker_reaches_the_user(data, monkeypatch):
    def fails(self, texts):
        raise RuntimeError("broken worker")
    monkeypatch.setattr(Tokenizer, "encode_documents", fails)
    with pytest.raises(RuntimeError, match="broken worker"):
        preprocess.pretokenize(data, 2, overwrite=True)
    open_corpus(data)


def test_encoding_never_runs_far_ahead_of_the_writer(tokenizer, monkeypatch):
    """A bounded number of batches is read before the first result is taken."""
    read = []

    def endless(path, entry):
        for i in itertools.count():
            read.append(i)
            yield "word " * preprocess.BATCH_CHARS
    monkeypatch.setattr(preprocess, "read_text_file", endless)
    encoded = preprocess.encode_files(tokenizer, {"a": None}, workers=2)
    for _ in range(3):
        next(encoded)
    encoded.close()
    assert len(read) <= 3 + 2 * 2 + 1


# ---------------------------------------------------------------- real stories


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="the TinyStories sample is not beside the repository")
def test_real_stories_come_back_from_the_shards(tmp_path):
    import pyarrow.parquet
    run("prepare-dataset", "--dataset", TINYSTORIES, "--vocab-size", 4096, "--num-files", 5,
        "--data-dir", tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    columns = {split: pyarrow.parquet.read_table(TINYSTORIES / "data" / f"{split}-00000-of-00001.parquet")["text"]
               .to_pylist() for split in ("train", "validation")}
    assert stories_of(corpus.train, corpus.tokenizer) == columns["train"][:math.ceil(len(columns["train"]) / 10)]
    assert stories_of(corpus.val, corpus.tokenizer) == columns["validation"]
