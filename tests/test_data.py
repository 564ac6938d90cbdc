import hashlib
import io
import itertools
import json
import os
import random
import shlex
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import click
import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import CONTEXT_SETTINGS, IGNORE_INDEX, Command, CorpusConfig, UserError, only_fields, setting_options
from data import (MAX_CHARS, Corpus, Tokenizer, TokenStream, TrainLoader, Validation, chunks, inflections,
                  prepare_command, word_prompt, words_used)

CPU = torch.device("cpu")
BOS = 1
# Any text that UTF-8 can hold, and often U+2581, SentencePiece's own mark for a space.
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\u2581 ")), max_size=60)
TRICKY = ["", " ", "  two  spaces  ", "One.\n\n\tTwo.\r\n", "café", "你好", "😀👩‍👩‍👧", "<s></s><unk><0x41>", "a\x00b",
          "e\u0301", "\ufffd"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = settings(max_examples=100, deadline=None, derandomize=True)


def tales(count, seed=0):
    """`count` different short texts with letters of one, two, three and four bytes."""
    rng = random.Random(seed)
    words = "the cat sat on a mat café naïve жила была кошка и она любила ёжика 你好 😀 dogs ran far away".split()
    return [f"Tale {i}. " + " ".join(rng.choices(words, k=rng.randint(5, 30))) + ".\n\nEnd." for i in range(count)]


def train_tokenizer(texts, vocab_size=400, **options):
    """The bytes of a SentencePiece model, trained as preprocess.py does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**dict(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=0.9999, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True, max_sentence_length=65536, unk_id=0,
        bos_id=1, eos_id=2, pad_id=-1, minloglevel=3, num_threads=1) | options)
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(train_tokenizer(tales(300)))


def document(tokenizer, text):
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def write_corpus(folder, tokenizer, train, val, **more):
    """A prepared corpus of lists of stories, one shard each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tok400.model").write_bytes(tokenizer.model_bytes)
    meta = {"format": 2, "arguments": asdict(CorpusConfig(dataset="my tales.txt", vocab_size=400, num_files=2,
                                                          data_dir=str(folder))),
            "source": "my tales.txt", "vocab_size": 400,
            "tokenizer": {"file": "tok400.model", "sha256": tokenizer.sha256}, **more}
    for split, shards in dict(train=train, val=val).items():
        meta[split] = []
        for i, texts in enumerate(shards):
            ids = np.array([i for text in texts for i in document(tokenizer, text)], dtype="<u2")
            ids.tofile(folder / f"{split}_{i:03d}.bin")
            meta[split].append(dict(file=f"{split}_{i:03d}.bin", tokens=len(ids), stories=len(texts),
                                    bytes=sum(len(text.encode()) for text in texts),
                                    sha256=hashlib.sha256(ids).hexdigest()))
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


TRAIN, VAL = [tales(30), tales(20, seed=1)], [tales(40, seed=2)]


@pytest.fixture(scope="session")
def master(tmp_path_factory, tokenizer):
    return write_corpus(tmp_path_factory.mktemp("prepared") / "my data", tokenizer, TRAIN, VAL)


@pytest.fixture(scope="session")
def corpus(master):
    return Corpus(master)


@pytest.fixture
def folder(master, tmp_path):
    """A prepared corpus that a test may damage."""
    return shutil.copytree(master, tmp_path / "my data")


def stories_of(stream, tokenizer):
    """The texts in a TokenStream."""
    ids, starts = stream.read(0, len(stream)), [*stream.story_starts, len(stream)]
    return [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)]


# -----------------------------------------------------------------------------
# Tokenizer

@CASES
@given(TEXTS)
@example("café жила 你好 😀")
@example("\u2581a\u2581\u2581 b \u2581")
def test_a_text_comes_back_and_its_tokens_have_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(document(tokenizer, text)) == text
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[document(tokenizer, text)].sum() == len(text.encode())


