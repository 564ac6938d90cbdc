import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace

import click
import pytest
from click import BOOL, STRING, Choice, FloatRange
from click.testing import CliRunner
from conftest import ROOT

import config
from config import (CONTEXT_SETTINGS, OTHER_FLAGS, PRESETS, Command, CorpusConfig, GPTConfig, SampleConfig,
                    TrainConfig,
                    UserError, atomic_write, flag, folder_lock, only_fields, quoted, replace_file, setting_options,
                    short_message, wrapped)

CLASSES = [GPTConfig, TrainConfig, SampleConfig, CorpusConfig]
NAN, INF = float("nan"), float("inf")
every_class = pytest.mark.parametrize("cls", CLASSES)


def run(*arguments, classes=(GPTConfig, TrainConfig)):
    """The values that a command with the flags of `classes` was given; its result where it fails or prints help."""
    given = {}

    @click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
    @click.option("--preset", type=Choice(list(PRESETS)), default="rtx3050", help="settings by purpose")
    @setting_options(*classes)
    def command(**values):
        given.update(values)

    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    return given or result


def resolve(cls, *arguments):
    """Settings as train.py makes them: defaults, then the preset, then the flags."""
    given = run(*arguments)
    typed = {name: value for name, value in given.items() if value is not None}
    return cls(**only_fields(cls, PRESETS[given["preset"]] | typed))


def another(f):
    """An allowed value of a field that is not its default."""
    kind, default = f.metadata["type"], f.default
    if kind is BOOL:
        return not default
    if isinstance(kind, Choice):
        return next(choice for choice in kind.choices if choice != default)
    if kind is STRING:
        return "my own/folder"
    if isinstance(default, float) or isinstance(kind, FloatRange):
        default = default or 0.0
        return max(float(kind.min), default / 2 or 0.5)
    return (default or 600) // 2 or 2


# -----------------------------------------------------------------------------
# Flags

@every_class
def test_help_shows_every_flag_once_with_its_purpose_and_default(cls):
    text = run("--help", classes=[cls]).output
    words = " ".join(text.replace("\u00a0", " ").split())
    for f in fields(cls):
        lines = [line for line in text.splitlines() if line.startswith(f"  {flag(f.name)} ")]
        assert len(lines) == 1, f.name
        shown = "no" if f.default is False else f.default
        default = "" if f.default is None else f" [default: {shown}]"
        assert " ".join(f.metadata["help"].split()) + default in words, f.name


@every_class
def test_every_flag_sets_its_own_setting_and_nothing_else(cls):
    for f in fields(cls):
        value = another(f)
        given = run(flag(f.name), *([] if f.metadata["type"] is BOOL else [value]), classes=[cls])
        assert given.pop("preset") == "rtx3050"
        assert {name: v for name, v in given.items() if v is not None} == {f.name: value}
        assert type(given[f.name]) is type(value)


def test_help_groups_the_flags_under_headings():
    text = run("--help").output
    headings = ["Model:", "Folders:", "Learning:", "Memory and speed:", "--batch-size", "Reports and checkpoints:"]
    places = [text.index(f"\n{heading}" if heading[0] != "-" else heading) for heading in headings]
    assert places == sorted(places) and "\nThis command:" in text


def test_a_preset_wins_over_defaults_and_a_flag_over_the_preset():
    assert resolve(GPTConfig).n_layer == 6
    assert resolve(GPTConfig, "--preset", "demo").n_layer == 3
    demo = resolve(GPTConfig, "--preset", "demo", "--n-layer", 5)
    assert (demo.n_layer, demo.n_embd) == (5, 128)
    assert resolve(GPTConfig, "--n-layer", 6, "--preset", "demo").n_layer == 6, "the default too, once it is typed"


