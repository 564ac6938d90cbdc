"""Nothing lost, nothing wrong in silence, no one let in: short forms of tests/torture, and other systems."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, damages
from hypothesis import given, settings

import chat
import config
import export
import plot_loss
import preprocess
import train
from config import GPTConfig, UserError, sole_owner
from model import GPT, build_model, read_checkpoint, save_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "torture"))
import harness  # noqa: E402
import corrupt  # noqa: E402
import full_disk  # noqa: E402
import kill  # noqa: E402
import save_storm  # noqa: E402

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and limits of Unix")
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")
RUN = [*harness.TINY, "--compile", "off", "--eval-interval", "2", "--max-iters"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    call(preprocess, harness.preparation(harness.write_tales(folder / "tales.txt"), folder / "data"))
    return folder / "data"


def call(script, arguments, code=0):
    result = CliRunner().invoke(script.main, [str(word) for word in arguments])
    assert result.exit_code == code and isinstance(result.exception, SystemExit | None), result.output
    return result.output


def fit(data, out, *flags, iters=4, code=0):
    return call(train, [*RUN, iters, "--data-dir", data, "--out-dir", out, *flags], code)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(data, folder)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


# Short forms of the long ones

@POSIX
def test_killed_and_disturbed_at_random_moments_the_same_command_ends_with_the_same_files(tmp_path):
    count, failures = kill.torture(2, 0, scratch=tmp_path)
    assert not failures and count["rounds"]


@POSIX
def test_readers_and_a_training_that_always_saves_never_meet_a_torn_file(tmp_path):
    count, failures = save_storm.storm(1.5, scratch=tmp_path)
    assert not failures and min(count.values()) > 0


@POSIX
def test_damaged_files_end_in_a_line_or_make_no_difference(tmp_path):
    count, bad = corrupt.all_cases(16, [3, 26], seed=7, workers=1, scratch=tmp_path)
    assert not bad and count["refused"]


@POSIX
def test_a_full_disk_harms_nothing_and_says_so(tmp_path):
    count, failures = full_disk.torture(1, mounts=False, scratch=tmp_path)
    assert not failures and count["run, file size limit: refused"]


# One run, one owner

HOLD = "import sys; from config import sole_owner\n" \
       "with sole_owner(sys.argv[1], 'x'): print('held', flush=True); input()"


@pytest.mark.parametrize("killed", [True, False])
def test_a_folder_has_one_owner_until_that_process_ends_however_it_ends(data, tmp_path, killed):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=ROOT, env=ENVIRONMENT) as other:
        assert other.stdout.readline() == b"held\n"
        assert f"another process is at work in {tmp_path}" in fit(data, tmp_path, code=1)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        assert "another process" in call(train, ["--resume", "--out-dir", tmp_path], 1)
        assert "another process" in call(preprocess, harness.preparation(data.parent / "tales.txt", tmp_path), 1)
        other.kill() if killed else other.communicate(b"\n")
    fit(data, tmp_path)
    assert (tmp_path / "lock").stat().st_size == 0


def test_a_held_folder_can_be_read_by_chat_plot_and_plan(data, out):
    with sole_owner(out, "training"):
        call(chat, ["--prompt", "A", "--max-new-tokens", 2, "--out-dir", out, "--device", "cpu"])
        call(plot_loss, [out])
        fit(data, out, "--plan")


def test_where_the_file_system_has_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(config, "fcntl", type("F", (), dict(flock=unsupported, LOCK_EX=2, LOCK_NB=4)))
    with sole_owner(tmp_path, "training"):
        pass


def test_on_windows_the_lock_is_a_byte_of_the_file(tmp_path, monkeypatch):
    calls = []

    def locking(number, mode, length):
        calls.append((mode, length))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(config, "fcntl", None)
    monkeypatch.setattr(config, "msvcrt", type("M", (), dict(locking=staticmethod(locking), LK_NBLCK=2)), raising=False)
    with sole_owner(tmp_path, "training"), pytest.raises(UserError, match="another process"), sole_owner(tmp_path, "x"):
        pass
    assert calls == [(2, 1)] * 2


# Nothing lost

def test_overwriting_with_flags_that_are_refused_leaves_the_old_run(data, out):
    before = harness.snapshot(out)
    fit(data, out, "--overwrite", "--batch-size", 3, code=1)
    assert harness.snapshot(out) == before


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew_by_the_same_command(data, tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"iter": 0, "val_loss": 5.7}\n{"iter": 1', encoding="utf-8")
    fit(data, tmp_path)
    (tmp_path / "ckpt.pt").unlink()
    output = fit(data, tmp_path, code=1)
    assert "--overwrite" in output and "--resume" not in output


def test_lines_of_the_log_that_are_none_are_left_out_aloud(data, out):
    log = out / "metrics.jsonl"
    whole = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([whole[0], "rubbish", "[" * 99_999, '{"iter": "2"}', *whole[1:]]) + "\n", encoding="utf-8")
    output = call(train, ["--resume", "--max-iters", 5, "--data-dir", data, "--out-dir", out])
    assert "3 lines are damaged" in output
    assert log.read_text(encoding="utf-8").splitlines()[:len(whole)] == whole


@pytest.mark.parametrize("spoil", [
    lambda c: c.pop("optimizer"), lambda c: c.update(optimizer=[]), lambda c: c.update(rng=torch.zeros(3)),
    lambda c: c["progress"].update(iter="4"), lambda c: c["progress"].update(best_val=math.nan),
    lambda c: c["progress"].update(new=1), lambda c: c["optimizer"][0]["state"][0].update(momentum=torch.zeros(2, 2)),
    lambda c: c["optimizer"][1]["state"].pop(0), lambda c: c["optimizer"][1]["state"][0]["exp_avg"].fill_(math.inf),
    lambda c: c["optimizer"][0].pop("state"), lambda c: c.update(scaler=None),
    lambda c: c.update(train_config={"seed": "x"})])
def test_a_damaged_training_state_ends_in_a_line_and_the_file_stays(data, out, spoil):
    path = out / "ckpt.pt"
    contents = torch.load(path, weights_only=True)
    spoil(contents)
    torch.save(contents, path)
    before = harness.snapshot(out)
    output = call(train, ["--resume", "--max-iters", 5, "--data-dir", data, "--out-dir", out], 1)
    assert output.count("Error: ") == 1 and "ckpt.pt" in output
    assert harness.snapshot(out) == before


def test_the_state_of_best_is_not_one_to_go_on_from(data, out):
    (out / "best.pt").replace(out / "ckpt.pt")
    assert "lacks optimizer" in call(train, ["--resume", "--data-dir", data, "--out-dir", out], 1)


@pytest.mark.parametrize("change", [
    lambda tensor: tensor.bfloat16(), lambda tensor: tensor.cfloat(), lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"), lambda tensor: tensor[:0], lambda tensor: tensor.tolist()])
@pytest.mark.parametrize("name", ["tokenizer", "wte.weight"])
def test_tensors_of_other_kinds_than_ours_are_refused(out, tmp_path, name, change):
    contents = torch.load(out / "best.pt", weights_only=True)
    place = contents if name in contents else contents["model"]
    place[name] = change(place[name])
    torch.save(contents, out / "best.pt")
    for script, arguments in ((chat, ["--prompt", "A", "--device", "cpu"]),
                              (export, ["--format", "pt", "--output", tmp_path / "new.pt"]),
                              (export, ["--format", "tokenizer", "--output", tmp_path / "new.model"])):
        assert call(script, [*arguments, "--out-dir", out], 1).count("Error: ") == 1
    assert not list(tmp_path.glob("new*"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(damages())
def test_any_damage_to_a_checkpoint_is_refused_or_makes_no_difference(checkpoint, damage):
    path, whole, contents = checkpoint
    path.write_bytes(damage(whole))
    try:
        assert harness.same(read_checkpoint(path), contents)
    except UserError as error:
        assert len(error.message.splitlines()) == 1 and str(path) in error.message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(path, bytes, contents) of one with everything that a real one has."""
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    model = GPT(GPTConfig(block_size=8, vocab_size=260, n_layer=1, n_head=2, n_embd=16, intermediate_size=32))
    save_checkpoint(path, model, bytes(300), progress=dict(iter=3, best_val=1.5), rng=torch.get_rng_state(),
                    optimizer=[{"state": {0: dict(exp_avg=torch.ones(3))}, "param_groups": []}])
    return path, path.read_bytes(), read_checkpoint(path)