def test_tricky_and_very_long_texts_come_back(tokenizer):
    for text in (*TRICKY, "x" * 50_000, "й" * 50_000, "long words and spaces " * 5000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_is_cut_without_changing_its_tokens(tokenizer):
    text = "  ".join(tales(900))
    assert len(text) > 3 * MAX_CHARS and tokenizer.encode(text) == tokenizer.processor.encode(text)
    for text in (text, "x" * 50_000, "a " + "x" * 50_000, " " * 50_000):
        pieces = list(chunks(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= MAX_CHARS
    assert list(chunks("ab cd efgh", 4)) == ["ab", " cd", " efg", "h"]


def test_special_ids_are_real_single_and_never_come_from_text(tokenizer):
    processor = tokenizer.processor
    assert (tokenizer.bos_id, tokenizer.eos_id) == (processor.bos_id(), processor.eos_id()) == (1, 2)
    assert processor.is_control(1) and processor.is_control(2) and tokenizer.decode([1, 2, 0]) == ""
    for text in ("<s> Hi </s> <unk> 你", *TRICKY):
        assert not {0, 1, 2} & set(tokenizer.encode(text))


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(UserError, match=r"'\\ud800' at character 4"):
        tokenizer.encode("bad \ud800 text")


@pytest.mark.parametrize("make", [
    lambda model: b"", lambda model: b"no model at all", lambda model: model[:2000], lambda model: bytes(100),
    lambda model: train_tokenizer(tales(50), bos_id=-1), lambda model: train_tokenizer(tales(50), unk_id=1, bos_id=0),
    lambda model: train_tokenizer(tales(50), vocab_size=120, byte_fallback=False)],
    ids=["empty", "text", "cut", "zeros", "no bos", "other ids", "no bytes"])
def test_a_vocabulary_that_is_not_ours_is_refused_in_one_line_with_its_name(tokenizer, make):
    with pytest.raises(UserError) as caught:
        Tokenizer(make(tokenizer.model_bytes), "tok9.model")
    message = caught.value.message
    assert message.startswith("tok9.model is not a vocabulary") and "prepare the corpus again" in message
    assert "\n" not in message


@CASES
@given(st.lists(st.integers(0, 399), max_size=40), st.lists(st.integers(3, 258), max_size=12))
def test_ids_of_any_kind_become_the_text_of_their_bytes(tokenizer, ids, byte_ids):
    """Also bytes that are no UTF-8 with control tokens between them, as a young model writes."""
    for sequence in (ids, byte_ids, ids + byte_ids, byte_ids + ids):
        expected = b"".join(tokenizer.token_bytes[i] for i in sequence).decode("utf-8", "replace")
        assert tokenizer.decode(np.array(sequence, dtype=np.int64)) == expected


# -----------------------------------------------------------------------------
# Token ids on disk

def test_reading_across_shards_equals_reading_one_ring():
    rng = np.random.default_rng(0)
    shards = [rng.integers(1, 9, size).astype(np.uint16) for size in (7, 1, 20)]
    stream, row = TokenStream(shards, BOS), np.concatenate(shards)
    assert len(stream) == 28 and np.array_equal(stream.story_starts, np.flatnonzero(row == BOS))
    for start in range(40):
        for count in (1, 2, 7, 8, 9, 28, 29, 70):
            read = stream.read(start, count)
            assert read.dtype == np.uint16 and np.array_equal(read, np.tile(row, 5)[start:start + count])


def test_a_prepared_corpus_gives_back_its_stories_in_order(corpus, tokenizer):
    assert stories_of(corpus.train, tokenizer) == [*TRAIN[0], *TRAIN[1]] and stories_of(corpus.val, tokenizer) == VAL[0]
    assert corpus.tokenizer.model_bytes == tokenizer.model_bytes and corpus.meta["source"] == "my tales.txt"
    assert corpus.tokenizer.byte_lengths()[corpus.train.read(0, len(corpus.train))].sum() \
        == sum(shard["bytes"] for shard in corpus.meta["train"])


def test_the_fingerprint_is_that_of_tokenizer_and_training_shards_in_any_folder(corpus, folder, tokenizer, tmp_path):
    assert Corpus(folder).fingerprint == corpus.fingerprint
    others = [write_corpus(tmp_path / "a", tokenizer, TRAIN, [tales(9)]),
              write_corpus(tmp_path / "b", tokenizer, TRAIN[:1], VAL),
              write_corpus(tmp_path / "c", Tokenizer(train_tokenizer(tales(300), 401)), TRAIN, VAL)]
    assert [Corpus(other).fingerprint == corpus.fingerprint for other in others] == [True, False, False]
    meta, other = json.loads((folder / "meta.json").read_text(encoding="utf-8")), train_tokenizer(tales(310))
    (folder / "tok400.model").write_bytes(other)  # the same ids mean other text
    meta["tokenizer"]["sha256"] = Tokenizer(other).sha256
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert Corpus(folder).fingerprint != corpus.fingerprint


def test_a_corpus_of_an_earlier_version_opens(folder, corpus):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for shard in meta["train"] + meta["val"]:
        shard |= dict(min_id=1, max_id=399)
    meta |= dict(format=1, floor=dict(nats_per_token=1.0, bits_per_byte=0.5), sha256="of the other keys")
    meta["arguments"] |= dict(files=None, tokenizer_sha256=None)
    del meta["arguments"]["data_dir"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert Corpus(folder).fingerprint == corpus.fingerprint
    assert Validation(Corpus(folder), 8, 0, False).floor is None


# -----------------------------------------------------------------------------
# What can be wrong with a corpus

def refused(folder):
    """(message, settings that its command prepares) of the one line in which a corpus is refused."""
    with pytest.raises(UserError) as caught:
        Corpus(folder)
    message = caught.value.message
    assert "\n" not in message and str(folder) in message
    words, typed = shlex.split(message[message.index("python preprocess.py"):]), []

    @click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
    @click.option("--overwrite", is_flag=True)
    @setting_options(CorpusConfig)
    def command(overwrite, **values):
        typed.append(CorpusConfig(**only_fields(CorpusConfig, values)))
    assert words[:3] == ["python", "preprocess.py", "prepare-dataset"]
    assert CliRunner().invoke(command, words[3:]).exit_code == 0
    return message, typed[0]


def made_with(folder):
    return CorpusConfig(dataset="my tales.txt", vocab_size=400, num_files=2, data_dir=str(folder))


def test_a_missing_corpus_names_the_command_that_makes_one_and_creates_nothing(tmp_path):
    message, settings = refused(tmp_path / "my corpus")
    assert "does not exist" in message and settings == CorpusConfig(data_dir=str(tmp_path / "my corpus"))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_corpus_names_the_command_that_continues_it(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").unlink()
    (folder / "partial").mkdir()
    (folder / "partial" / "arguments.json").write_text(json.dumps(meta["arguments"]), encoding="utf-8")
    message, settings = refused(folder)
    assert "is not finished" in message and settings == made_with(folder)


def flip(path, place=5):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, says", [
    (lambda f: os.truncate(f / "val_000.bin", 0), "damaged"), (lambda f: os.truncate(f / "val_000.bin", 11), "damaged"),
    (lambda f: os.truncate(f / "train_001.bin", 100), "train_001.bin has changed"),
    (lambda f: (f / "train_001.bin").unlink(), "train_001.bin"),
    (lambda f: flip(f / "train_000.bin"), "train_000.bin has changed"),
    (lambda f: flip(f / "val_000.bin"), "val_000.bin has changed"),
    (lambda f: (f / "tok400.model").unlink(), "tok400.model"),
    (lambda f: (f / "tok400.model").write_bytes(train_tokenizer(tales(100), 401)), "not the tokenizer of these shards"),
    (lambda f: (f / "tok400.model").write_bytes(b"no"), "tok400.model is not a vocabulary")])
def test_a_damaged_corpus_names_the_file_and_the_command_that_made_it(folder, damage, says):
    damage(folder)
    message, settings = refused(folder)
    assert says in message and message.endswith(" --overwrite")
    assert settings == made_with(folder)


def test_a_token_outside_the_vocabulary_is_refused_and_never_clamped(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ids = np.fromfile(folder / "train_001.bin", dtype="<u2")
    ids[17] = 400
    ids.tofile(folder / "train_001.bin")
    meta["train"][1]["sha256"] = hashlib.sha256(ids).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert "train_001.bin contains token 400, the vocabulary ends at 399" in refused(folder)[0]


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', "[]", "3", '{"arguments": {}, "tokenizer": {}}'])
def test_a_damaged_meta_json_is_refused(folder, text):
    (folder / "meta.json").write_text(text, encoding="utf-8")
    refused(folder)


@pytest.mark.parametrize("name", ["tok400.model", "train_000.bin", "val_000.bin"])
def test_a_flipped_bit_anywhere_is_found_at_opening(folder, name):
    size = (folder / name).stat().st_size
    for place in range(0, size, size // 15):
        flip(folder / name, place)
        refused(folder)
        flip(folder / name, place)
    Corpus(folder)


def test_the_command_that_prepares_a_corpus_omits_defaults_and_quotes_words():
    assert prepare_command("data") == "python preprocess.py prepare-dataset"
    assert prepare_command("my data", dict(dataset="sample", seed=1337, sample_rate=0.5, source="x")) \
        == 'python preprocess.py prepare-dataset --dataset sample --sample-rate 0.5 --data-dir "my data"'


# -----------------------------------------------------------------------------
# Word prompts

def test_a_word_prompt_is_a_line_of_its_own_with_an_empty_line_after_it():
    assert word_prompt(["fox", "umbrella", "rain"]) + "Once" == "Words: fox, umbrella, rain.\n\nOnce"


@pytest.mark.parametrize("word, forms", [
    ("fox", "foxes foxed foxing"), ("umbrella", "umbrellas"), ("church", "churches"), ("baby", "babies babied babying"),
    ("happy", "happier happiest"), ("play", "plays played playing"), ("run", "runs running runner"),
    ("big", "bigger biggest"), ("bake", "bakes baked baking baker"), ("sleep", "sleeps sleeping"), ("show", "showed"),
    ("nice", "nicer nicest")])
def test_plain_inflections_of_a_word_count_as_the_word(word, forms):
    assert {word, *forms.split()} <= inflections(word) and len(inflections(word)) <= 6
    for form in (word, word.upper(), *forms.split()):
        assert words_used([word], f'"The {form}!"') == [word]


@pytest.mark.parametrize("word, text", [
    ("cat", "A caterpillar."), ("rain", "A rainbow trains."), ("car", "He was scared of his care."), ("baby", "babys"),
    ("run", "runing"), ("hop", "They hoped."), ("mouse", "mice"), ("fox", ""), ("fox", "fo x")])
def test_other_words_that_contain_a_word_are_not_that_word(word, text):
    assert words_used([word], text) == []


def test_the_words_used_keep_the_order_in_which_they_were_asked_for():
    assert words_used(["rain", "fox", "naïve", "bake"], "Naïve Foxes were baking!") == ["fox", "naïve", "bake"]


# -----------------------------------------------------------------------------
# Training windows

def numbered(count, story_starts=()):
    """A stream whose token at position i is i + 10, and bos at the starts of stories."""
    ids = np.arange(count, dtype=np.uint16) + 10
    ids[list(story_starts)] = BOS
    return TokenStream([ids[:count // 3], ids[count // 3:]], BOS)


def rows_of(loader, first, count):
    """Windows number `first` on, as rows of block_size + 1 positions."""
    x, y = next(loader.batches(0, first + count, CPU))
    assert torch.equal(x[:, 1:], y[:, :-1])
    return torch.cat([x, y[:, -1:]], dim=1)[first:].numpy() - 10


def starts_of(loader, first, count):
    return [loader.window_start(i) for i in range(first, first + count)]


def test_an_epoch_predicts_every_token_once_from_the_one_before_it():
    loader = TrainLoader(numbered(400), 8, seed=1, align_stories=False)
    assert loader.windows_per_epoch == 50
    for epoch in range(3):
        rows = rows_of(loader, epoch * 50, 50)
        assert sorted(rows[:, 1:].flatten()) == list(range(400))
        assert np.array_equal(rows[:, 1:], (rows[:, :-1] + 1) % 400)


def test_of_a_corpus_that_is_not_whole_windows_less_than_one_window_is_left_out_of_an_epoch():
    loader = TrainLoader(numbered(407), 8, seed=1, align_stories=False)
    left_out = [set(range(407)) - set(rows_of(loader, epoch * 50, 50)[:, 1:].flatten().tolist()) for epoch in range(3)]
    assert [len(tokens) for tokens in left_out] == [7, 7, 7] and left_out[0] != left_out[1] != left_out[2]


def test_each_epoch_has_an_offset_and_an_order_of_its_own_from_the_seed():
    loaders = [TrainLoader(numbered(400), 8, seed, False) for seed in (1, 1, 2)]
    first, second = starts_of(loaders[0], 0, 50), starts_of(loaders[0], 50, 50)
    assert {start % 8 for start in first} != {start % 8 for start in second}
    order = [[(start - min(starts)) // 8 for start in starts] for starts in (first, second)]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1]) == list(range(50)) != order[0]
    assert starts_of(loaders[1], 50, 50) == second, "without having read the first epoch"
    assert starts_of(loaders[2], 0, 50) != first


def test_windows_depend_only_on_their_number():
    loader = TrainLoader(numbered(1000), 8, seed=1, align_stories=False)
    whole = starts_of(loader, 0, 400)
    assert [start for at in range(0, 400, 7) for start in starts_of(loader, at, 7)][:400] == whole
    assert [loader.window_start(i) for i in (399, 0, 130, 131)] == [whole[i] for i in (399, 0, 130, 131)]


def test_micro_batches_are_the_same_tokens_at_every_batch_size_step_and_number_of_processes():
    def batches(step, count, *arguments):
        loader = TrainLoader(numbered(1000), 8, seed=1, align_stories=False)
        return [torch.stack(pair) for pair in itertools.islice(loader.batches(step, *arguments), count)]
    whole = torch.cat(batches(0, 3, 8, CPU), dim=1)
    assert whole.dtype is torch.int64 and whole.shape == (2, 24, 8)
    assert torch.equal(whole[0] + 1, torch.where(whole[1] == 10, whole[0] + 1, whole[1]))
    assert torch.equal(torch.cat(batches(0, 12, 2, CPU), dim=1), whole)
    assert torch.equal(torch.cat(batches(5, 2, 2, CPU), dim=1), whole[:, 10:14]), "a resumed run"
    ranks = [batches(0, 6, 2, CPU, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half for pair in zip(*ranks) for half in pair], dim=1), whole)


def test_aligned_windows_start_at_stories_and_continue_through_long_ones():
    loader = TrainLoader(numbered(40, [0, 5, 30]), 8, seed=1, align_stories=True)  # stories of 5, 25 and 10 tokens
    assert sorted(starts_of(loader, 0, loader.windows_per_epoch)) == [0, 5, 13, 21, 30, 38]
    exact = TrainLoader(numbered(26, [0, 9]), 8, seed=1, align_stories=True)  # bos and 8 targets; bos and 16
    assert sorted(starts_of(exact, 0, exact.windows_per_epoch)) == [0, 9, 17]


def test_aligned_windows_are_shuffled_in_another_order_each_epoch_and_for_each_seed():
    stories = list(range(0, 400, 5))
    loaders = [TrainLoader(numbered(400, stories), 8, seed, align_stories=True) for seed in (1, 1, 2)]
    one, two, other = starts_of(loaders[0], 0, 80), starts_of(loaders[0], 80, 80), starts_of(loaders[2], 0, 80)
    assert sorted(one) == sorted(two) == sorted(other) == stories
    assert len(set(map(tuple, (stories, one, two, other)))) == 4 and starts_of(loaders[1], 80, 80) == two


def test_a_corpus_shorter_than_a_window_says_what_to_do():
    with pytest.raises(UserError, match="8 training tokens, fewer than one window of 9.*--block-size"):
        TrainLoader(numbered(8), 8, seed=1, align_stories=False)


@on_gpu
def test_on_cuda_the_batches_are_those_of_the_cpu_also_where_the_gpu_is_behind(corpus):
    batches, on_cuda = (TrainLoader(corpus.train, 8, seed=1, align_stories=True).batches(0, 16, torch.device(name))
                        for name in ("cpu", "cuda"))
    made = list(itertools.islice(on_cuda, 2))
    torch.cuda._sleep(10**9)  # half a second, in which nothing is copied
    made += itertools.islice(on_cuda, 48)
    for (x, y), (x_cuda, y_cuda) in zip(batches, made):
        assert x_cuda.is_cuda and torch.equal(x, x_cuda.cpu()) and torch.equal(y, y_cuda.cpu())


# -----------------------------------------------------------------------------
# Validation

STORY_STARTS = [0, 7, 12, 29, 33, 41]


def numbered_corpus(count=50, **meta):
    """Stories of 7, 5, 17, 4, 8 and 9 numbered tokens, each of as many bytes as its id says."""
    return SimpleNamespace(val=numbered(count, STORY_STARTS), meta=meta,
                           tokenizer=SimpleNamespace(byte_lengths=lambda: np.arange(100)))


def predicted(validation, batch_size):
    """(token before, token predicted) of every position that counts, in order; rows have block_size columns."""
    pairs = []
    for x, y in validation.batches(batch_size, CPU):
        assert x.shape == y.shape and x.dtype is y.dtype is torch.int64 and len(x) <= batch_size
        assert x.shape[1] == validation.block_size
        pairs += [(a, b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist()) if b != IGNORE_INDEX]
    return pairs


@pytest.mark.parametrize("tokens", [2, 9, 10, 17, 18, 25, 30, 49, 50, 0, 1000])
@pytest.mark.parametrize("align_stories", [False, True])
def test_validation_is_cut_inside_a_story_at_exactly_the_tokens_asked_for(tokens, align_stories):
    corpus = numbered_corpus()
    validation, end = Validation(corpus, 8, tokens, align_stories), min(tokens or 50, 50)
    text = corpus.val.read(0, end).tolist()
    expected = [pair for pair in itertools.pairwise(text) if not align_stories or pair[1] != BOS]
    for batch_size in (1, 3, 100):
        assert predicted(validation, batch_size) == expected
    assert all((y != IGNORE_INDEX).any() for _, y in validation.batches(1, CPU)), "the mean loss of none is nan"
    assert validation.num_targets == len(expected) and validation.text_bytes == sum(text) and validation.floor is None


def test_validation_of_a_single_token_still_predicts_one():
    assert Validation(numbered_corpus(), 8, 1, False).num_targets == 1


def test_aligned_validation_shows_a_story_from_its_first_token_and_none_before_it():
    validation = Validation(numbered_corpus(), 32, 0, align_stories=True)
    assert [row[0].item() for x, _ in validation.batches(2, CPU) for row in x] == [BOS] * 6


@pytest.mark.parametrize("tokens, stories, end", [
    (1, 1, 7), (7, 1, 7), (11, 1, 7), (12, 2, 12), (29, 3, 29), (30, 3, 29), (40, 4, 33), (41, 5, 41), (49, 5, 41),
    (50, 6, 50), (0, 6, 50)])
@pytest.mark.parametrize("align_stories", [False, True])
def test_where_the_surprisals_are_known_validation_ends_with_a_story_and_has_its_exact_floor(tokens, stories, end,
                                                                                             align_stories):
    nats = [3.5, 2.25, 7.0, 0.125, 4.0, 5.5]
    corpus = numbered_corpus(val_nats=nats)
    validation = Validation(corpus, 8, tokens, align_stories)
    text = corpus.val.read(0, end).tolist()
    targets = end - stories if align_stories else end - 1
    assert len(predicted(validation, 3)) == validation.num_targets == targets
    assert validation.floor == pytest.approx(sum(nats[:stories]) / targets, rel=1e-12)
    assert validation.text_bytes == sum(text)


def test_bytes_of_the_text_are_counted_and_not_its_characters(corpus, tokenizer):
    text = "".join(VAL[0])
    assert Validation(corpus, 16, 0, False).text_bytes == len(text.encode()) == corpus.meta["val"][0]["bytes"]
    assert len(text.encode()) > 1.2 * len(text), "or the test proves nothing"
    ids = document(tokenizer, VAL[0][0])[:-7]
    cut = Validation(corpus, 16, len(ids), True)
    assert cut.text_bytes == sum(len(tokenizer.token_bytes[i]) for i in ids)