def test_a_false_or_zero_flag_still_wins_over_its_preset():
    assert resolve(GPTConfig, "--preset", "demo").qk_norm is True
    assert resolve(GPTConfig, "--preset", "demo", "--no-qk-norm").qk_norm is False
    assert resolve(TrainConfig, "--preset", "demo", "--eval-tokens", 0).eval_tokens == 0


def test_underscores_in_flags_are_accepted():
    assert run("--batch_size", 8)["batch_size"] == 8
    assert run("--no-qk_norm")["qk_norm"] is False


@pytest.mark.parametrize("arguments", [["--n-layer", "six"], ["--n-layer", "1.5"], ["--n-layer", "0"],
                                       ["--max-iters", "-5"], ["--dropout", "little"], ["--dropout", "1"],
                                       ["--position", "sinus"], ["--batch-size", "half"], ["--preset", "rtx4090"]])
def test_a_flag_with_a_bad_value_ends_with_one_line_naming_flag_and_value(arguments):
    result = run(*arguments)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and arguments[0] in line and arguments[1] in line


def test_a_mistyped_flag_is_answered_with_the_right_one():
    result = run("--batchsize", 8)
    assert result.exit_code == 2 and "--batch-size" in result.output


@pytest.mark.parametrize("arguments", [["--lr", "0.1"], ["--min_lr=0.1"], ["--n-embed", "64"]])
def test_a_flag_of_nanogpt_is_refused_with_its_name_here(arguments):
    result = run(*arguments)
    old = arguments[0].split("=")[0].replace("_", "-")
    new = dict(zip(map(flag, OTHER_FLAGS), map(flag, OTHER_FLAGS.values())))[old]
    assert result.exit_code == 2 and f"Error: there is no {old}: use {new}." in result.output
    assert new in run("--help").output


@pytest.mark.parametrize("columns", [50, 60, 80, 100])
def test_help_breaks_no_flag_and_no_default(columns):
    @click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
    @setting_options(GPTConfig, TrainConfig)
    @click.option("--plain", help="the best.pt in the --out-dir of a well-known run of half a million [default: a run]")
    def command(**values):
        pass
    text = CliRunner().invoke(command, ["--help"], terminal_width=columns).output
    assert not re.search(r"-\n", text) and len(re.findall(r"\[default: \S+", text)) == text.count("[default:")
    assert text.count("[default:") > 30 and not set("\u00a0\u2011") & set(text)


# -----------------------------------------------------------------------------
# Values

@every_class
def test_settings_are_frozen_and_their_defaults_are_allowed(cls):
    made = cls()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(cls)[0].name, 1)


@pytest.mark.parametrize("cls, values", [
    (GPTConfig, dict(n_layer=0)), (GPTConfig, dict(n_layer=257)), (GPTConfig, dict(n_layer="six")),
    (GPTConfig, dict(n_layer=None)), (GPTConfig, dict(block_size=1)), (GPTConfig, dict(vocab_size=65537)),
    (GPTConfig, dict(dropout=1.0)), (GPTConfig, dict(bias="perhaps")), (GPTConfig, dict(position="sinus")),
    (TrainConfig, dict(batch_size=0)), (TrainConfig, dict(batch_size="automatic")), (TrainConfig, dict(max_iters=0)),
    (TrainConfig, dict(learning_rate=0)), (TrainConfig, dict(learning_rate=11)), (TrainConfig, dict(grad_clip=-1)),
    (TrainConfig, dict(save_minutes=0)), (TrainConfig, dict(seed=-1)), (TrainConfig, dict(dtype="fp16")),
    (TrainConfig, dict(beta1=1.0)), (SampleConfig, dict(temperature=-0.1)), (SampleConfig, dict(top_p=0.0)),
    (SampleConfig, dict(top_k=-1)), (SampleConfig, dict(repetition_penalty=0.9)), (SampleConfig, dict(seed="1.5")),
    (CorpusConfig, dict(num_files=51)), (CorpusConfig, dict(num_files=0)), (CorpusConfig, dict(sample_rate=0)),
    (CorpusConfig, dict(sample_rate=1.1)), (CorpusConfig, dict(vocab_size=259))])
