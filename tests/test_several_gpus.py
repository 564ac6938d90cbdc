"""Several processes under torchrun: a signal to any of them ends all of them with a save."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import train
from model import read_checkpoint

FLAGS = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--intermediate-size", "32", "--block-size", "32",
         "--tokens-per-iter", "256", "--batch-size", "2", "--eval-tokens", "400", "--final-eval-tokens", "400",
         "--log-interval", "1", "--sample-tokens", "0", "--device", "cpu"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes under /proc")


def processes_of(out):
    """{rank, None for torchrun itself: process id} of those whose command line names the folder `out`, ours alone."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(out) in words and os.fsencode(ROOT / "train.py") in words:
                environment = (folder / "environ").read_bytes().split(b"\0")
                rank = next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)
                found[rank] = int(folder.name)
    return found


def wait_until(condition, seconds, what):
    """Its first true value; the test fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def started(command, out):
    """torchrun and its processes, none of which outlives the block; torchrun's output is a file beside `out`."""
    with open(out.with_suffix(".txt"), "wb") as log:
        parent = subprocess.Popen([*command, "--out-dir", str(out)], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield parent
    finally:
        for process in processes_of(out).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        parent.kill()
        parent.wait(10)


def last_iteration(out):
    """The last iteration that the log has a whole line of, 0 before there is one."""
    with contextlib.suppress(OSError):
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return max((json.loads(line)["iter"] for line in lines), default=0)
    return 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_process_ends_all_of_them_with_a_save(data, tmp_path, rank):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "train.py"), *FLAGS, "--data-dir", str(data), "--max-iters", "1000000",
               "--eval-interval", "1000000"]
    with started(command, out) as parent:
        wait_until(lambda: last_iteration(out) >= 20 or parent.poll() is not None, 90, "progress")
        said = out.with_suffix(".txt").read_text(errors="replace")
        assert parent.poll() is None, said
        there = processes_of(out)
        assert {0, 1} <= set(there), said
        os.kill(there[rank], signal.SIGTERM)
        parent.wait(60)
        wait_until(lambda: not processes_of(out), 10, "end of all processes")
    said = out.with_suffix(".txt").read_text(errors="replace")
    at = last_iteration(out)
    assert read_checkpoint(out / "ckpt.pt")["progress"]["iter"] == at >= 20, said
    result = CliRunner().invoke(train.main, ["--resume", "--data-dir", str(data), "--out-dir", str(out),
                                             "--max-iters", str(at + 3)])
    assert result.exit_code == 0, result.output
    assert last_iteration(out) == at + 3, "one process goes on where two stopped"


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_not_lost(monkeypatch):
    def interrupted(value, operation):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(train, "across", lambda value, operation: value)
        return value

    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "across", interrupted)
    with train.StopRequest() as stop:
        assert [stop.shared(torch.device("cpu")) for _ in range(3)] == [None, None, signal.SIGTERM]