def test_each_bit_of_a_zip_entry_is_checked_or_makes_no_difference(checkpoint):
    """Bit 4 of byte 38 makes a folder of it, of which torch reads nothing."""
    path, whole, contents = checkpoint
    entry, unimportant = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"archive/data/0")), set()
    for bit in range(8 * 60):
        spoiled = bytearray(whole)
        spoiled[entry + bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            assert harness.same(read_checkpoint(path), contents)
            unimportant.add(bit)
        except UserError:
            pass
    assert 8 * 38 + 4 not in unimportant


@pytest.mark.parametrize("progress", [None, [], {"iter": "x", "best_val": None}, {"iter": math.nan, "best_val": "y"}])
def test_chat_needs_no_progress(out, progress):
    contents = torch.load(out / "best.pt", weights_only=True)
    torch.save(contents | dict(progress=progress), out / "best.pt")
    call(chat, ["--prompt", "A", "--max-new-tokens", 2, "--out-dir", out, "--device", "cpu"])


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_a_tokenizer_with_a_wrong_byte_is_refused_or_read(data, byte):
    model = bytearray((data / "tok300.model").read_bytes())
    for at in (0, 1, 5, 20, 22, 40, len(model) // 2, len(model) - 1):
        changed = bytes(model[:at]) + bytes([byte]) + bytes(model[at + 1:])
        try:
            preprocess.Tokenizer(changed)
        except UserError as error:
            assert "prepare the corpus again" in error.message


def test_a_changed_number_in_meta_json_is_noticed(data, tmp_path):
    for name in ("meta.json", *(path.name for path in data.iterdir() if path.suffix in (".bin", ".model"))):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    meta["train"][0]["stories"] += 1
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="meta.json is damaged"):
        preprocess.open_corpus(tmp_path)


@pytest.mark.parametrize("place", [("train",), ("train", 0), ("train", 0, "file"), ("tokenizer",), ("arguments",),
                                   ("source",)])
@pytest.mark.parametrize("value", [None, 3, [], {}, "../../x"])
def test_meta_json_with_other_types_is_refused(data, tmp_path, place, value):
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    target = meta
    for key in place[:-1]:
        target = target[key]
    if type(target[place[-1]]) is type(value) and place[-1] != "file":
        pytest.skip("the right type")
    target[place[-1]] = value
    meta["sha256"] = preprocess.digest(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="meta.json is damaged"):
        preprocess.open_corpus(tmp_path)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(data, tmp_path):
    huge = ["--n-layer", 256, "--n-embd", 16384, "--n-head", 64, "--intermediate-size", 65536]
    output = fit(data, tmp_path, *huge, code=1)
    assert "parameters needs" in output and not (tmp_path / "ckpt.pt").exists()


# Numbers that stay finite

def test_weights_that_an_update_makes_nan_are_never_saved_over_good_ones(data, tmp_path, monkeypatch):
    real, count = train.train_step, []

    def step(forward, model, *rest):
        result = real(forward, model, *rest)()
        count.append(1)
        if len(count) == 3:  # after the loss was found finite, and just before a save
            with torch.no_grad():
                model.wte.weight[5, 3] = math.nan
        return lambda: result

    monkeypatch.setattr(train, "train_step", step)
    output = fit(data, tmp_path, "--save-minutes", 1e-9, iters=6, code=1)
    assert "not finite; they were not saved" in output and "--muon-learning-rate 0.01" in output
    for name in ("ckpt.pt", "best.pt"):
        build_model(read_checkpoint(tmp_path / name), name)
    assert read_checkpoint(tmp_path / "ckpt.pt")["progress"]["iter"] == 2
    monkeypatch.setattr(train, "train_step", real)
    call(train, ["--resume", "--data-dir", data, "--out-dir", tmp_path])


def test_an_infinite_gradient_without_a_scaler_changes_nothing():
    model = torch.nn.Linear(2, 1)
    before = [weight.clone() for weight in model.parameters()]

    def forward(x, y):
        return (model(x) * 1e38 * 10).sum() * 0 + torch.sqrt((model(x) * 0).abs()).sum()  # finite, its slope is not

    settings = train.TrainConfig()
    device = torch.device("cpu")
    with pytest.raises(train.LossNotFinite):
        optimizer = train.Optimizers(torch.optim.AdamW(model.parameters(), fused=True))
        train.train_step(forward, model, [(torch.ones(1, 2), None)], 1, optimizer,
                         train.make_scaler(device, torch.float32), settings, device, torch.float32)()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("flags", [["--muon-learning-rate", 10, "--embedding-learning-rate", 10],
                                   ["--optimizer", "adamw", "--learning-rate", 10, "--grad-clip", 0]])
def test_a_learning_rate_that_explodes_leaves_checkpoints_that_load(data, tmp_path, flags):
    command = [*RUN, 30, "--data-dir", data, "--out-dir", tmp_path, *flags]
    result = CliRunner().invoke(train.main, list(map(str, command)))
    assert result.exit_code == 0 or "Train again with a lower rate" in result.output
    for path in tmp_path.glob("*.pt"):
        build_model(read_checkpoint(path), path)


# Other systems

def test_folders_with_spaces_and_letters_of_other_scripts(tmp_path):
    place = tmp_path / "Großmutter's Märchen 故事"
    place.mkdir()
    call(preprocess, harness.preparation(harness.write_tales(place / "tal es é.txt"), place / "da ta"))
    fit(place / "da ta", place / "aus gabe")
    call(chat, ["--prompt", "A", "--max-new-tokens", 2, "--out-dir", place / "aus gabe", "--device", "cpu"])
    assert "Wrote" in call(plot_loss, [place / "aus gabe"])


# Commands one after the other in a process of its own, and their exit statuses: importing torch takes most of the time.
ALL_IN_ONE = """
import json, multiprocessing, os, sys, tempfile
multiprocessing.set_start_method("spawn")
if hasattr(os, "fork"):
    del os.fork
tempfile.tempdir = "not there"
statuses = []
for script, arguments in json.load(sys.stdin):
    try:
        __import__(script).main(arguments)
    except SystemExit as end:
        statuses.append(end.code)
print(*statuses, sep=",")
"""


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.9 makes a temporary folder when it is imported")
@pytest.mark.parametrize("encoding, kind", [("ascii", ".jsonl"), ("cp1252", ".txt")])
def test_no_utf8_console_no_fork_and_no_temporary_folder_stop_nothing(tmp_path, encoding, kind):
    place = tmp_path / "故 事é"
    place.mkdir()
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("TMPDIR", "LC_ALL", "LANG")}
    environment |= dict(PYTHONIOENCODING=encoding, PYTHONUTF8="0", HF_HOME=str(place / "hf"))
    source = harness.write_tales(place / f"tales{kind}")
    commands = [("preprocess", harness.preparation(source, place / "data")),
                ("train", [*RUN, 2, "--data-dir", place / "data", "--out-dir", place / "out"]),
                ("chat", ["--prompt", "é", "--max-new-tokens", 3, "--out-dir", place / "out"]),
                ("plot_loss", [place / "out"])]
    done = subprocess.run([sys.executable, "-c", ALL_IN_ONE], env=environment, cwd=ROOT, capture_output=True,
                          input=json.dumps([(script, list(map(str, words))) for script, words in commands]).encode())
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode("utf-8", "replace")
    assert done.stdout.split()[-1] == b"0,0,0,0" and (place / "out" / "loss_curve.png").exists()