def test_a_value_that_is_not_allowed_is_refused_in_one_line_naming_the_setting(cls, values):
    with pytest.raises(UserError) as caught:
        cls(**values)
    (name,) = values
    assert caught.value.message.startswith(f"{config.flag(name)}: ") and "\n" not in caught.value.message


def test_a_value_that_is_typed_in_a_chat_becomes_a_number():
    typed = SampleConfig(temperature="0.8", top_k="5", seed="7")
    assert typed == SampleConfig(temperature=0.8, top_k=5, seed=7) and type(typed.top_k) is int


def test_batch_size_is_a_number_or_auto():
    assert TrainConfig(batch_size="auto").batch_size == "auto" and TrainConfig(batch_size="8").batch_size == 8


@pytest.mark.parametrize("values, message", [
    (dict(n_embd=100, n_head=6), r"n_embd is 100; it must be a multiple of n_head \(6\)"),
    (dict(n_embd=36, n_head=4, position="rotary"), "n_embd / n_head is 9; rotary positions need an even")])
def test_heads_must_divide_the_width(values, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**values)


# -----------------------------------------------------------------------------
# Presets

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_existing_settings_and_divides_its_tokens_into_micro_batches(name):
    model, train = resolve(GPTConfig, "--preset", name), resolve(TrainConfig, "--preset", name)
    assert PRESETS[name].items() <= (asdict(model) | asdict(train)).items()
    assert train.tokens_per_iter % (model.block_size * train.batch_size) == 0


def test_the_default_preset_is_the_model_of_the_readme():
    model, train = GPTConfig(), TrainConfig()
    assert (model.position, model.block_size, model.vocab_size) == ("learned", 256, 4096)
    assert (train.tokens_per_iter, train.batch_size, train.max_iters) == (8 * 32 * 256, 32, 30000)
    assert PRESETS["llama"] == dict(position="rotary"), "only then does it export one to one"


def test_no_name_means_two_things_on_one_command_line():
    names = [f.name for cls in (GPTConfig, TrainConfig) for f in fields(cls)]
    assert len(names) == len(set(names))


# -----------------------------------------------------------------------------
# Saved settings

@every_class
def test_settings_come_back_from_json(cls):
    for made in (cls(), cls(**{f.name: another(f) for f in fields(cls)})):
        assert cls.from_dict(json.loads(json.dumps(asdict(made))), "config.json") == made


@pytest.mark.parametrize("values, says", [
    (None, ""), ([], ""), ("text", ""), ({"n_layers": 2}, "n_layers"), ({"n_layer": 2, 7: 0}, ""),
    ({"n_layer": "two"}, "n-layer"), ({"n_layer": None}, "n-layer"), ({"bias": None}, ""), ({"n_embd": 10}, "n_head")])
def test_settings_that_are_not_ours_are_refused_in_one_line_naming_the_file(values, says):
    with pytest.raises(UserError) as caught:
        GPTConfig.from_dict(values, "out/ckpt.pt")
    message = caught.value.message
    assert message.startswith("out/ckpt.pt: ") and says in message and "python train.py" in message
    assert "\n" not in message


def test_only_fields_takes_the_fields_of_a_class_that_were_given():
    values = dict(n_layer=2, n_head=None, batch_size=3, bias=False)
    assert only_fields(GPTConfig, values) == dict(n_layer=2, bias=False)


# -----------------------------------------------------------------------------
# Files

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def test_a_file_is_replaced_only_when_its_block_ends(path):
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert contents(path.parent) == {"file": b"new"}


