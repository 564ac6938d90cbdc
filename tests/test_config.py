import dataclasses
import json
import math
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from config import (COMMAND_LINE, PRESETS, CorpusConfig, GPTConfig, GroupedCommand, SampleConfig, TrainConfig,
                    UserError, allowed_values, pick, replace_file, replacing, restore, setting_options, value_types)

CLASSES = [GPTConfig, TrainConfig, SampleConfig, CorpusConfig]
FIELDS = [pytest.param(cls, field, id=f"{cls.__name__}.{field.name}") for cls in CLASSES
          for field in dataclasses.fields(cls)]
NAN, INF = float("nan"), float("inf")


def flag(field):
    return "--" + field.name.replace("_", "-")


def run(*arguments, classes=(GPTConfig, TrainConfig)):
    """The values that a command with the flags of `classes` was given; its result where it fails or prints help."""
    seen = {}

    @click.command(cls=GroupedCommand, context_settings=COMMAND_LINE)
    @click.option("--preset", type=click.Choice(list(PRESETS)), default="rtx3050", help="settings by purpose")
    @setting_options(*classes)
    def command(preset, **given):
        seen.update(given, preset=preset)

    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    return seen or result


def resolve(cls, *arguments):
    """Settings as train.py makes them: defaults, then the preset, then what was typed."""
    given = run(*arguments)
    typed = {name: value for name, value in given.items() if value is not None}
    return cls(**pick(cls, PRESETS[given["preset"]] | typed))


# Flags

@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_flag_and_a_help_line(cls):
    text = run("--help", classes=[cls]).output
    for field in dataclasses.fields(cls):
        shown = [line for line in text.splitlines() if line.split()[:1] == [flag(field)] or f"{flag(field)} /" in line]
        assert len(shown) == 1, f"{flag(field)} is not in --help once"
        assert field.metadata["help"].split()[0] in text, f"{flag(field)} has no help"


@pytest.mark.parametrize("cls, field", FIELDS)
def test_help_shows_the_default(cls, field):
    text = " ".join(run("--help", classes=[cls]).output.split())
    after = text.split(f"{flag(field)} ", 1)[1].split(" --", 2)
    words = " ".join(after[:2]) if bool in value_types(field) else after[0]
    if field.default is not None:
        shown = field.default
        shown = "no" if shown is False else f"{shown:g}" if isinstance(shown, float) else shown
        assert f"[default: {shown}]" in words


@pytest.mark.parametrize("cls, field", FIELDS)
def test_every_flag_takes_its_own_default_and_changes_nothing_else(cls, field):
    if field.default is None:
        arguments, expected = [flag(field), "300"], "300" if str in value_types(field) else 300
    elif field.type is bool:
        arguments, expected = [flag(field)], True
    else:
        arguments, expected = [flag(field), field.default], field.default
    given = run(*arguments, classes=[cls])
    assert given[field.name] == expected and type(given[field.name]) is type(expected)
    assert {name for name, value in given.items() if value is not None} == {field.name, "preset"}


def test_help_groups_the_flags_under_headings():
    text = run("--help").output
    headings = ["This command:", "Model:", "Folders:", "Learning:", "Memory and speed:", "Reports and saving:"]
    places = [text.index(f"\n{heading}") for heading in headings]
    assert places[1:] == sorted(places[1:])
    assert text.index("Memory and speed:") < text.index("--batch-size") < text.index("Reports and saving:")


def test_an_omitted_setting_has_no_flag():
    @click.command()
    @setting_options(CorpusConfig, omit=["num_files"])
    def command(**given):
        pass

    names = {field.name for field in dataclasses.fields(CorpusConfig)}
    assert {parameter.name for parameter in command.params} == names - {"num_files"}


def test_a_preset_wins_over_defaults_and_a_flag_over_the_preset():
    assert resolve(GPTConfig).n_layer == 6
    assert resolve(GPTConfig, "--preset", "demo").n_layer == 3
    assert resolve(GPTConfig, "--preset", "demo", "--n-layer", 5).n_layer == 5
    assert resolve(GPTConfig, "--n-layer", 6, "--preset", "demo").n_layer == 6, "typing the default is typing"
    assert resolve(GPTConfig, "--preset", "demo", "--n-layer", 5).n_embd == 128