def test_every_file_waits_for_a_reader_that_holds_it(data, tmp_path, monkeypatch):
    real, refusals = os.replace, []

    def busy(source, target):
        if refusals.count(target) % 3 < 2:
            refusals.append(target)
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        refusals.append(target)
        return real(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(config.time, "sleep", lambda seconds: None)
    out, again = tmp_path / "out", tmp_path / "data"
    call(preprocess, harness.preparation(data.parent / "tales.txt", again))
    assert harness.prepared(again) == harness.prepared(data)
    fit(again, out)
    call(train, ["--resume", "--max-iters", 6, "--data-dir", again, "--out-dir", out])
    assert read_checkpoint(out / "ckpt.pt")["progress"]["iter"] == 6
    call(plot_loss, [out])
    for kind, name in (("pt", "new.pt"), ("tokenizer", "new.model")):
        call(export, ["--format", kind, "--out-dir", out, "--output", tmp_path / name])
    assert {path.name for path in refusals} >= {
        "text", "text.json", "meta.json", "train_000.bin", "tok300.model", "ckpt.pt", "best.pt", "config.json",
        "metrics.jsonl", "loss_curve.png", "new.pt", "new.model"}


def test_no_script_needs_fork_or_a_temporary_folder_of_unix():
    for path in ROOT.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"os\.fork|multiprocessing|[\"']/(tmp|var|dev)/", source), path.name
        unix = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
        for node in ast.parse(source).body:  # at the top, outside try
            if isinstance(node, ast.Import):
                assert not unix & {alias.name for alias in node.names}, path.name
