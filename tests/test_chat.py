"""Talking to a model: what reaches stdout, what the commands do, how it stops and how it fails."""

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from conftest import ROOT

import chat
from config import GPTConfig, SampleConfig, UserError
from model import GPT, read_checkpoint, save_checkpoint
from preprocess import Tokenizer

TEXT = ("Once upon a time there was a little dog named Tim. He liked to play in the park with his friend Lily.\n\n"
        "One day they saw a big red ball. They were happy and went home.")
BLOCK_SIZE = 96
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")
LONG = 100_000  # tokens: a reply that lasts until something stops it


@pytest.fixture(scope="module")
def tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
    return Tokenizer(model.getvalue())


def small_gpt(tokenizer, block_size=BLOCK_SIZE):
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64,
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
    save_checkpoint(folder / "best.pt", gpt, tokenizer.model_bytes, progress=dict(iter=7, best_val=1.25))
    return folder


@pytest.fixture
def reciter(tokenizer, tmp_path):
    """Make the folder of a model that goes on from a prompt with a given text and then ends the story.

    The position alone decides: its embedding drowns that of the token.
    """
    def make(prompt, text):
        gpt = small_gpt(tokenizer)
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        start = len(tokenizer.encode_prompt(prompt)) - 1
        with torch.no_grad():
            gpt.wte.weight[:] = torch.nn.functional.normalize(torch.randn_like(gpt.wte.weight), dim=1) * 10
            gpt.wpe.weight[start:start + len(ids)] = gpt.wte.weight[ids] * 100
        save_checkpoint(tmp_path / "best.pt", gpt, tokenizer.model_bytes)
        return tmp_path
    return make


def run(folder, *arguments, **options):
    return CliRunner().invoke(chat.main, ["--out-dir", str(folder), *map(str, arguments)], **options)


def converse(monkeypatch, folder, lines, keep_context=False, stops=(), **settings):
    """A terminal session in which a person types `lines`; an exception among them is raised. Returns the status."""
    typed = iter(lines)

    def read_line(prompt, interrupts):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(chat, "read_line", read_line)
    sample = SampleConfig(**dict(max_new_tokens=12, seed=1) | settings)
    with chat.Interrupts() as interrupts:
        writer = chat.load_writer(folder / "best.pt", "cpu", "auto")
        return chat.converse(chat.Session(writer, sample, stops, keep_context, interrupts))


def command(folder, *arguments):
    return [sys.executable, str(ROOT / "chat.py"), "--out-dir", str(folder), *map(str, arguments)]


def test_on_a_cpu_the_weights_are_in_half_precision_unless_told_otherwise(babbler):
    given = read_checkpoint(babbler / "best.pt")["model"]
    for name, dtype in dict(auto=torch.float16, float32=torch.float32, bfloat16=torch.bfloat16).items():
        writer = chat.load_writer(babbler / "best.pt", "cpu", name)
        assert writer.about.endswith(f"cpu, {str(dtype)[6:]}.")
        for key, weight in writer.model.state_dict().items():
            assert torch.equal(weight, given[key].to(dtype).float())


# Text on stdout.

def test_prompt_prints_the_continuation_and_nothing_else(reciter):
    result = run(reciter("Once upon", " a time there was a dog."), "--prompt", "Once upon")
    assert result.stdout == " a time there was a dog.\n"
    assert result.exit_code == 0


def test_piped_input_prints_the_continuation_and_nothing_else(reciter):
    folder = reciter("Once upon", " a time.\n\nThe end.\n")
    for piped in ("Once upon", "Once upon\n", "Once upon\r\n"):
        result = run(folder, input=piped)
        assert result.stdout == " a time.\n\nThe end.\n"


def test_statistics_go_to_stderr(reciter, tokenizer):
    result = run(reciter("Once", " upon a time."), "--prompt", "Once", "--seed", 5)
    tokens, prompt = len(tokenizer.encode(" upon a time.")), len(tokenizer.encode_prompt("Once"))
    assert re.search(rf"\[{tokens} tokens, [\d,]+ tokens/s, end of story, context {tokens + prompt} of {BLOCK_SIZE}, "
                     r"seed 5\]", result.stderr)