def test_a_false_or_zero_flag_still_wins_over_its_preset():
    assert resolve(GPTConfig, "--preset", "demo").qk_norm is True
    assert resolve(GPTConfig, "--preset", "demo", "--no-qk-norm").qk_norm is False
    assert resolve(TrainConfig, "--preset", "demo", "--eval-tokens", 0).eval_tokens == 0


def test_underscores_in_flags_are_accepted():
    assert run("--batch_size", 8)["batch_size"] == 8
    assert run("--no-qk_norm")["qk_norm"] is False


def test_a_mistyped_flag_is_answered_with_the_right_one():
    result = run("--batchsize", 8)
    assert result.exit_code == 2 and "--batch-size" in result.output


def test_batch_size_is_a_number_or_auto():
    assert run("--batch-size", "8")["batch_size"] == 8
    assert TrainConfig(batch_size=run("--batch-size", "auto")["batch_size"]).batch_size == "auto"
    with pytest.raises(UserError, match="batch_size is 'half'; it must be at least 1, or auto."):
        TrainConfig(batch_size=run("--batch-size", "half")["batch_size"])


@pytest.mark.parametrize("arguments", [["--n-layer", "six"], ["--n-layer", "1.5"], ["--dropout", "little"],
                                       ["--position", "sinus"], ["--preset", "rtx4090"]])
def test_a_flag_of_the_wrong_kind_ends_with_one_line_naming_it(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and arguments[0] in result.output and "Traceback" not in result.output


# Values

@pytest.mark.parametrize("cls", CLASSES)
def test_settings_are_frozen_and_their_defaults_are_allowed(cls):
    made = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(cls)[0].name, 1)


@pytest.mark.parametrize("cls, name, value, may_be", [
    (GPTConfig, "n_layer", 0, "at least 1 and at most 256"),
    (GPTConfig, "n_layer", -3, "at least 1 and at most 256"),
    (GPTConfig, "n_layer", 257, "at least 1 and at most 256"),
    (GPTConfig, "n_layer", 2.0, "a whole number"),
    (GPTConfig, "n_layer", True, "a whole number"),
    (GPTConfig, "n_layer", "6", "a whole number"),
    (GPTConfig, "n_layer", None, "a whole number"),
    (GPTConfig, "block_size", 1, "at least 2 and at most 65536"),
    (GPTConfig, "vocab_size", 65537, "at least 260 and at most 65536"),
    (GPTConfig, "dropout", 1.0, "at least 0 and below 1"),
    (GPTConfig, "dropout", NAN, "at least 0 and below 1"),
    (GPTConfig, "dropout", False, "a number"),
    (GPTConfig, "bias", 1, "yes or no"),
    (GPTConfig, "bias", "yes", "yes or no"),
    (GPTConfig, "position", "sinus", "one of learned, rotary"),
    (GPTConfig, "position", 3, "text"),
    (TrainConfig, "batch_size", 0, "at least 1, or auto"),
    (TrainConfig, "batch_size", -1, "at least 1, or auto"),
    (TrainConfig, "batch_size", "auto ", "at least 1, or auto"),
    (TrainConfig, "batch_size", 1.5, "a whole number or text"),
    (TrainConfig, "batch_size", True, "a whole number or text"),
    (TrainConfig, "learning_rate", 0, "above 0 and at most 10"),
    (TrainConfig, "learning_rate", INF, "above 0 and at most 10"),
    (TrainConfig, "learning_rate", NAN, "above 0 and at most 10"),
    (TrainConfig, "grad_clip", NAN, "at least 0"),
    (TrainConfig, "grad_clip", -INF, "at least 0"),
    (TrainConfig, "save_minutes", 0, "above 0"),
    (TrainConfig, "max_iters", 0, "at least 1"),
    (TrainConfig, "seed", -1, "at least 0"),
    (TrainConfig, "dtype", "fp16", "one of auto, float32, float16, bfloat16"),
    (SampleConfig, "temperature", NAN, "at least 0 and at most 100"),
    (SampleConfig, "temperature", -0.1, "at least 0 and at most 100"),
    (SampleConfig, "top_p", 0.0, "above 0 and at most 1"),
    (SampleConfig, "top_k", -1, "at least 0"),
    (SampleConfig, "seed", 1.5, "a whole number or nothing"),
    (CorpusConfig, "num_files", 51, "at least 1 and at most 50"),
    (CorpusConfig, "sample_rate", 0, "above 0 and at most 1"),
    (CorpusConfig, "dataset", None, "text"),
])
def test_a_bad_value_says_which_setting_what_it_is_and_what_it_may_be(cls, name, value, may_be):
    with pytest.raises(UserError) as caught:
        cls(**{name: value})
    assert caught.value.message.startswith(f"{name} is {value!r}; it must be {may_be}")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("cls, field", FIELDS)
