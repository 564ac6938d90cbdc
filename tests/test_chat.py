"""Talking to a model: what reaches stdout, what the commands do, how it stops and how it fails."""

import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from conftest import ROOT

import chat
from config import GPTConfig, SampleConfig
from data import Tokenizer, word_prompt
from model import GPT, load_checkpoint, save_checkpoint

TEXT = ("Once upon a time there was a little dog named Tim. He liked to play in the park with his friend Lily.\n\n"
        "One day they saw a big red ball. They were happy and went home.")
BLOCK_SIZE = 96
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")
LONG = 100_000  # tokens: a reply that lasts until something stops it


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Also where the tests run in the background of a shell, which ignores Ctrl-C there."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
    return Tokenizer(model.getvalue())


def small_gpt(tokenizer):
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64,
                         intermediate_size=32)).eval()


@pytest.fixture(scope="module")
def babbler(tokenizer, tmp_path_factory):
    """The folder of a model that writes random ASCII letters and never ends."""
    gpt = small_gpt(tokenizer)
    with torch.no_grad():
        letters = torch.tensor([len(tokenizer.decode([i])) == 1 and tokenizer.decode([i]).isalpha()
                                for i in range(tokenizer.vocab_size)])
        gpt.wpe.weight[:] = gpt.wte.weight[letters].mean(0) * 30
        gpt.wte.weight[~letters] = -gpt.wte.weight[letters].mean(0)
    folder = tmp_path_factory.mktemp("babbler")
    save_checkpoint(folder / "best.pt", gpt, tokenizer.model_bytes)
    return folder


@pytest.fixture
def reciter(tokenizer, tmp_path):
    """Make the folder of a model that continues a prompt with a given text and then ends the story.

    The position alone decides: its embedding drowns that of the token.
    """
    def make(prompt, text, **state):
        gpt = small_gpt(tokenizer)
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        start = len(tokenizer.encode(prompt))
        with torch.no_grad():
            gpt.wte.weight[:] = torch.nn.functional.normalize(torch.randn_like(gpt.wte.weight), dim=1) * 10
            gpt.wpe.weight[start:start + len(ids)] = gpt.wte.weight[ids] * 100
        save_checkpoint(tmp_path / "best.pt", gpt, tokenizer.model_bytes, **state)
        return tmp_path
    return make


def run(folder, *arguments, **options):
    return CliRunner().invoke(chat.main, ["--out-dir", str(folder), *map(str, arguments)], **options)