def test_an_empty_prompt_writes_a_story_from_nothing(reciter):
    folder = reciter("", "Once upon a time.")
    assert run(folder, "--prompt", "").stdout == "Once upon a time.\n"
    assert run(folder, input="\n").stdout == "Once upon a time.\n"


def test_with_a_prompt_the_input_is_not_read(reciter):
    folder = reciter("Once", " upon")
    assert run(folder, "--prompt", "Once", input="something else").stdout == " upon\n"


def test_the_stream_is_the_text_decoded_whole(reciter):
    text = " the 犬 said 😀😀 café\tto  Tim.\n\n"
    result = run(reciter("x", text), "--prompt", "x")
    assert result.stdout == text


@pytest.mark.parametrize("prompt", [TEXT * 40, "犬😀 café " * 300])
def test_a_very_long_prompt_works_and_is_said_once_to_outgrow_the_window(babbler, prompt):
    result = run(babbler, "--prompt", prompt, "--max-new-tokens", 2 * BLOCK_SIZE)
    assert result.exit_code == 0
    assert result.stderr.count("outgrown") == 1
    assert len(result.stdout) > BLOCK_SIZE


def test_a_prompt_that_is_not_unicode_is_accepted(babbler):
    result = run(babbler, "--prompt", "caf\udce9", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output


def test_a_seed_repeats_exactly_and_the_seed_used_is_shown(babbler):
    first = run(babbler, "--prompt", "Once")
    seed = re.search(r"seed (\d+)", first.stderr)[1]
    assert run(babbler, "--prompt", "Once", "--seed", seed).stdout == first.stdout
    assert run(babbler, "--prompt", "Once", "--seed", int(seed) + 1).stdout != first.stdout


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


def test_json_gives_an_object_a_sample_with_what_is_needed_to_repeat_it(babbler):
    options = ["--prompt", "Once", "--json", "--max-new-tokens", 8]
    result = run(babbler, *options, "--num-samples", 2)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1]
    assert {(row["prompt"], row["tokens"], row["stop"], row["seed"]) for row in rows} == {
        ("Once", 8, "length", rows[0]["seed"])}
    again = run(babbler, *options, "--num-samples", 2, "--seed", rows[0]["seed"])
    assert again.stdout == result.stdout


def test_json_says_how_each_sample_ended(reciter):
    ends = {"end of story": [], "length": ["--max-new-tokens", 2], "stop string": ["--stop", "dog"]}
    for stop, options in ends.items():
        result = run(reciter("a", " big red dog"), "--prompt", "a", "--json", *options)
        assert json.loads(result.stdout)["stop"] == stop


# Stop strings.

@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("stop", ["Lily.", "d his fr", "riend", "\n\nOne", "😀"])
def test_a_stop_string_ends_the_text_across_token_borders_and_is_not_printed(reciter, stop, as_json):
    text = " Tim and his friend Lily.\n\nOne 😀 day"
    result = run(reciter("a", text), "--prompt", "a", "--stop", stop, "--stop", "never", *["--json"] * as_json)
    shown = json.loads(result.stdout)["text"] if as_json else result.stdout.removesuffix("\n")
    assert shown == text[:text.index(stop)].removesuffix("" if as_json else "\n")
    assert "stop string" in result.stderr


def test_text_that_only_begins_like_a_stop_string_is_printed():
    reply = chat.Reply(0, 0)
    assert "".join(chat.until_stop(["ab", "a", "ba", "b"], ["abc", "bab!"], reply)) == "ababab"
    assert reply.stop == "end of story"


def test_the_first_of_several_stop_strings_counts():
    assert "".join(chat.until_stop(["one two three four"], ["three", "two", "four"], chat.Reply(0, 0))) == "one "


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_however_the_text_is_cut_the_stop_string_is_found(size):
    text, reply = "aaabaaabaaac and more", chat.Reply(0, 0)
    pieces = [text[i:i + size] for i in range(0, len(text), size)]
    assert "".join(chat.until_stop(pieces, ["aaac"], reply)) == "aaabaaab"
    assert reply.stop == "stop string"


# A conversation.