def test_the_ends_of_every_range_are_in_or_out_as_stated(cls, field):
    m, kinds = field.metadata, value_types(field)

    def allowed(value):
        try:
            config.check_value(field, value)
            return True
        except UserError as error:
            assert field.name in error.message and allowed_values(field) in error.message
            return False

    step = 1 if int in kinds else 1e-9
    for key, inside in [("min", 0), ("max", 0), ("above", step), ("below", -step)]:
        if m[key] is not None:
            outside = inside + (-step if key in ("min", "above") else step)
            assert allowed(m[key] + inside) and not allowed(m[key] + outside)
    if float in kinds:
        assert not allowed(NAN), "a number without a bound would let NaN through"


@pytest.mark.parametrize("values, message", [
    (dict(n_embd=100, n_head=6), r"n_embd is 100; it must be a multiple of n_head \(6\)"),
    (dict(n_embd=36, n_head=4, position="rotary"), "n_head is 4, so a head is 9 wide; rotary positions need an even"),
])
def test_heads_must_divide_the_width(values, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**values)


ANY_VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
                      st.complex_numbers(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers()))


ANY_FIELD = st.sampled_from([(cls, field) for cls in CLASSES for field in dataclasses.fields(cls)])
CASES = settings(max_examples=200, deadline=None, derandomize=True)


@CASES
@given(ANY_FIELD, ANY_VALUE)
def test_any_value_at_all_is_taken_or_answered_with_a_user_error(place, value):
    cls, field = place
    try:
        made = cls(**{field.name: value})
    except UserError as error:
        assert len(error.message.splitlines()) == 1
    else:
        assert getattr(made, field.name) is value
        assert isinstance(value, value_types(field)) or float in value_types(field)


WORDS = st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.sampled_from(
    ["", " 1", "1_000", "+3", "1e3", "0x10", "\u0661", "auto", "none", "\ud800", "a\nb", "9" * 5000]))


@CASES
@given(ANY_FIELD, WORDS)
def test_any_words_behind_a_flag_become_that_value_or_are_refused_in_a_line(place, text):
    cls, field = place
    if bool in value_types(field):
        return  # takes no value
    given = run(f"{flag(field)}={text}", classes=[cls])
    if not isinstance(given, dict):
        errors = [line for line in given.output.splitlines() if line.startswith("Error")]
        assert given.exit_code == 2 and len(errors) == 1 and flag(field) in errors[0]
        return
    value = given[field.name]
    assert type(value) in value_types(field)
    assert value == type(value)(text) or math.isnan(value)
    try:
        assert getattr(cls(**pick(cls, given)), field.name) == value
    except UserError as error:
        assert field.name in error.message and len(error.message.splitlines()) == 1


def allowed_value(field):
    """Values that a field may have."""
    m = field.metadata
    strategies = {
        bool: st.booleans, int: lambda: st.integers(m["min"], m["max"]), type(None): st.none,
        float: lambda: st.floats(m["min"] if m["above"] is None else m["above"],
                                 m["max"] if m["below"] is None else m["below"], exclude_min=m["above"] is not None,
                                 exclude_max=m["below"] is not None, allow_infinity=False),
        str: lambda: st.sampled_from(m["choices"]) if m["choices"] else st.text(max_size=8)}
    return st.one_of(*(strategies[kind]() for kind in value_types(field)))


@CASES
@given(st.data())
def test_any_settings_come_back_from_config_json(data):
    cls = data.draw(st.sampled_from(CLASSES))
    fields = dataclasses.fields(cls)
    values = data.draw(st.fixed_dictionaries({}, optional={field.name: allowed_value(field) for field in fields}))
    try:
        made = cls(**values)
    except UserError as error:
        assert cls is GPTConfig and "n_head" in error.message  # the one rule between two fields
    else:
        saved = json.loads(json.dumps(dataclasses.asdict(made)))
        assert restore(cls, saved, "config.json") == made
        assert {name: getattr(made, name) for name in values} == values


