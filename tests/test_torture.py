"""Nothing is lost, nothing goes wrong silently: short forms of tests/torture, and the conditions of other systems."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import chat
import config
import export
import plot_loss
import preprocess
import train
from config import folder_lock
from data import Corpus
from model import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "torture"))
import corrupt  # noqa: E402
import full_disk  # noqa: E402
import harness  # noqa: E402
import kill  # noqa: E402
import save_storm  # noqa: E402

pytestmark = pytest.mark.usefixtures("signals")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of Unix")
RUN = [*harness.TINY, "--eval-interval", "2", "--max-iters"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    call(preprocess, harness.preparation(harness.write_tales(folder / "tales.txt"), folder / "data"))
    return folder / "data"


def call(script, arguments, codes=(0,)):
    result = CliRunner().invoke(script.main, [str(word) for word in arguments])
    assert result.exit_code in codes and isinstance(result.exception, SystemExit | None), result.output
    return result.output


def fit(data, out, *flags, iters=4, codes=(0,)):
    return call(train, [*RUN, iters, "--data-dir", data, "--out-dir", out, *flags], codes)


# -----------------------------------------------------------------------------
# Short forms of the torture scripts

@posix
def test_killed_at_random_moments_the_same_command_ends_with_the_same_files(tmp_path):
    count, failures = kill.torture(2, 0, scratch=tmp_path, kinds=[".txt"])
    assert not failures and count["SIGKILL, preparation"] == count["SIGKILL, training"] == 1


@posix
def test_a_training_that_always_saves_never_shows_a_torn_file_nor_lets_a_second_one_in(tmp_path):
    count, failures = save_storm.torture(1, scratch=tmp_path)
    assert not failures and min(count.values()) > 0


@posix
def test_a_damaged_file_is_refused_in_one_line_repaired_or_makes_no_difference(tmp_path):
    count, failures = corrupt.torture(5, seed=1, scratch=tmp_path)
    assert not failures and count["refused in one line"] and count["no difference"]


@posix
def test_a_full_disk_harms_nothing_and_says_so(tmp_path):
    count, failures = full_disk.torture(2, mounts=False, scratch=tmp_path)
    assert not failures and count == {"corpus, limited files: refused": 2, "run, limited files: refused": 2}


# -----------------------------------------------------------------------------
# The run that is there

def test_overwriting_with_flags_that_are_refused_keeps_the_old_run(data, tmp_path):
    fit(data, tmp_path)
    before = harness.snapshot(tmp_path)
    fit(data, tmp_path, "--overwrite", "--batch-size", 3, codes=[1])
    assert harness.snapshot(tmp_path) == before


def test_a_folder_in_use_can_be_planned_for(data, tmp_path):
    with folder_lock(tmp_path):
        fit(data, tmp_path, "--plan")
        assert "in use" in fit(data, tmp_path, codes=[1])


@pytest.mark.parametrize("flags", [["--muon-learning-rate", 10, "--embedding-learning-rate", 10],
                                   ["--optimizer", "adamw", "--learning-rate", 10, "--grad-clip", 0]])
def test_a_learning_rate_that_explodes_ends_in_checkpoints_that_load(data, tmp_path, flags):
    output = fit(data, tmp_path, *flags, iters=30, codes=[0, 1])
    assert "Finished" in output or "Train again from the start with half the learning rate" in output
    assert all(load_checkpoint(path) for path in tmp_path.glob("*.pt"))


# -----------------------------------------------------------------------------
# Other systems

def test_folders_of_any_name_a_locale_without_utf_8_no_fork_and_no_temporary_folder_stop_nothing(tmp_path):
    place = tmp_path / "Großmutter's Märchen 故事"
    place.mkdir()
    source, data, out = harness.write_tales(place / "tal es é.jsonl"), place / "da ta", place / "aus gabe"
    for script, arguments in (("preprocess", harness.preparation(source, data)),
                              ("train", [*RUN, 2, "--data-dir", data, "--out-dir", out]),
                              ("chat", ["--prompt", "é", "--max-new-tokens", 3, "--device", "cpu", "--out-dir", out]),
                              ("plot_loss", [out])):
        assert "故事" in harness.run(script, arguments, (harness.another_system, tmp_path / "tmp")), "a pipe gets UTF-8"
    assert (out / "loss_curve.png").exists()


def test_every_file_that_replaces_another_waits_for_a_reader_on_windows(data, tmp_path, monkeypatch):
    real, refused = os.replace, set()

    def busy(source, target):
        if target not in refused:
            refused.add(target)
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return real(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(config.time, "sleep", lambda seconds: None)
    call(preprocess, harness.preparation(data.parent / "tales.txt", tmp_path / "data"))
    assert harness.prepared(tmp_path / "data") == harness.prepared(data) and Corpus(tmp_path / "data")
    fit(tmp_path / "data", tmp_path / "out")
    call(plot_loss, [tmp_path / "out"])
    for kind, name in (("pt", "new.pt"), ("tokenizer", "new.model")):
        call(export, ["--format", kind, "--out-dir", tmp_path / "out", "--output", tmp_path / name])
    call(chat, ["--prompt", "A", "--max-new-tokens", 2, "--device", "cpu", "--checkpoint", tmp_path / "new.pt"])
    assert {path.name for path in refused} >= {
        "arguments.json", "train.arrow", "tok300.model", "train_000.bin", "val_000.bin", "meta.json", "ckpt.pt",
        "best.pt", "config.json", "metrics.jsonl", "loss_curve.png", "new.pt", "new.model"}
