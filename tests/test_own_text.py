"""A person's own text, as it lies on a disk: each kind is prepared and trained on through the commands."""

import csv
import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import export
import preprocess
import train
from model import read_checkpoint
from preprocess import open_corpus

SHAPE = ["--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--intermediate-size", 32, "--block-size", 16]
QUICK = ["--tokens-per-iter", 64, "--batch-size", 2, "--max-iters", 2, "--eval-tokens", 400, "--final-eval-tokens", 400,
         "--sample-tokens", 8, "--device", "cpu"]
LEARNING = ["--tokens-per-iter", 512, "--batch-size", 16, "--max-iters", 60, "--embedding-learning-rate", 0.01,
            "--eval-interval", 30]
ENGLISH = "The cat sat on the mat and saw a red ball roll down the hill while big dogs ran far away home".split()
RUSSIAN = ("жила была кошка и она любила играть с красным мячом который катился под гору пока большие собаки "
           "бежали домой Ёжик объел щавель").split()
CHINESE = "从前有一只小猫它喜欢在山上玩红色的球大狗跑回家了妈妈说你好孩子们都笑起来太阳出来天空很蓝"


def run(script, *arguments, code=0):
    """The output of a command, which ends with `code` and in words, never in a traceback."""
    result = CliRunner().invoke(script.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.output


def prepare(dataset, data_dir, *options, code=0):
    return run(preprocess, "prepare-dataset", "--dataset", dataset, "--data-dir", data_dir, *options, code=code)


def error_line(output):
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    return line


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(out):
    """{iteration: validation loss}."""
    return {row["iter"]: row["val_loss"] for row in metrics(out) if "val_loss" in row}


def texts_of(data_dir):
    """All texts in a prepared corpus, sorted."""
    corpus = open_corpus(data_dir)
    found = []
    for stream in (corpus.train, corpus.val):
        ids, starts = stream.read(0, len(stream)).tolist(), [*stream.story_starts().tolist(), len(stream)]
        found += [corpus.tokenizer.decode(ids[a:b]) for a, b in zip(starts, starts[1:])]
    return sorted(found)


def trains(data_dir, out, *options):
    """Train two iterations on the corpus: the first loss is that of a model that knows nothing."""
    run(train, *SHAPE, *QUICK, "--data-dir", data_dir, "--out-dir", out, *options)
    vocab_size = open_corpus(data_dir).tokenizer.vocab_size
    assert losses(out).keys() == {0, 2} and losses(out)[0] == pytest.approx(math.log(vocab_size), abs=0.3)


def tales(count, words=ENGLISH, space=" ", seed=0):
    rng = random.Random(seed)
    return [f"{i}. " + space.join(rng.choices(words, k=rng.randint(10, 30))) + "." for i in range(count)]


# Files.


def test_a_nested_folder_of_text_files_with_marks_of_windows_and_separators(tmp_path):
    notes, texts = tmp_path / "notes", tales(60)
    (notes / "2023" / "spring").mkdir(parents=True)
    (notes / "windows.txt").write_bytes(b"\xef\xbb\xbf" + f"{texts[0]}\n\nEnd.".replace("\n", "\r\n").encode())
    (notes / "2023" / "many.txt").write_text("\n<|endoftext|>\n".join(texts[1:50]), encoding="utf-8")
    for i, text in enumerate(texts[50:]):
        (notes / "2023" / "spring" / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare(notes, tmp_path / "data", "--vocab-size", 300)
    assert texts_of(tmp_path / "data") == sorted([f"{texts[0]}\n\nEnd.", *texts[1:]])
    trains(tmp_path / "data", tmp_path / "out")
    chat = subprocess.run([sys.executable, ROOT / "chat.py", "--out-dir", tmp_path / "out", "--prompt", "The cat",
                           "--max-new-tokens", "5", "--seed", "1"], capture_output=True, text=True, encoding="utf-8",
                          env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr


@pytest.mark.parametrize("encoding", ["cp1251", "utf-16"])
def test_text_that_is_not_utf8_is_named_by_its_file(tmp_path, encoding):
    folder = tmp_path / "texts" / "old"
    folder.mkdir(parents=True)
    (folder / "good.txt").write_text("\n\n".join(tales(20)), encoding="utf-8")
    (folder / "letter.txt").write_bytes(" ".join(RUSSIAN).encode(encoding))
    line = error_line(prepare(tmp_path / "texts", tmp_path / "data", "--vocab-size", 300, code=1))
    assert str(folder / "letter.txt") in line and "UTF-8" in line
    (folder / "letter.txt").write_text(" ".join(RUSSIAN), encoding="utf-8")
    prepare(tmp_path / "texts", tmp_path / "data", "--vocab-size", 320)


def write_jsonl(path, texts):
    rows = (json.dumps(dict(id=i, story=text, tags=["a"])) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(rows), encoding="utf-8")


def write_csv(path, texts):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
        csv.writer(file).writerows([["id", "story"], *enumerate(texts)])


def write_parquet_folder(path, texts):
    import pyarrow
    import pyarrow.parquet
    path.mkdir()
    for i in range(0, len(texts), 25):
        table = pyarrow.table(dict(id=list(range(len(texts[i:i + 25]))), story=texts[i:i + 25]))
        pyarrow.parquet.write_table(table, path / f"part-{i:04d}.parquet")


@pytest.mark.parametrize("name, write", [("a.jsonl", write_jsonl), ("a.csv", write_csv),
                                         ("parquet", write_parquet_folder)])
def test_columns_of_other_names(tmp_path, name, write):
    texts = [*tales(80), 'He said: "Come, and\nsee", and went.']
    write(tmp_path / name, texts)
    line = error_line(prepare(tmp_path / name, tmp_path / "data", "--vocab-size", 300, code=1))
    assert "'text'" in line and "id, story" in line and "--text-field" in line
    prepare(tmp_path / name, tmp_path / "data", "--vocab-size", 300, "--text-field", "story")
    assert texts_of(tmp_path / "data") == sorted(texts)
    trains(tmp_path / "data", tmp_path / "out")


# Languages.


@pytest.mark.parametrize("words, space, vocab_size", [(RUSSIAN, " ", 360), (CHINESE, "", 340)], ids=["ru", "zh"])
def test_another_language_comes_back_and_unknown_characters_are_spelled_in_bytes(tmp_path, words, space, vocab_size):
    texts = tales(80, words, space)
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(tmp_path / "a.jsonl", tmp_path / "data", "--text-field", "story", "--vocab-size", vocab_size)
    assert texts_of(tmp_path / "data") == sorted(texts)
    tokenizer = open_corpus(tmp_path / "data").tokenizer
    strange = "Ελλάδα 日本語 😀 " + texts[0]
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert any(tokenizer.byte_values[i] >= 0 for i in tokenizer.encode("Ω"))
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode()) / 2
    trains(tmp_path / "data", tmp_path / "out")


def test_a_vocabulary_too_small_for_the_alphabet_names_one_that_works(tmp_path):
    texts = ["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) for i in range(100)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = [tmp_path / "a.jsonl", tmp_path / "data", "--text-field", "story"]
    line = error_line(prepare(*options, "--vocab-size", 300, code=1))
    prepare(*options, *re.search(r"(--vocab-size) (\d+) or more", line).groups())
    assert texts_of(tmp_path / "data") == sorted(texts)


# Little text.


def test_a_corpus_too_small_for_the_vocabulary_names_one_that_fits(tmp_path):
    (tmp_path / "poem.txt").write_text("\n\n".join(tales(40)), encoding="utf-8")
    line = error_line(prepare(tmp_path / "poem.txt", tmp_path / "data", code=1))
    assert "too small for a vocabulary of 4096" in line
    prepare(tmp_path / "poem.txt", tmp_path / "data", *re.search(r"(--vocab-size) (\d+) or less", line).groups())
    trains(tmp_path / "data", tmp_path / "out")


def test_one_short_document(tmp_path):
    text = "The cat sat on the mat.\nThe dog saw the cat, and the cat saw the dog. They sat and sat and sat.\n"
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    line = error_line(prepare(tmp_path / "short.txt", tmp_path / "data", code=1))
    size = re.search(r"--vocab-size (\d+)", line)
    prepare(tmp_path / "short.txt", tmp_path / "data", "--vocab-size", size[1])
    head, tail = open_corpus(tmp_path / "data").train, open_corpus(tmp_path / "data").val
    tokenizer = open_corpus(tmp_path / "data").tokenizer
    assert "".join(tokenizer.decode(stream.read(0, len(stream))) for stream in (head, tail)) == text
    trains(tmp_path / "data", tmp_path / "out")
    line = error_line(run(train, *QUICK, "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "long", code=1))
    assert "fewer than one window" in line and "--block-size" in line


@pytest.mark.parametrize("text", ["a", "again<|endoftext|>again"])
def test_hardly_any_text_ends_in_words(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "--dataset" in error_line(prepare(tmp_path / "a.txt", tmp_path / "data", code=1))


# Going on from a trained model.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that knows the tales a little, and other tales prepared with its tokenizer in `mine`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "old.txt").write_text("<|endoftext|>".join(tales(400)), encoding="utf-8")
    (folder / "new.txt").write_text("<|endoftext|>".join(tales(200, ENGLISH[5:], seed=1)), encoding="utf-8")
    prepare(folder / "old.txt", folder / "data", "--vocab-size", 300)
    prepare(folder / "new.txt", folder / "mine", "--tokenizer", folder / "data" / "tok300.model")
    run(train, *SHAPE, *QUICK, *LEARNING, "--data-dir", folder / "data", "--out-dir", folder / "out")
    return folder


def go_on(folder, out, *options, checkpoint="out/best.pt", data="mine", code=0):
    return run(train, *QUICK, "--init-from", folder / checkpoint, "--data-dir", folder / data, "--out-dir", out,
               *options, code=code)


def test_new_text_takes_the_tokenizer_as_it_is(trained):
    old, new = open_corpus(trained / "data"), open_corpus(trained / "mine")
    assert new.tokenizer.sha256 == old.tokenizer.sha256 and new.meta["vocab_size"] == 300
    assert texts_of(trained / "mine") == sorted(tales(200, ENGLISH[5:], seed=1))
    again = [trained / "new.txt", trained / "mine"]
    assert "nothing to do" in prepare(*again, "--tokenizer", trained / "data" / "tok300.model")
    assert "--overwrite" in error_line(prepare(*again, "--vocab-size", 300, code=1))
    before = (trained / "mine" / "meta.json").read_bytes()
    run(preprocess, "pretokenize", "--data-dir", trained / "mine", "--overwrite")
    assert (trained / "mine" / "meta.json").read_bytes() == before


def test_a_tokenizer_that_was_trained_anew_is_noticed(trained, tmp_path):
    (tmp_path / "tok.model").write_bytes((trained / "data" / "tok300.model").read_bytes())
    options = [trained / "new.txt", tmp_path / "data", "--tokenizer", tmp_path / "tok.model"]
    prepare(*options)
    (tmp_path / "tok.model").write_bytes(preprocess.train_sentencepiece(tales(90, RUSSIAN), 300))
    assert "older than the files of --tokenizer" in error_line(prepare(*options, code=1))
    prepare(*options, "--overwrite")
    assert texts_of(tmp_path / "data") == sorted(tales(200, ENGLISH[5:], seed=1))


@pytest.mark.parametrize("name", ["out/best.pt", "data", "nothing.model", "new.txt"])
def test_what_is_no_tokenizer_is_refused_with_the_file_to_name(trained, tmp_path, name):
    line = error_line(prepare(trained / "new.txt", tmp_path / "data", "--tokenizer", trained / name, code=1))
    assert str(trained / name) in line and "data/tok4096.model" in line
    assert not (tmp_path / "data" / "text").exists()


def test_a_foreign_tokenizer_and_another_size_are_refused(trained, tmp_path):
    import sentencepiece
    with open(tmp_path / "foreign.model", "wb") as file:  # SentencePiece's own settings: it changes spaces
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(tales(50)), model_writer=file, vocab_size=60,
                                                 minloglevel=3)
    options = [trained / "new.txt", tmp_path / "data", "--tokenizer"]
    assert "that preprocess.py made" in error_line(prepare(*options, tmp_path / "foreign.model", code=1))
    line = error_line(prepare(*options, trained / "data" / "tok300.model", "--vocab-size", 400, code=1))
    assert "400" in line and "300" in line


def test_it_begins_with_what_the_model_knows_and_learns(trained, tmp_path):
    go_on(trained, tmp_path / "out", *LEARNING, "--dropout", 0.1)
    loss, known = losses(tmp_path / "out"), losses(trained / "out")
    assert known[0] == pytest.approx(math.log(300), abs=0.3)
    assert loss[0] < known[0] - 2 and loss[60] < loss[0] - 0.1
    contents = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert contents["model_config"] == read_checkpoint(trained / "out" / "best.pt")["model_config"] | {"dropout": 0.1}
    assert contents["progress"]["iter"] == 60 and metrics(tmp_path / "out")[0]["iter"] == 0
    run(train, "--resume", "--data-dir", trained / "mine", "--out-dir", tmp_path / "out", "--max-iters", 62)


def test_the_optimizer_and_the_schedule_are_fresh(trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", lambda run, log: seen.append(run))
    for checkpoint in ("out/best.pt", "out/ckpt.pt"):
        go_on(trained, tmp_path / checkpoint, checkpoint=checkpoint)
        (run,), weights = seen, read_checkpoint(trained / checkpoint)["model"]
        assert run.progress == train.Progress() and run.model.training
        assert not any(member.state for member in run.optimizer.members)
        assert all(torch.equal(weight, weights[name]) for name, weight in run.model.state_dict().items())
        assert all(weight.requires_grad for weight in run.model.parameters())
        seen.clear()


def test_an_exported_pt_is_enough_and_its_tokenizer_can_be_taken_out(trained, tmp_path):
    for kind, name in (("pt", "small.pt"), ("tokenizer", "tok.model")):
        run(export, "--format", kind, "--checkpoint", trained / "out" / "best.pt", "--output", tmp_path / name)
    prepare(trained / "new.txt", tmp_path / "mine", "--tokenizer", tmp_path / "tok.model")
    go_on(trained, tmp_path / "small")
    go_on(tmp_path, tmp_path / "out", checkpoint="small.pt")
    assert losses(tmp_path / "out")[0] == losses(tmp_path / "small")[0] < math.log(300) - 2


def test_another_tokenizer_is_refused_with_commands_that_work(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(trained / "new.txt", "mine", "--vocab-size", 290)
    options = [*QUICK, "--init-from", trained / "out" / "best.pt", "--data-dir", "mine"]
    line = error_line(run(train, *options, code=1))
    assert "another tokenizer" in line and not (tmp_path / "out" / "ckpt.pt").exists()
    for command in re.findall("`python (.*?)`", line):
        script, *words = command.split()
        run(dict(export=export, preprocess=preprocess)[script.removesuffix(".py")], *words)
    run(train, *options)


@pytest.mark.parametrize("flags, values", [(["--n-layer", 3], ["--n-layer", "3", "1"]),
                                           (["--qk-norm"], ["True", "False"]),
                                           (["--preset", "llama"], ["--preset llama", "rotary", "learned"])])
def test_another_shape_is_refused_with_both_values(trained, tmp_path, flags, values):
    line = error_line(go_on(trained, tmp_path / "out", *flags, code=1))
    assert all(value in line for value in values)


def test_the_same_shape_may_be_said(trained, tmp_path):
    go_on(trained, tmp_path / "out", *SHAPE, "--vocab-size", 300)


def test_what_does_not_go_together_is_refused(trained, tmp_path):
    assert "--resume" in go_on(trained, tmp_path / "out", "--resume", code=2)
    assert "would delete" in error_line(go_on(trained, trained / "out", "--overwrite", code=1))
    assert "already holds a run" in error_line(go_on(trained, trained / "out", code=1))
    assert "nothing.pt" in error_line(go_on(trained, tmp_path / "out", checkpoint="nothing.pt", code=1))
    assert (trained / "out" / "best.pt").exists()