def test_a_conversation_writes_text_to_stdout_and_the_rest_to_stderr(monkeypatch, reciter, capsys):
    assert converse(monkeypatch, reciter("Once", " upon a time."), ["Once"]) == 0
    out, err = capsys.readouterr()
    assert out == " upon a time.\n\n"  # the end of input gives the shell a fresh line
    assert "continues your text" in err


@pytest.mark.parametrize("leave", ["/quit", "/exit", "quit", "exit", " quit "])
def test_leaving_words_leave_with_status_0(monkeypatch, babbler, capsys, leave):
    assert converse(monkeypatch, babbler, [leave, AssertionError("still there")]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ["/hlep", "/", "/temperature 1", "/usr/bin is a folder"])
def test_an_unknown_command_gets_a_hint_and_does_not_reach_the_model(monkeypatch, babbler, capsys, line):
    converse(monkeypatch, babbler, [line])
    out, err = capsys.readouterr()
    assert out == "\n"
    assert "/help" in err.splitlines()[-1]


def test_two_slashes_are_a_text_that_begins_with_one(monkeypatch, reciter, capsys):
    converse(monkeypatch, reciter("/home", " was far."), ["//home", '"""/home"""'])
    assert capsys.readouterr().out == " was far.\n was far.\n\n"


def test_three_quotes_begin_and_end_a_text_of_several_lines(monkeypatch, reciter, capsys):
    folder = reciter("Tim\n\nand", " Lily")
    converse(monkeypatch, folder, ['"""Tim', "", 'and"""'])
    assert capsys.readouterr().out == " Lily\n\n"
    converse(monkeypatch, folder, [KeyboardInterrupt(), '"""Tim', KeyboardInterrupt(), "Tim\n\nand"])
    assert capsys.readouterr().out == "\n\n Lily\n\n"


def test_set_takes_the_values_of_the_flag_and_refuses_the_others(monkeypatch, babbler, capsys):
    good = ["/set temperature 0", "/set top-k 5", "/set --top_p 0.5", "/set seed none", "/set max_new_tokens 3"]
    bad = ["/set temperature -1", "/set temperature nan", "/set temperature warm", "/set top_k 2.5", "/set colour 3",
           "/set top_p 0", "/set min_p 2", "/set temperature", "/set temperature none"]
    monkeypatch.setattr(chat, "note", lambda text: print(text))
    converse(monkeypatch, babbler, good + ["/show"])
    shown = capsys.readouterr().out
    for setting in ("temperature = 0.0", "top_k = 5", "top_p = 0.5", "seed = none", "max_new_tokens = 3"):
        assert setting in shown
    converse(monkeypatch, babbler, ["/show"])
    before = capsys.readouterr().out
    for line in bad:
        converse(monkeypatch, babbler, [line, "/show"])
        after = capsys.readouterr().out
        assert [row for row in before.splitlines() if row not in after.splitlines()] == []


@pytest.mark.parametrize("flag", [["--temperature", "-1"], ["--top-p", "0"], ["--min-p", "2"], ["--top-k", "x"],
                                  ["--max-new-tokens", "0"], ["--num-samples", "0"], ["--stop", ""]])
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
    assert out == "\n"
    assert "nothing" in err.splitlines()[-1]


def prompts_seen(monkeypatch, folder, lines, **options):
    """The texts that the model was asked to continue in a session."""
    seen, encode = [], Tokenizer.encode_prompt
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda self, text: seen.append(text) or encode(self, text))
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


def test_what_falls_out_of_the_window_is_said_once_a_story(monkeypatch, babbler, capsys):
    converse(monkeypatch, babbler, ["Once", "", "", "", "/reset", "Once"], keep_context=True, max_new_tokens=60)
    assert capsys.readouterr().err.count("outgrown") == 1


# Ctrl-C.

def test_ctrl_c_stops_the_reply_and_the_story_keeps_what_was_written(monkeypatch, babbler, capsys):
    def show_and_press(text, pieces=[]):
        pieces.append(text)
        print(text, end="")
        if len(pieces) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "show", show_and_press)
    seen = prompts_seen(monkeypatch, babbler, ["Once", ""], keep_context=True, max_new_tokens=50)
    out, err = capsys.readouterr()
    stopped, whole = out.split("\n")[:2]
    assert "interrupted" in err
    assert 5 <= len(stopped) <= 7
    assert len(whole) == 50
    assert seen[1] == "Once" + stopped


