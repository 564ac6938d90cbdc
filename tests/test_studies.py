"""The numbers, tables and files of tests/benchmarks/studies.py and several_gpus.py, mostly on runs made up by hand."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

import train

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
common, studies, several_gpus = (importlib.import_module(name) for name in ("common", "studies", "several_gpus"))


def settings_of(command):
    """What train.py makes of the words after its name; fails on an option that it does not have."""
    return train.main.make_context("train.py", [str(word) for word in command]).params


def write_run(folder, iterations=40, tokens_per_iter=1000, rate=500.0, start=30.0, bpb=lambda it: 1.0):
    """A run that took `start` seconds before its first iteration, then `rate` tokens a second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(iter=0, tokens=0, seconds=0.0, val_loss=8.0, val_bpb=3.0)]
    for it in range(10, iterations + 1, 10):
        at = dict(iter=it, tokens=it * tokens_per_iter, seconds=start + it * tokens_per_iter / rate)
        rows.append(at | dict(train_loss=2.0, lr=0.1, skipped=it // 20, peak_memory_mib=100 + it,
                              tokens_per_second=rate if it > 10 else 10 * tokens_per_iter / at["seconds"]))
        rows.append(at | dict(val_loss=2.0, val_bpb=bpb(it)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(dict(model=dict(vocab_size=512), corpus=dict(train_tokens=20_000))))
    for name in ("ckpt.pt", "best.pt"):
        (folder / name).write_text("weights")


@pytest.fixture
def pretend(monkeypatch):
    """train.py is not started: each command is checked, kept, and leaves a run made up by `write_run`."""
    commands = []

    def run_process(command, log, timeout, *rest):
        given = settings_of(command[2:])
        assert Path(command[1]) == ROOT / "train.py"
        commands.append(given)
        time.sleep(0.2 if given["dropout"] == 0 else 0)
        if given["dtype"] == "bfloat16":
            print("Error: no bfloat16 here.", file=log)
            return 1
        print("Device: cpu (1 threads), float32.", file=log)
        # A context of 16 tokens runs at 160 tokens a second, and so on.
        rate = 10 * given["block_size"] if given["block_size"] else 500
        write_run(Path(given["out_dir"]), max(20, given["max_iters"]), given["tokens_per_iter"], rate)
        return 0

    monkeypatch.setattr(common, "run_process", run_process)
    return commands


def study(*arguments, expect=0):
    result = CliRunner().invoke(studies.main, [*map(str, arguments)])
    assert result.exit_code == expect, result.output
    return result.output


def test_the_start_of_a_run_counts_neither_in_its_rate_nor_in_its_seconds(tmp_path):
    write_run(tmp_path, bpb=lambda it: 1 + abs(it - 30) / 100)
    row = studies.read_run(tmp_path)
    assert (row["tokens_per_second"], row["seconds"], row["start_seconds"]) == (500, 80.0, 30.0)
    assert (row["best_iter"], row["best_bpb"], row["final_bpb"]) == (30, 1.0, 1.1)
    assert (row["iterations"], row["epochs"], row["skipped"], row["peak_mib"]) == (40, 2.0, 2, 140)
    assert [seconds for _, seconds, _ in row["curve"]] == [20, 40, 60, 80]


def test_a_real_run_gives_a_row_keeps_its_log_and_loses_its_weights(data, tmp_path):
    one = studies.Study("real", {}, tmp_path, "on", 100, True, [], 32768)
    row = one.train("run", 12, 2, "--data-dir", str(data))
    assert row["iterations"] == 12 and row["tokens"] == 12 * 512 and 2 < row["final_bpb"] < 5
    assert "CPU" in row["device"].upper() and not row["compile_failed"]
    assert sorted(path.name for path in (tmp_path / "real" / "run").glob("*.*")) == ["config.json", "metrics.jsonl"]
    assert row["command"].startswith("python train.py --data-dir") and settings_of(row["command"].split()[2:])


def test_a_run_that_fails_is_a_row_with_its_reason_and_the_others_go_on(data, tmp_path, pretend):
    output = study("precision", "--data-dir", data, "--work-dir", tmp_path, "--tokens", 1e6)
    saved = json.loads((tmp_path / "precision.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["float16", "bfloat16", "float32"]
    assert saved["rows"][1]["error"] == "Error: no bfloat16 here." and saved["table"] in output
    assert "| float32 | 500 | " in saved["table"] and all(row["command"] in output for row in saved["rows"])
    assert [given["max_iters"] for given in pretend] == [31] * 3
    assert (tmp_path / "precision.png").read_bytes()[:4] == b"\x89PNG"
    drawn = common.read_jsonl(tmp_path / "precision" / "picture" / "float16" / "metrics.jsonl")
    assert drawn[1]["seconds"] == pytest.approx(10 * 32768 / 500), "without the start"


def test_contexts_get_the_iterations_that_take_equal_time_at_equal_tokens(data, tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(studies.Study, "plot", lambda self, rows, path: None)
    study("context", "--data-dir", data, "--work-dir", tmp_path, "--tiny", "--seconds", 512)
    probes, runs = pretend[::2], pretend[1::2]
    assert [given["block_size"] for given in runs] == [given["block_size"] for given in probes] == [16, 32, 64, 128]
    assert {given["batch_size"] * given["block_size"] for given in pretend} == {512}
    assert [given["max_iters"] for given in runs] == [160, 320, 640, 1280]


def test_corpora_of_different_tokenizers_are_refused(data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "meta.json").write_text(json.dumps(dict(tokenizer=dict(sha256="another"))))
    assert "one tokenizer" in study("regularization", "--data-dir", data, "--data-dir", other, expect=2)


def test_fifteen_runs_several_at_a_time_come_in_their_order(data, tmp_path, pretend):
    folders = [tmp_path / name for name in ("part10", "part30", "part100")]
    for folder in folders:
        folder.mkdir()
        (folder / "meta.json").write_text((data / "meta.json").read_text())
    where = [word for folder in folders for word in ("--data-dir", folder)]
    study("regularization", *where, "--work-dir", tmp_path / "work", "--jobs", 4)
    rows = json.loads((tmp_path / "work" / "regularization.json").read_text())["rows"]
    assert [row["corpus"] for row in rows] == ["part10"] * 5 + ["part30"] * 5 + ["part100"] * 5
    assert [row["setting"].split(",")[0] for row in rows[:3]] == ["dropout 0", "dropout 0.1", "dropout 0.2"]
    asked = {(given["data_dir"], given["dropout"], given["weight_decay"]) for given in pretend}
    assert asked == {(str(folder), *way) for folder in folders
                     for way in ((0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.1, 0), (0.1, 0.5))}
    assert (tmp_path / "work" / "regularization.png").exists()


def test_what_is_finished_when_a_study_is_stopped_is_in_its_file(data, tmp_path, pretend, monkeypatch):
    real = studies.read_run

    def stop(folder):
        if folder.name == "adamw-learned":
            raise KeyboardInterrupt
        return real(folder)

    monkeypatch.setattr(studies, "read_run", stop)
    study("optimizer", "--data-dir", data, "--work-dir", tmp_path, expect=1)
    rows = json.loads((tmp_path / "optimizer.json").read_text())["rows"]
    assert [row["name"] for row in rows][:2] == ["muon-learned", "muon-rotary"]
    assert "adamw-learned" not in [row["name"] for row in rows]


def test_memory_has_a_cell_for_each_micro_batch_even_where_a_curve_ends_early(data, tmp_path, monkeypatch):
    count = []

    def measure(script, job, timeout, cache):
        count.append(1)
        if len(count) == 2:
            job["sizes"] = job["sizes"][:1]  # as if the process had died at the second size
            studies.worker(job)
            return dict(error="it died")
        return studies.worker(job) | dict(device="CPU")

    monkeypatch.setattr(common, "measure", measure)
    monkeypatch.setattr(studies, "MEMORY_ITERS", 3)
    study("memory", "--data-dir", data, "--work-dir", tmp_path, "--tiny", "--sizes", "16,32")
    small, large = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (small["name"], large["name"]) == ("1", "2")
    assert set(small["cells"]) == set(studies.PAIRS) == {*large["cells"], "eager, recomputed"}
    for cell in (*small["cells"].values(), *large["cells"].values()):
        assert cell["expected_mib"] > 50 and cell["tokens_per_second"] > 0
        assert settings_of(cell["command"].split()[2:])["checkpoint_activations"] == (
            "--checkpoint-activations" in cell["command"] or None)


def test_several_processes_are_compared_with_one_of_the_same_flags(data, tmp_path, monkeypatch):
    commands = []

    def run_process(command, log, timeout, *rest):
        at = command.index(str(ROOT / "train.py"))
        given = settings_of(command[at + 1:])
        several = command[1:at] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        assert several or at == 1
        commands.append({name: value for name, value in given.items() if name != "out_dir"})
        write_run(Path(given["out_dir"]), rate=950.0 if several else 500.0)
        return 0

    monkeypatch.setattr(common, "run_process", run_process)
    monkeypatch.setattr(several_gpus, "WARMUP", 1)
    result = CliRunner().invoke(several_gpus.main, ["--data-dir", str(data), "--processes", "2", "--json",
                                                    str(tmp_path / "gpus.json"), "--", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "gpus.json").read_text())
    assert (saved["ratio"], saved["largest_difference"], saved["validation_difference"]) == (1.9, 0, 0)
    assert commands[0] == commands[1] and commands[0]["dtype"] == "bfloat16"
    assert train.GPT(train.GPTConfig(**train.pick(train.GPTConfig, commands[0]))).count_parameters() > 100e6