def test_a_text_file_is_utf8_on_every_system_and_its_folder_is_made(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "file", "w") as file:
        file.write("é…")
    assert contents(tmp_path / "a" / "b") == {"file": "é…".encode()}


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), UserError("mine"), SystemExit(3)])
def test_a_writer_that_fails_keeps_the_old_file_and_its_own_error(path, error):
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert caught.value is error and contents(path.parent) == {"file": b"old"}


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(path, monkeypatch, fails):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails != "write":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(UserError) as caught, atomic_write(path) as file:
        full() if fails == "write" else file.write(b"new")
    assert caught.value.message.startswith(f"cannot write {path}: No space left on device. Free some disk space")
    assert contents(path.parent) == {"file": b"old"}


def test_what_is_written_has_reached_the_disk_before_it_replaces_anything(path, monkeypatch):
    order, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append(os.fstat(number).st_size), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), rename(*paths)))
    with atomic_write(path) as file:
        file.write(b"new!!")
    assert order == [5, "replace"]


def test_a_folder_that_cannot_be_made_is_named(path):
    with pytest.raises(UserError, match="cannot write"), atomic_write(path / "below") as file:
        file.write(b"new")
    with pytest.raises(OSError, match=str(path)), folder_lock(path):  # Command names the file
        pass
    assert contents(path.parent) == {"file": b"old"}


def test_replacing_waits_until_a_reader_has_closed_the_file_but_not_for_ever(path, monkeypatch):
    rename, refusals = os.replace, [PermissionError(errno.EACCES, "in use")] * 2

    def busy(*paths):
        if refusals:
            raise refusals.pop()
        rename(*paths)

    monkeypatch.setattr(os, "replace", busy)
    with atomic_write(path) as file:
        file.write(b"new")
    assert contents(path.parent) == {"file": b"new"}
    refusals += [PermissionError(errno.EACCES, "in use")] * 1000
    with pytest.raises(PermissionError):
        replace_file(path, path.parent / "b", seconds=0.1)


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(UserError, match="in use by another process"), folder_lock(tmp_path):
            pass
        with folder_lock(tmp_path / "another"):
            pass
    with folder_lock(tmp_path):
        pass
    assert (tmp_path / "lock").stat().st_size == 0


def test_the_lock_of_a_killed_process_ends_with_it(tmp_path):
    program = ("import sys; from config import folder_lock\n"
               "with folder_lock(sys.argv[1]): print('held', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(UserError, match="in use"), folder_lock(tmp_path):
            pass
        other.kill()
    with folder_lock(tmp_path):
        pass


def test_a_run_starts_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    monkeypatch.setattr(config, "fcntl", type("F", (), dict(flock=unsupported, LOCK_EX=2, LOCK_NB=4)))
    entered = []
    with folder_lock(tmp_path):
        entered.append(True)
    assert entered


def test_on_windows_the_lock_is_a_byte_of_the_file(tmp_path, monkeypatch):
    calls = []

    def locking(number, mode, length):
        calls.append((mode, length))
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(config, "fcntl", None)
    monkeypatch.setattr(config, "msvcrt", type("M", (), dict(locking=staticmethod(locking), LK_NBLCK=2)), raising=False)
    with folder_lock(tmp_path), pytest.raises(UserError, match="in use"), folder_lock(tmp_path):
        pass
    assert calls == [(2, 1)] * 2


# -----------------------------------------------------------------------------
# Commands

def outcome(action):
    """The result of a command that does `action`."""
    @click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
    def command():
        action()
    return CliRunner().invoke(command, [])


def fail(error):
    raise error


def test_ctrl_c_ends_a_command_in_one_line_as_shells_report_it():
    result = outcome(lambda: fail(KeyboardInterrupt()))
    assert (result.exit_code, result.output.split()) == (130, ["Stopped."])


def test_an_error_of_the_disk_is_one_line_that_names_the_file():
    result = outcome(lambda: open("no/such/file"))
    assert result.exit_code == 1
    assert result.output == "Error: no/such/file: No such file or directory. Fix this and rerun.\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_on_a_terminal_lines_are_broken_between_words_and_never_inside_a_command(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    commands = ["python train.py --resume --batch-size 16 --out-dir \"my run\"", "python chat.py"]
    text = (f"Out of memory with micro-batches of 32 x 256. Rerun with less, which leaves the learning as it is (type "
            f"`{commands[0]}`, or wait), then talk to it: {commands[1]}\n  a table  of two columns")
    lines = wrapped(text, Terminal()).split("\n")
    assert all(any(command in line for line in lines) for command in commands)
    assert all(len(line) < columns or commands[0] in line for line in lines) and len(lines) > 3
    assert " ".join(lines[:-1]) == text.split("\n")[0] and lines[-1] == "  a table  of two columns"
    assert wrapped(text, io.StringIO()) == text