def converse(monkeypatch, folder, lines, keep_context=False, stops=(), **settings):
    """A conversation in which a person types `lines`; an exception among them is raised. Returns the exit status."""
    typed = iter(lines)

    def read_line(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(chat, "read_line", read_line)
    monkeypatch.setattr(chat, "more_pasted", lambda: False)
    sampling = SampleConfig(**dict(max_new_tokens=12, seed=1) | settings)
    loaded = chat.LoadedModel(folder / "best.pt", "cpu", "auto")
    try:
        chat.chat_loop(chat.Session(loaded, sampling, stops, keep_context))
    except KeyboardInterrupt:
        return 130
    return 0


def command(folder, *arguments):
    return [sys.executable, str(ROOT / "chat.py"), "--out-dir", str(folder), *map(str, arguments)]


# Text on stdout.

def test_prompt_prints_the_continuation_and_nothing_else(reciter):
    result = run(reciter("Once upon", " a time there was a dog."), "--prompt", "Once upon", input="this is not read")
    assert (result.exit_code, result.stdout) == (0, " a time there was a dog.\n")


def test_piped_input_prints_the_continuation_and_nothing_else(reciter):
    result = run(reciter("Once upon", " a time.\n\nThe end.\n"), input="Once upon")
    assert (result.exit_code, result.stdout) == (0, " a time.\n\nThe end.\n")


@pytest.mark.parametrize("typed, meant", [
    (b"Once upon\n", "Once upon"), (b"Once upon\r\n", "Once upon"), (b"Once upon \r\n", "Once upon"),
    (b"\xef\xbb\xbfOnce upon", "Once upon"), (b"Tim.\r\n\r\nOnce\n", "Tim.\n\nOnce"), (b"Tim.\n\n", "Tim.\n"),
    (b"  Once", "  Once"), (b"\n", ""), (b"   \r\n", ""), ("犬 é\n".encode(), "犬 é")])
def test_a_piped_prompt_is_cleaned_as_the_training_text_was(reciter, typed, meant):
    """The model has never seen a carriage return, a byte order mark or a space at the end of a text."""
    result = run(reciter(meant, " and so on."), "--json", input=typed)
    assert json.loads(result.stdout)["prompt"] == meant
    assert json.loads(result.stdout)["text"] == " and so on."


def test_a_prompt_from_the_command_line_or_typed_is_cleaned_likewise(monkeypatch, reciter, capsys):
    folder = reciter("Once upon", " a time.")
    assert run(folder, "--prompt", "Once upon \r\n").stdout == " a time.\n"
    converse(monkeypatch, folder, ["Once upon ", '"""', "Once upon", '"""'])
    assert capsys.readouterr().out == " a time.\n" * 2


def test_piped_input_is_utf_8_whatever_the_console_is_and_else_in_the_encoding_of_the_console(reciter):
    for typed in ("é".encode(), "é".encode("cp1252")):
        runner, folder = CliRunner(charset="cp1252"), reciter("é", " ok")
        result = runner.invoke(chat.main, ["--out-dir", str(folder), "--json"], typed)
        assert json.loads(result.stdout)["prompt"] == "é"


def test_statistics_go_to_stderr(reciter, tokenizer):
    result = run(reciter("Once", " upon a time."), "--prompt", "Once", "--seed", 5)
    tokens, prompt = len(tokenizer.encode(" upon a time.")), 1 + len(tokenizer.encode("Once"))
    assert re.search(rf"\[{tokens} tokens, [\d,]+ tokens/s, end of story, context {tokens + prompt} of {BLOCK_SIZE}, "
                     r"seed 5\]", result.stderr)


@pytest.mark.parametrize("state, said", [
    (dict(state=dict(iter=1234, seconds=1.0, best_val=1.25)), ", iteration 1,234, best validation loss 1.2500"),
    (dict(state=dict(iter=7, best_val=float("inf"))), ", iteration 7"), ({}, "")])
def test_the_model_is_described_on_stderr(reciter, state, said):
    folder, flags = reciter("a", " dog", **state), ["--prompt", "a", "--device", "cpu"]
    assert re.search(rf"best.pt: 0.07 M parameters{said}; cpu, float16\.", run(folder, *flags).stderr)
    assert "; cpu, bfloat16." in run(folder, *flags, "--dtype", "bfloat16").stderr
    assert "--device xpu9" in run(folder, *flags, "--device", "xpu9").stderr


def test_backslash_n_in_a_prompt_is_a_newline_which_cmd_cannot_type(reciter):
    assert run(reciter("One.\nTwo", " cats."), "--prompt", r"One.\nTwo").stdout == " cats.\n"


def test_an_empty_prompt_writes_a_story_from_nothing(reciter):
    folder = reciter("", "Once upon a time.")
    assert run(folder, "--prompt", "").stdout == "Once upon a time.\n"
    assert run(folder, input="\n").stdout == "Once upon a time.\n"


def test_the_stream_is_the_text_decoded_whole(reciter):
    text = " the 犬 said 😀😀 café\tto  Tim\x07.\n\n"
    assert run(reciter("x", text), "--prompt", "x").stdout == text


@pytest.mark.parametrize("flags", [[], ["--num-samples", 2]])
def test_a_character_cut_off_by_the_limit_is_shown_as_one(tokenizer, reciter, flags):
    limit = len(tokenizer.encode(" said 😀")) - 1  # three of the four bytes
    result = run(reciter("x", " said 😀"), "--prompt", "x", "--max-new-tokens", limit, *flags)
    assert result.stdout.split("---\n") == [" said \ufffd\n"] * (2 if flags else 1)


@pytest.mark.parametrize("prompt", [TEXT * 40, "犬😀 café " * 300, "Once"])
def test_a_text_that_outgrows_the_window_works_and_is_said_to(babbler, prompt):
    result = run(babbler, "--prompt", prompt, "--max-new-tokens", 2 * BLOCK_SIZE)
    assert result.exit_code == 0
    assert result.stderr.count("outgrown") == 1
    assert f"context {BLOCK_SIZE} of {BLOCK_SIZE}" in result.stderr
    assert len(result.stdout) == 2 * BLOCK_SIZE + 1
    assert "outgrown" not in run(babbler, "--prompt", "Once", "--max-new-tokens", 9).stderr


@pytest.mark.parametrize("flags", [["--dry-base", 2], ["--dry-allowed-length", 2], ["--top-k", 5, "--temperature", 0],
                                   ["--top-p", 0.5, "--temperature", 0], ["--min-p", 0.5, "--temperature", 0],
                                   ["--repetition-window", 9, "--repetition-penalty", 1]])
def test_a_flag_without_effect_is_refused(babbler, flags):
    result = run(babbler, "--prompt", "a", *flags)
    assert result.exit_code == 1 and f"Error: {flags[0]} has no effect with" in result.output
    needed = ["--temperature", 1, "--dry-multiplier", 0.8, "--repetition-penalty", 1.2]
    assert run(babbler, "--prompt", "a", *flags, *needed).exit_code == 0


@pytest.mark.parametrize("dtype, finite", [("float16", False), ("float32", True)])
def test_logits_that_overflow_end_with_the_flag_that_helps(tokenizer, tmp_path, dtype, finite):
    gpt = small_gpt(tokenizer)
    with torch.no_grad():
        gpt.blocks[0].mlp.c_fc.weight[:] = 3e4
        gpt.blocks[0].mlp.c_proj.weight[:] = 3e4
    save_checkpoint(tmp_path / "best.pt", gpt, tokenizer.model_bytes)
    result = run(tmp_path, "--prompt", "ab", "--dtype", dtype, "--max-new-tokens", 5)
    assert (result.exit_code == 0) == finite and ("use --dtype float32" in result.output) != finite


def test_a_seed_repeats_exactly_and_the_seed_used_is_shown(babbler):
    options = ["--prompt", "Once", "--max-new-tokens", 20]
    first = run(babbler, *options)
    seed = re.search(r"seed (\d+)", first.stderr)[1]
    assert run(babbler, *options, "--seed", seed).stdout == first.stdout
    assert run(babbler, *options, "--seed", int(seed) + 1).stdout != first.stdout
    assert run(babbler, *options).stdout != first.stdout
    assert run(babbler, *options, "--seed", 0).stderr.endswith("seed 0]\n")


@pytest.mark.parametrize("flags", [["--temperature", 0], ["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]])
def test_the_sampling_flags_reach_the_model(babbler, flags):
    options = ["--prompt", "Once", "--max-new-tokens", 20, *flags]
    assert len({run(babbler, *options, "--seed", seed).stdout for seed in range(3)}) == 1


# Samples and JSON.

def test_samples_are_continuations_of_the_same_prompt_in_one_batch(babbler, reciter):
    texts = run(babbler, "--prompt", "a", "--num-samples", 3, "--max-new-tokens", 9).stdout.split("---\n")
    assert len(set(texts)) == 3
    same = run(reciter("a", " dog"), "--prompt", "a", "--num-samples", 3)
    assert same.stdout == " dog\n---\n dog\n---\n dog\n"
    assert "3 x end of story" in same.stderr


def test_a_batch_at_temperature_0_repeats_the_single_story(babbler):
    options = ["--prompt", "Once", "--temperature", 0, "--max-new-tokens", 30]
    single = run(babbler, *options).stdout
    assert run(babbler, *options, "--num-samples", 3).stdout.split("---\n") == [single] * 3


def test_json_gives_an_object_per_sample_with_what_is_needed_to_repeat_it(babbler):
    options = ["--prompt", "Once", "--json", "--max-new-tokens", 8]
    result = run(babbler, *options, "--num-samples", 2)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert list(rows[0]) == ["prompt", "text", "stop", "tokens", "seed", "sample"]
    assert [row["sample"] for row in rows] == [0, 1]
    assert {(row["prompt"], row["tokens"], row["stop"], row["seed"]) for row in rows} == {
        ("Once", 8, "length", rows[0]["seed"])}
    again = run(babbler, *options, "--num-samples", 2, "--seed", rows[0]["seed"])
    assert again.stdout == result.stdout


def test_each_sample_says_how_it_ended(reciter, babbler):
    ends = {"end of story": [], "length": ["--max-new-tokens", 2], "stop string": ["--stop", "dog"]}
    for stop, options in ends.items():
        result = run(reciter("a", " big red dog"), "--prompt", "a", "--json", *options)
        assert json.loads(result.stdout)["stop"] == stop
    flags = ["--prompt", "a", "--json", "--num-samples", 9, "--max-new-tokens", 9, "--seed", 1]
    whole, stopped = ([json.loads(line) for line in run(babbler, *flags, *more).stdout.splitlines()]
                      for more in ([], ["--stop", "T"]))
    assert {row["stop"] for row in stopped} == {"length", "stop string"}
    for row, cut_row in zip(whole, stopped, strict=True):
        text, found, _ = row["text"].partition("T")
        assert (cut_row["text"], cut_row["tokens"]) == (text, len(text + found))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")])
def test_running_out_of_memory_names_what_fits(monkeypatch, babbler, error):
    def generate(*_):
        raise error
        yield

    monkeypatch.setattr(GPT, "generate", generate)
    for flags, advice in [(["--num-samples", 64], "--num-samples 32"), ([], "--device cpu")]:
        result = run(babbler, "--prompt", "a", *flags)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.endswith(f"out of memory on cpu: use {advice}.\n")
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert run(babbler, "--prompt", "a").exception is error


# Stop strings.

@pytest.mark.parametrize("stop", ["Lily.", "d his fr", "riend", "\n\nOne", "😀"])
def test_a_stop_string_ends_the_text_across_token_borders_and_is_neither_printed_nor_counted_past(reciter, stop):
    text = " Tim and his friend Lily.\n\nOne 😀 day"
    folder, flags = reciter("a", text), ["--prompt", "a", "--stop", stop, "--stop", "never"]
    streamed, row = run(folder, *flags), json.loads(run(folder, *flags, "--json").stdout)
    assert row["text"] == text[:text.index(stop)]
    assert streamed.stdout.removesuffix("\n") == row["text"].removesuffix("\n")
    assert row["stop"] == "stop string"
    assert f"[{row['tokens']} tokens, " in streamed.stderr
    assert "stop string" in streamed.stderr


@pytest.mark.parametrize("flags", [[], ["--json"], ["--num-samples", 2]])
def test_no_token_is_generated_after_the_stop_strings(monkeypatch, reciter, flags):
    generate, steps = GPT.generate, []
    monkeypatch.setattr(GPT, "generate", lambda *a: (steps.append(step) or step for step in generate(*a)))
    result = run(reciter("a", " Tim had a big red dog"), "--prompt", "a", "--stop", "Tim", *flags)
    assert len(steps) * len(steps[0]) == int(re.search(r"\[(\d+) tokens", result.stderr)[1])


def cut(pieces, stops):
    """(what is printed piece by piece, why it ended) of a reply whose tokens stand for `pieces`."""
    tokenizer = SimpleNamespace(token_bytes=[piece.encode() for piece in pieces])
    reply, printed = chat.Reply(tokenizer, SampleConfig(), stops), []
    for token in [*range(len(pieces)), -1]:
        if not reply.stop:
            reply.add(token)
        printed.append(reply.next_piece())
    assert "".join(printed) == reply.text
    return reply.text, reply.stop


def test_text_that_only_begins_like_a_stop_string_is_printed():
    assert cut(["ab", "a", "ba", "b"], ["abc", "bab!"]) == ("ababab", "end of story")


def test_the_first_of_several_stop_strings_counts():
    assert cut(["one two three four"], ["three", "two", "four"]) == ("one ", "stop string")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_however_the_text_is_cut_the_stop_string_is_found(size):
    text = "aaabaaabaaac and more"
    pieces = [text[i:i + size] for i in range(0, len(text), size)]
    assert cut(pieces, ["aaac"]) == ("aaabaaab", "stop string")
    assert cut(pieces, ["aaac", "never this one", "b"]) == ("aaa", "stop string")


def test_backslash_n_in_a_stop_string_is_a_newline_on_the_command_line_as_in_the_conversation(reciter):
    folder = reciter("a", " Tim had\n\na dog")
    for stop in (r"\n\na", "\n\na"):
        assert run(folder, "--prompt", "a", "--stop", stop).stdout == " Tim had\n"


# A conversation.

def test_a_conversation_writes_text_to_stdout_and_the_rest_to_stderr(monkeypatch, reciter, capsys):
    assert converse(monkeypatch, reciter("Once", " upon a time."), ["Once"]) == 0
    out, err = capsys.readouterr()
    assert out == " upon a time.\n"
    assert "continues text" in err


@pytest.mark.parametrize("leave", ["/quit", "/exit", "quit", "exit", " quit "])
def test_words_that_exit_do_so_with_status_0(monkeypatch, babbler, capsys, leave):
    assert converse(monkeypatch, babbler, [leave, AssertionError("still there")]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ["/hlep", "/", "/temperature 1", "/usr/bin is a folder"])
def test_an_unknown_command_gets_a_hint_and_does_not_reach_the_model(monkeypatch, babbler, capsys, line):
    converse(monkeypatch, babbler, [line])
    out, err = capsys.readouterr()
    assert out == ""
    assert "/help" in err.splitlines()[-2]


def test_help_names_every_command(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["/help"])
    err = capsys.readouterr().err
    names = '"""', "//TEXT", "/words", "/set", "/show", "/retry", "/reset", "/quit", "Ctrl-C"
    assert all(name in err for name in names)
    assert max(map(len, chat.HELP.splitlines())) < 60


def test_two_slashes_are_a_text_that_begins_with_one(monkeypatch, reciter, capsys):
    converse(monkeypatch, reciter("/home", " was far."), ["//home", '"""/home"""'])
    assert capsys.readouterr().out == " was far.\n was far.\n"


def test_three_quotes_begin_and_end_a_text_of_several_lines(monkeypatch, reciter, capsys):
    folder = reciter("Tim\n\nand", " Lily")
    converse(monkeypatch, folder, ['"""Tim', "", 'and"""'])
    assert capsys.readouterr().out == " Lily\n"
    assert converse(monkeypatch, folder, [KeyboardInterrupt(), '"""Tim', KeyboardInterrupt(), "Tim\n\nand"]) == 0
    assert capsys.readouterr().out == " Lily\n"


def test_words_that_exit_are_a_text_between_three_quotes(monkeypatch, reciter, capsys):
    converse(monkeypatch, reciter("quit", " it"), ['"""quit"""'])
    assert capsys.readouterr().out == " it\n"


def settings_shown(monkeypatch, folder, lines, capsys, **options):
    """What the lines of a session leave in /show: {name: value}."""
    converse(monkeypatch, folder, [*lines, "/show"], **options)
    out, err = capsys.readouterr()
    assert out == ""
    return dict(re.findall("^(.+?) = (.+)$", err.rpartition(" M parameters")[2], re.MULTILINE))


def test_set_takes_the_values_of_the_flag(monkeypatch, babbler, capsys):
    lines = ["/set temperature 0", "/set top-k=5", "/set --top_p 0.5", "/set min-p = 0.25", "/set seed none",
             "/set max_new_tokens 3"]
    shown = settings_shown(monkeypatch, babbler, lines, capsys)
    assert shown == shown | {"temperature": "0.0", "top-k": "5", "top-p": "0.5", "min-p": "0.25", "seed": "none",
                             "max-new-tokens": "3"}


@pytest.mark.parametrize("line", [
    "/set temperature -1", "/set temperature warm", "/set top_k 2.5", "/set colour 3",
    "/set top_p 0", "/set min_p 2", "/set temperature none", "/set keep-context maybe",
    "/set keep-context none", "/set", "/set ="])
def test_set_refuses_what_the_flag_refuses(monkeypatch, babbler, capsys, line):
    before = settings_shown(monkeypatch, babbler, [], capsys)
    assert settings_shown(monkeypatch, babbler, [line], capsys) == before


def test_whatever_show_lists_can_be_set_as_shown(monkeypatch, babbler, capsys):
    stops, context = ("The end", "a", "\n\n"), dict(stops=(), keep_context=False)
    shown = settings_shown(monkeypatch, babbler, [], capsys, stops=stops, keep_context=True, temperature=1.5, seed=3)
    assert set(shown) == {"stop", "keep-context", *(name.replace("_", "-") for name in SampleConfig.__annotations__)}
    assert shown["stop"] == r'"The end" "a" "\n\n"'
    lines = [f"/set {name} {value}" for name, value in shown.items()]
    assert settings_shown(monkeypatch, babbler, lines, capsys, **context) == shown
    lines += ["/set stop none", "/set keep-context off"]
    assert settings_shown(monkeypatch, babbler, lines, capsys) == shown | {"stop": "none", "keep-context": "off"}


def test_settings_set_in_the_conversation_count(monkeypatch, reciter, capsys):
    folder = reciter("Once", " upon a\ntime. The end")
    converse(monkeypatch, folder, ["/set stop The end", "Once", r'/set stop "The end" "\n"', "Once", "/set stop none",
                                   "Once", "/set max-new-tokens 1", "Once"], max_new_tokens=99)
    assert capsys.readouterr().out == " upon a\ntime. \n upon a\n upon a\ntime. The end\n \n"


def test_set_without_a_value_shows_that_value(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["/set temperature"], temperature=0.75)
    assert capsys.readouterr().err.splitlines()[-2] == "temperature = 0.75"


@pytest.mark.parametrize("flag", [["--temperature", "-1"], ["--top-p", "0"], ["--min-p", "2"], ["--top-k", "x"],
                                  ["--max-new-tokens", "0"], ["--num-samples", "0"]])
def test_a_bad_value_ends_in_one_line(babbler, flag):
    result = run(babbler, "--prompt", "x", *flag)
    assert result.exit_code in (1, 2)
    assert len([line for line in result.stderr.splitlines() if "Error" in line]) == 1
    assert isinstance(result.exception, SystemExit)


def test_retry_writes_another_text_that_its_seed_repeats(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["Once", "/retry", "Once"], seed=7)
    first, second, third = capsys.readouterr().out.split()
    assert first == third != second
    converse(monkeypatch, babbler, ["Once"], seed=8)
    assert capsys.readouterr().out.split() == [second]


def test_retry_with_nothing_written_says_so(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["/retry"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing" in err.splitlines()[-2]


def prompts_seen(monkeypatch, folder, lines, **options):
    """The texts that the model was asked to continue in a conversation."""
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: seen.append(text) or encode(self, text))
    converse(monkeypatch, folder, lines, **options)
    return seen


def test_keep_context_carries_what_both_wrote(monkeypatch, babbler, capsys):
    seen = prompts_seen(monkeypatch, babbler, ["Once", "Tim ran", ", fast.", ""], keep_context=True)
    replies = capsys.readouterr().out.split("\n")
    story = "Once" + replies[0]
    assert seen[0] == "Once"
    assert seen[1] == f"{story} Tim ran"
    assert seen[2] == f"{seen[1]}{replies[1]}, fast."
    assert seen[3] == seen[2] + replies[2]


def test_without_keep_context_every_text_stands_alone(monkeypatch, babbler):
    assert prompts_seen(monkeypatch, babbler, ["Once", "Tim ran", ""]) == ["Once", "Tim ran", ""]


def test_reset_and_retry_take_back_what_the_story_carries(monkeypatch, babbler, capsys):
    seen = prompts_seen(monkeypatch, babbler, ["Once", "Tim", "/retry", "/reset", "Lily"], keep_context=True)
    assert seen[1] == seen[2]
    assert seen[3] == "Lily"


def test_each_turn_says_whether_the_story_has_outgrown_the_window(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["Once", "", "", "/reset", "Once"], keep_context=True, max_new_tokens=60)
    statistics = re.findall(r"context .*?\]", capsys.readouterr().err)
    assert ["outgrown" in line for line in statistics] == [False, True, True, False]


# Words that the story is to use.

FOX = ["fox", "umbrella", "rain"]
HEADER = "Words: fox, umbrella, rain.\n\n"
FOX_STORY = "Two foxes sat. It rained."


@pytest.mark.parametrize("typed", ["fox, umbrella, rain", " Fox,umbrella , RAIN.", "fox fox umbrella rain"])
def test_the_model_reads_the_words_in_a_header_that_is_not_printed(monkeypatch, reciter, typed):
    assert word_prompt(FOX) == HEADER
    folder, seen, encode = reciter(HEADER, FOX_STORY, word_prompts=True), [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: seen.append(text) or encode(self, text))
    result = run(folder, "--words", typed, input="this is not read")
    assert (result.exit_code, result.stdout, seen) == (0, FOX_STORY + "\n", [HEADER])


@pytest.mark.parametrize("text, note", [
    (FOX_STORY, "fox, rain (2 of 3)"), ("A foxglove.", "none (0 of 3)"),
    ("Umbrellas! Raining, the FOX said.", "fox, umbrella, rain (3 of 3)")])
def test_the_note_says_which_words_the_story_used_in_any_plain_inflection(reciter, text, note):
    result = run(reciter(HEADER, text, word_prompts=True), "--words", "fox umbrella rain")
    assert result.stderr.endswith(f"]\n[words used: {note}]\n")


def test_several_stories_are_counted_and_json_says_which_words_each_used(babbler, monkeypatch):
    monkeypatch.setattr(chat, "words_used", lambda words, text: words[:1] if text < "a" else words[:2])
    options = ["--words", "fox umbrella rain", "--num-samples", 6, "--max-new-tokens", 9, "--seed", 1]
    result = run(babbler, *options, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(row["words"] == FOX and row["words_used"] == FOX[:1 + (row["text"] >= "a")] for row in rows)
    both = sum(row["text"] >= "a" for row in rows)
    note = f"[words used: 6 x fox, {both} x umbrella, 0 x rain]\n"
    assert 0 < both < 6 and result.stderr.endswith(note)
    plain = run(babbler, *options)
    assert plain.stderr.endswith(note) and "Words:" not in plain.stdout
    assert [text.rstrip("\n") for text in plain.stdout.split("---\n")] == [row["text"] for row in rows]


def test_a_story_with_words_begins_with_the_prompt(reciter):
    result = run(reciter(HEADER + "The fox", " ran. The end.", word_prompts=True), "--words", "fox umbrella rain",
                 "--prompt", "The fox", "--stop", " The", "--json")
    row = json.loads(result.stdout)
    assert (row["prompt"], row["text"], row["words_used"]) == ("The fox", " ran.", ["fox"])


def test_a_model_trained_without_word_prompts_is_said_to_be_and_how_to_train_one(reciter):
    for trained, noted in [(dict(word_prompts=True), 0), (dict(word_prompts=False), 1), ({}, 1)]:
        result = run(reciter(HEADER, FOX_STORY, **trained), "--words", "fox umbrella rain")
        assert result.stdout == FOX_STORY + "\n"
        assert len(re.findall(r"\npython preprocess.py prepare-dataset --word-prompts .*\n", result.stderr)) == noted
    assert "--word-prompts" not in run(reciter("a", "b"), "--prompt", "a").stderr


@pytest.mark.parametrize("typed", ["", " , ", "7", "fox, 7", "x2", "don't", "a b c d e f"])
def test_what_is_not_one_to_five_words_is_refused_with_what_to_type(monkeypatch, babbler, capsys, typed):
    result = run(babbler, "--words", typed)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("type, for example, fox umbrella rain.\n") and repr(typed) in result.stderr
    converse(monkeypatch, babbler, [f"/words {typed}"])
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-2].endswith("type, for example, fox umbrella rain.")


def test_words_in_the_conversation_begin_a_new_story_whose_header_the_model_keeps(monkeypatch, babbler, capsys):
    lines = ["Once", "/words fox umbrella rain", "/retry", "Tim", "/reset", "Lily"]
    seen = prompts_seen(monkeypatch, babbler, lines, keep_context=True)
    out, err = capsys.readouterr()
    replies = out.split("\n")
    assert seen == ["Once", HEADER, HEADER, f"{HEADER}{replies[2]} Tim", "Lily"]
    assert replies[1] != replies[2] and "Words:" not in out
    assert err.count("[words used: ") == 2
    assert prompts_seen(monkeypatch, babbler, lines) == ["Once", HEADER, HEADER, "Tim", "Lily"]


# Ctrl-C.

def press_after(count):
    """A stand-in for print_text that presses Ctrl-C after `count` pieces."""
    pieces = itertools.count(1)

    def print_text(text):
        print(text, end="")
        if next(pieces) == count:
            os.kill(os.getpid(), signal.SIGINT)
    return print_text


@pytest.mark.parametrize("stops", [(), ("never this",)])
def test_ctrl_c_stops_the_reply_and_the_story_keeps_what_was_written(monkeypatch, babbler, capsys, stops):
    monkeypatch.setattr(chat, "print_text", press_after(5))
    seen = prompts_seen(monkeypatch, babbler, ["Once", ""], keep_context=True, stops=stops, max_new_tokens=50)
    out, err = capsys.readouterr()
    stopped, whole = out.split("\n")[:2]
    assert "5 tokens, " in err
    assert "interrupted" in err
    assert len(stopped) == 5
    assert len(whole) == 50
    assert seen[1] == "Once" + stopped


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_in_a_batch_prints_what_is_there_and_exits_with_130(monkeypatch, babbler, as_json):
    generate = GPT.generate

    def press_in_step_5(*arguments):
        for i, step in enumerate(generate(*arguments)):
            if i == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield torch.tensor([step[0], -1])  # the second story ends at once

    monkeypatch.setattr(GPT, "generate", press_in_step_5)
    result = run(babbler, "--prompt", "a", "--num-samples", 2, *["--json"] * as_json)
    assert result.exit_code == 130
    if as_json:
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(row["stop"], row["tokens"], len(row["text"])) for row in rows] == [("interrupted", 5, 5),
                                                                                    ("end of story", 0, 0)]
    else:
        assert re.fullmatch(r"[A-Za-z]{5}\n---\n\n", result.stdout)
        assert "1 x interrupted, 1 x end of story" in result.stderr


def test_ctrl_c_at_the_prompt_hints_and_twice_exits_with_130(monkeypatch, babbler, capsys):
    assert converse(monkeypatch, babbler, [KeyboardInterrupt(), "Once", KeyboardInterrupt()]) == 0
    assert capsys.readouterr().err.count("Ctrl-C again") == 2
    assert converse(monkeypatch, babbler, [KeyboardInterrupt(), "/set colour 3", KeyboardInterrupt()]) == 0
    assert converse(monkeypatch, babbler, [KeyboardInterrupt(), KeyboardInterrupt(), AssertionError()]) == 130


def test_ctrl_c_while_the_model_is_loading_ends_the_program(babbler):
    code = ("import sys, runpy, time, model\n"
            "model.load_checkpoint = lambda path: (print('loading', flush=True), time.sleep(60))\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    program = command(babbler, "--prompt", "a", "--num-samples", 2, "--json")
    with subprocess.Popen([sys.executable, "-c", code, *program[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=ENVIRONMENT | dict(PYTHONPATH=str(ROOT))) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == b""
        assert process.stderr.read().strip() == b"Stopped."


class Terminal:
    """A real terminal with chat.py in it."""

    def __init__(self, arguments, **environment):
        pty = pytest.importorskip("pty")
        self.screen, terminal = pty.openpty()
        self.process = subprocess.Popen(arguments, stdin=terminal, stdout=terminal, stderr=terminal,
                                        start_new_session=True, env=ENVIRONMENT | dict(TERM="xterm") | environment)
        os.close(terminal)
        self.text, self.read = "", 0

    def type(self, text):
        os.write(self.screen, text.encode())

    def press(self):
        """Press Ctrl-C once the line editor waits: Python heeds no signal between its prompt and its wait."""
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)

    def expect(self, pattern, seconds=40):
        """Read on until `pattern` has come, after what was expected before."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.DOTALL).search(self.text, self.read)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.text[self.read:]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.text += os.read(self.screen, 65536).decode(errors="replace")
        self.read = found.end()

    def read_to_end(self):
        while True:
            try:
                data = os.read(self.screen, 65536)
            except OSError:  # Linux says so when the other side has closed
                data = b""
            if not data:
                return self.text, self.process.wait(20)
            self.text += data.decode(errors="replace")


def test_a_conversation_in_a_real_terminal(babbler, tokenizer):
    terminal = Terminal(command(babbler, "--max-new-tokens", LONG, "--keep-context"))
    terminal.expect("Story> ")
    terminal.type("/set keep-context\r/set keep-context off\r")  # commands pasted at once stay two
    terminal.expect("context = on.*context = off.*Story> ")
    terminal.type("Once\r")
    terminal.expect(r"[a-zA-Z]{300}")
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect("interrupted.*Story> ")
    terminal.type("/set max_new_tokens 5\r")
    terminal.expect("max-new-tokens = 5.*Story> ")
    terminal.type("Tim ran.\r\rHe fell\r")  # lines pasted at once are one text
    context = 1 + len(tokenizer.encode("Tim ran.\n\nHe fell")) + 5
    terminal.expect(rf"\[5 tokens, [\d,]+ tokens/s, length, context {context} of 96.*Story> ")
    for _ in range(2):  # Ctrl-C that clears half a line does not count
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.press()
        terminal.expect("Story> ")
    assert "Ctrl-C again" not in terminal.text
    terminal.press()
    terminal.expect("Ctrl-C again.*Story> ")
    terminal.press()
    text, status = terminal.read_to_end()
    assert status == 130
    assert "Traceback" not in text
    assert "\x1b[2m" in text


def test_on_a_terminal_no_control_bytes_of_the_model_and_no_colour_if_unwanted_and_notes_are_wrapped(reciter):
    folder = reciter("a", " b\x1b[31m\x07c")
    terminal = Terminal(command(folder, "--prompt", "a"), NO_COLOR="1", COLUMNS="40")
    text, status = terminal.read_to_end()
    assert status == 0
    assert "\x1b" not in text
    assert "\x07" not in text
    assert " b\ufffd[31m\ufffdc" in text
    statistics = text[text.index("["):].split("m\ufffdc")[1].split()
    assert re.fullmatch(r"\[\d+ tokens, [\d,]+ tokens/s, end of story, context \d+ of 96, seed \d+\]",
                        " ".join(statistics))
    assert 30 < max(len(line) for line in text.splitlines() if "best.pt" not in line) < 40


# The end of input, and other programs.

def test_the_end_of_input_ends_with_status_0():
    """The ancestor wrote three million lines in ten seconds here."""
    result = run("no such folder", input="")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "--prompt" in result.stderr


def test_a_reader_that_goes_away_ends_it_quietly(babbler):
    with subprocess.Popen(command(babbler, "--prompt", "x", "--max-new-tokens", LONG), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(20) != 0


def test_chatting_loads_no_library_that_it_does_not_need_and_writes_utf_8_to_a_pipe(reciter):
    folder, not_needed = reciter("a", " 犬 é"), {"datasets", "matplotlib", "pandas", "torch._dynamo", "sympy"}
    if torch.__version__ < (2, 13):
        not_needed.remove("sympy")  # torch 2.9 itself takes it for the shapes of weights that are not there
    code = ("import sys, runpy; sys.argv[0] = 'chat.py'\n"
            "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
            "except SystemExit: pass\n"
            f"print({not_needed} & set(sys.modules), file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code, *command(folder, "--prompt", "a")[1:]], capture_output=True,
                            env=ENVIRONMENT | dict(PYTHONIOENCODING="latin-1"), timeout=60)
    assert result.stdout.decode().rstrip() == " 犬 é"
    assert result.stderr.rstrip().endswith(b"set()"), result.stderr


# Checkpoints.

def test_on_a_cpu_the_weights_are_in_half_precision_unless_told_otherwise(babbler):
    given = load_checkpoint(babbler / "best.pt")[0].state_dict()
    for name, dtype in dict(auto=torch.float16, float32=torch.float32, bfloat16=torch.bfloat16).items():
        loaded = chat.LoadedModel(babbler / "best.pt", "cpu", name)
        assert loaded.description.endswith(f"cpu, {str(dtype)[6:]}.")
        for key, weight in loaded.model.state_dict().items():
            assert torch.equal(weight, given[key].to(dtype).float())


def test_best_is_preferred_to_the_latest_and_a_file_can_be_named(babbler, reciter, tmp_path):
    reciter("a", " best")
    shutil.copy(babbler / "best.pt", tmp_path / "ckpt.pt")
    assert run(tmp_path, "--prompt", "a").stdout == " best\n"
    assert "best.pt" in run(tmp_path, "--prompt", "a").stderr
    (tmp_path / "best.pt").rename(tmp_path / "other.pt")
    assert "ckpt.pt" in run(tmp_path, "--prompt", "a").stderr
    assert run(tmp_path, "--prompt", "a", "--checkpoint", tmp_path / "other.pt").stdout == " best\n"


def test_a_checkpoint_replaced_in_the_middle_of_a_chat_changes_nothing(monkeypatch, reciter, tokenizer, capsys):
    folder = reciter("Once", " upon a time.")

    def lines():
        yield "Once"
        save_checkpoint(folder / "best.pt", small_gpt(tokenizer), tokenizer.model_bytes)
        yield "Once"
        (folder / "best.pt").unlink()
        yield "Once"

    converse(monkeypatch, folder, lines())
    assert capsys.readouterr().out == " upon a time.\n" * 3


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "folder"])
def test_a_checkpoint_that_cannot_be_read_ends_in_one_line_with_what_to_type(babbler, tmp_path, damage):
    path, whole = tmp_path / "best.pt", (babbler / "best.pt").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(dict(empty=b"", cut=whole[:len(whole) // 2], text=b"Once upon a time")[damage])
    result = run(tmp_path, "--prompt", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr
    assert "python train.py" in result.stderr


def test_samples_and_json_without_a_text_say_what_to_add(monkeypatch, babbler):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    for option in (["--num-samples", 2], ["--json"]):
        result = run(babbler, *option)
        assert result.exit_code == 2
        assert "--prompt" in result.stderr