# Presets

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_settings_and_names_only_their_fields(name):
    values = PRESETS[name]
    model, train = GPTConfig(**pick(GPTConfig, values)), TrainConfig(**pick(TrainConfig, values))
    assert set(values) <= set(dataclasses.asdict(model)) | set(dataclasses.asdict(train))
    assert train.tokens_per_iter % (model.block_size * train.batch_size) == 0, "accumulation must come out whole"


def test_the_default_preset_is_what_it_is_said_to_be():
    model, train = GPTConfig(), TrainConfig()
    assert (model.position, model.block_size, model.vocab_size) == ("learned", 256, 4096)
    assert train.tokens_per_iter // (train.batch_size * model.block_size) == 8
    assert (train.tokens_per_iter, train.max_iters) == (65536, 30000)
    assert PRESETS["llama"] == dict(position="rotary"), "only then does it export one to one"


def test_no_name_means_two_things_on_one_command_line():
    names = [field.name for cls in (GPTConfig, TrainConfig) for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


# Saved settings

@pytest.mark.parametrize("cls", CLASSES)
def test_settings_come_back_from_a_saved_dict(cls):
    assert restore(cls, dataclasses.asdict(cls()), "ckpt.pt") == cls()


@CASES
@given(st.sampled_from(CLASSES), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=5) | st.sampled_from([field.name for cls in CLASSES for field in dataclasses.fields(cls)]),
        inner, max_size=3)))
def test_anything_in_the_place_of_saved_settings_is_restored_or_refused_in_one_line(cls, values):
    try:
        made = restore(cls, values, "out/ckpt.pt")
    except UserError as error:
        assert error.message.startswith("out/ckpt.pt: ") and len(error.message.splitlines()) == 1
    else:
        assert made == cls(**values)


@pytest.mark.parametrize("values", [None, [], "text", 3, [("n_layer", 2)], {"n_layers": 2},
                                    {"n_layer": 2, "rope": 1, 7: 0}, {1: 1, "a": 2, None: 3}, {"n_layer": "two"},
                                    {"n_layer": NAN}, {"n_embd": 10}, {"__class__": 1}])
def test_settings_that_are_not_ours_are_refused_in_one_line_naming_the_file(values):
    with pytest.raises(UserError) as caught:
        restore(GPTConfig, values, "out/ckpt.pt")
    assert caught.value.message.startswith("out/ckpt.pt: ") and "\n" not in caught.value.message


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="unknown settings 'n_layers'"):
        restore(GPTConfig, {"n_layers": 2, "n_head": 2}, "ckpt.pt")


def test_pick_takes_its_own_fields_that_were_given():
    assert pick(GPTConfig, dict(n_layer=2, n_head=None, batch_size=3, bias=False)) == dict(n_layer=2, bias=False)


# Files

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_only_when_its_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"file": b"new"}


def test_a_text_file_is_utf8_on_every_system(tmp_path):
    with replacing(tmp_path / "file", "w") as file:
        file.write("é…")
    assert contents(tmp_path) == {"file": "é…".encode()}


def test_the_folder_of_a_new_file_is_made(tmp_path):
    with replacing(tmp_path / "a" / "b" / "file") as file:
        file.write(b"new")
    assert contents(tmp_path / "a" / "b") == {"file": b"new"}


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), UserError("mine"), SystemExit(3)])
def test_a_writer_that_fails_leaves_the_old_file_and_its_own_error(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        with replacing(path) as file:
            file.write(b"half")
            raise error
    assert caught.value is error
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if fails != "write":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(UserError) as caught:
        with replacing(path) as file:
            full() if fails == "write" else file.write(b"new")
    assert str(path) in caught.value.message and "No space left on device. Free some space" in caught.value.message
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are POSIX")
def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = f"""
import resource, signal
from config import UserError, replacing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    with replacing({str(path)!r}) as file:
        for _ in range(100):
            file.write(bytes(1000))
except UserError as error:
    print(error.message)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith(f"cannot write {path}: "), result.stderr
    assert contents(tmp_path) == {"file": b"old"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match="cannot write"):
        with replacing(tmp_path / "file" / "below") as file:
            file.write(b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_replacing_waits_until_a_reader_has_closed_the_file(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "in use"), PermissionError(13, "in use")]

    def busy(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(config.time, "sleep", lambda seconds: None)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"file": b"new"}


def test_a_reader_that_never_closes_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    def busy(source, target):
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "a", tmp_path / "b", seconds=0.1)