def test_an_error_is_wrapped_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", Terminal())
    UserError("no checkpoint in out: train a model with `python train.py`, or name one with --checkpoint.").show()
    assert sys.stderr.getvalue() == ("Error: no checkpoint in out: train a\nmodel with `python train.py`, or name\n"
                                     "one with --checkpoint.\n")


def test_a_reader_that_closes_our_output_ends_the_command_quietly():
    result = outcome(lambda: fail(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert (result.exit_code, result.output) == (1, "")


def test_a_defect_of_ours_is_not_dressed_up_as_the_users():
    assert isinstance(outcome(lambda: fail(RuntimeError("a bug"))).exception, RuntimeError)


def main_with(monkeypatch, stream, *arguments, action=lambda: print("a \U0001f600 story")):
    """Run a command outside of CliRunner, which replaces the streams, with `stream` as its stdout."""
    @click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
    @setting_options(SampleConfig)
    def command(**values):
        action()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as caught:
            command.main(list(arguments), prog_name="command")
    return caught.value.code


def test_a_notebooks_stdout_which_cannot_be_reconfigured_does_no_harm(monkeypatch):
    class NotebookStream:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    stream = NotebookStream()
    assert main_with(monkeypatch, stream) == 0 and stream.text == "a \U0001f600 story\n"


class Console(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind, written", [(Console, b"a ? story\n"),
                                           (io.TextIOWrapper, "a \U0001f600 story\n".encode())])
def test_a_console_shows_a_question_mark_for_what_it_lacks_and_a_file_gets_utf_8(monkeypatch, kind, written):
    stream = kind(io.BytesIO(), encoding="cp1252", newline="\n")
    assert main_with(monkeypatch, stream) == 0
    stream.flush()
    assert stream.buffer.getvalue() == written


def test_help_can_be_shown_in_every_encoding(monkeypatch):
    for encoding in ("cp437", "gbk", "cp932", "iso8859-5", "utf-8"):
        stream = Console(io.BytesIO(), encoding=encoding)
        assert main_with(monkeypatch, stream, "--help") == 0
        stream.flush()
        assert b"[default: 0.6]" in stream.buffer.getvalue(), encoding


# -----------------------------------------------------------------------------
# Words

@pytest.mark.parametrize("text", ["out", "out/demo", "my run", "data (2)", "a&b", "", "жила/была", "a;b", "*"])
def test_a_quoted_path_is_one_word_of_a_shell(text):
    assert shlex.split(f"train --out-dir {quoted(text)}") == ["train", "--out-dir", text]


def test_plain_paths_are_not_quoted():
    for text in ("out/demo-2", r"C:\data\tok4096.model", "~/data", "roneneldan/TinyStories"):
        assert quoted(text) == text


def test_a_short_message_is_one_line_even_of_an_error_without_text():
    assert short_message(ValueError("one\ntwo")) == "one" and short_message(ValueError()) == "ValueError"
    assert len(short_message(ValueError("x" * 1000))) == 200


def test_a_setting_may_be_replaced_in_a_copy_and_is_checked_again():
    assert replace(TrainConfig(), max_iters=5).max_iters == 5
    with pytest.raises(UserError, match="--max-iters"):
        replace(TrainConfig(), max_iters=0)