def test_ctrl_c_at_the_prompt_hints_and_twice_leaves_with_130(monkeypatch, babbler, capsys):
    assert converse(monkeypatch, babbler, [KeyboardInterrupt(), "Once", KeyboardInterrupt()]) == 0
    assert capsys.readouterr().err.count("/quit.") >= 2
    assert converse(monkeypatch, babbler, [KeyboardInterrupt(), KeyboardInterrupt(), AssertionError()]) == 130


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

    def type_and_press(self, text):
        """Type, and press Ctrl-C once the line editor waits: Python heeds no signal between its prompt and its wait."""
        self.type(text)
        self.expect(text)
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


def test_in_a_real_terminal_ctrl_c_stops_the_reply_then_hints_then_leaves(babbler):
    terminal = Terminal(command(babbler, "--max-new-tokens", LONG))
    terminal.expect("Story> ")
    terminal.type("Once\r")
    terminal.expect(r"[a-zA-Z]{300}")
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect("interrupted.*Story> ")
    terminal.type("/set max_new_tokens 5\r")
    terminal.expect("max_new_tokens = 5.*Story> ")
    terminal.type("Tim\r")
    terminal.expect("5 tokens.*length.*Story> ")
    terminal.type_and_press("half a line")
    terminal.expect("Ctrl-C again.*Story> ")
    terminal.type_and_press("half")
    text, status = terminal.read_to_end()
    assert status == 130
    assert "Traceback" not in text
    assert "\x1b[2m" in text


def test_no_color_means_no_colour_and_control_bytes_do_not_reach_a_terminal(reciter):
    folder = reciter("a", " b\x1b[31m\x07c")
    text, status = Terminal(command(folder, "--prompt", "a"), NO_COLOR="1").read_to_end()
    assert status == 0
    assert "\x1b" not in text
    assert "\x07" not in text
    assert " b\ufffd[31m\ufffdc" in text


# The end of input, and other programs.

def test_the_end_of_input_ends_with_status_0():
    """The ancestor wrote three million lines in ten seconds here."""
    result = subprocess.run(command("no such folder"), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, b"")
    assert len(result.stderr) < 500


def test_a_reader_that_goes_away_ends_it_quietly(babbler):
    with subprocess.Popen(command(babbler, "--prompt", "x", "--max-new-tokens", LONG), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(20) != 0


def test_chatting_loads_no_library_that_it_does_not_need_and_survives_a_latin_console(reciter):
    folder, not_needed = reciter("a", " 犬 é"), {"datasets", "matplotlib", "pandas", "torch._dynamo", "sympy"}
    if torch.__version__ < (2, 13):
        not_needed.remove("sympy")  # torch 2.9 itself takes it for the shapes of weights that are not there
    code = ("import sys, runpy; sys.argv[0] = 'chat.py'\n"
            "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
            "except SystemExit: pass\n"
            f"print({not_needed} & set(sys.modules), file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code, *command(folder, "--prompt", "a")[1:]], capture_output=True,
                            env=ENVIRONMENT | dict(PYTHONIOENCODING="latin-1"), timeout=60)
    assert result.stdout.rstrip() == " ? é".encode("latin-1")
    assert result.stderr.rstrip().endswith(b"set()"), result.stderr


# Checkpoints.

def test_best_is_preferred_to_the_latest(babbler, reciter, tmp_path):
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
    assert capsys.readouterr().out == " upon a time.\n" * 3 + "\n"


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


def test_a_tokenizer_of_another_size_is_refused(babbler, tokenizer, tmp_path):
    contents = read_checkpoint(babbler / "best.pt")
    gpt = GPT(replace(GPTConfig(**contents["model_config"]), vocab_size=tokenizer.vocab_size + 1))
    save_checkpoint(tmp_path / "best.pt", gpt, tokenizer.model_bytes)
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} tokens"):
        chat.load_writer(tmp_path / "best.pt", "cpu", "auto")


def test_samples_and_json_without_a_text_say_what_to_add(monkeypatch, babbler):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    for option in (["--num-samples", 2], ["--json"]):
        result = run(babbler, *option)
        assert result.exit_code == 2
        assert "--prompt" in result.stderr
