"""What the benchmarks share: processes, the figures of a run, deadlines, options, tables and JSON.

As a script it is train.py of any checkout, held to a limit of GPU memory: common.py CHECKOUT GIB FLAGS...
"""

import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# --tiny: shows on a CPU that a script works
TINY_BLOCK, TINY_EVAL_TOKENS = 64, 2000
TINY = ["--block-size", str(TINY_BLOCK), "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--intermediate-size",
        "64", "--device", "cpu"]


# -----------------------------------------------------------------------------
# Processes: each measurement has clean memory and a clean compiler, and a crash is only a row of the table

def run_process(command, timeout, cache_dir=None):
    """(what a command printed, why it failed or None)."""
    env = os.environ | (dict(TORCHINDUCTOR_CACHE_DIR=str(cache_dir)) if cache_dir else {})
    # A file, not a pipe: the compiler's helper processes may keep a pipe open after the end.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout:.0f} s"
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    return text, reason(status, text)


def reason(status, text):
    """Why a process failed, from its exit status (or the reason itself) and its output; None if it succeeded."""
    if not status or isinstance(status, str):
        return status or None
    if "out of memory" in text.lower():
        return "does not fit"
    lines = text.strip().splitlines() or [f"exit status {status}, no output"]
    # torchrun's own report comes last; the reason is what train.py printed before it.
    return next((line for line in lines if "Error: " in line), lines[-1])[:300]


def run_train(flags, out_dir, timeout, root=ROOT, memory_gib=0, processes=1, cache_dir=None, skip=3):
    """The figures of train.py of the checkout `root` with these flags, or {"error": why it failed}."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    text, error = run_process([*torchrun, __file__, str(root), str(memory_gib), *flags, "--out-dir", str(out_dir)],
                              timeout, cache_dir)
    if error:
        return dict(error=error)
    device, auto = (re.search(pattern, text, re.MULTILINE) for pattern in
                    (r"^Device: (.*)\.$", r"^--batch-size auto: micro-batches of (\d+) fit"))
    return read_run(out_dir, skip) | dict(device=device and device[1], auto_batch_size=auto and int(auto[1]),
                                          compile_failed="torch.compile does not work here" in text)


def read_run(out_dir, skip=3):
    """The figures in the metrics.jsonl of a finished run.

    Tokens per second are the median of the log lines after the first `skip`. `seconds` are train.py's own, without
    evaluations and saves; `start_seconds` of them is what the first line took beyond that rate, nearly all compiling.
    """
    rows = read_jsonl(Path(out_dir) / "metrics.jsonl")
    lines = [row for row in rows if "train_loss" in row]
    evaluations = [row for row in rows if "val_bpb" in row and row["iter"]]
    first, last, best = lines[0], lines[-1], min(evaluations, key=lambda row: row["val_bpb"])
    rate = statistics.median(line["tokens_per_second"] for line in lines[skip:] or lines[-1:])
    return dict(iterations=last["iter"], tokens=last["tokens"], tokens_per_second=round(rate), seconds=last["seconds"],
                start_seconds=round(max(0.0, first["seconds"] - first["tokens"] / rate), 2), skipped=last["skipped"],
                peak_mib=max(line["peak_memory_mib"] or 0 for line in lines) or None, best_bpb=best["val_bpb"],
                best_iter=best["iter"], final_bpb=evaluations[-1].get("full_val_bpb"),
                curve=[[row[key] for key in ("iter", "tokens", "seconds", "val_bpb")] for row in evaluations])


def run_peer(job, timeout, cache_dir=None):
    """What peers.py measures of another repository's model, or {"error": why it failed}."""
    text, error = run_process([str(Path(__file__).with_name("peers.py")), json.dumps(job)], timeout, cache_dir)
    return dict(error=error) if error else json.loads(re.search("^RESULT (.*)$", text, re.MULTILINE)[1])


def limit_memory(gib):
    """Keep this process to `gib` GiB of the GPU, as if it were that small; 0: all of it."""
    import torch
    if gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


class Clock:
    """Times measurements and passes on the seconds that are left until the deadline; 0: none."""

    def __init__(self, deadline):
        self.end = time.monotonic() + (deadline or math.inf)

    def left(self):
        return self.end - time.monotonic()

    def timed(self, function, *arguments, limit=3600, **options):
        """The function's dict with wall_seconds; {"error": ...} if the deadline is too near to start it."""
        started = time.monotonic()
        if self.left() < 20:
            return dict(error="not started: the deadline is near")
        result = function(*arguments, timeout=min(limit, self.left()), **options)
        return result | dict(wall_seconds=round(time.monotonic() - started, 1))


# -----------------------------------------------------------------------------
# Options, tables, JSON

FOLDER = click.Path(exists=True, file_okay=False)
data_dir_option = click.option("--data-dir", type=FOLDER, required=True, help="a prepared corpus")
nanogpt_option = click.option("--nanogpt", type=FOLDER, help="folder of a nanoGPT checkout")
smolgpt_option = click.option("--smolgpt", type=FOLDER, help="folder of a smolGPT checkout")
memory_option = click.option("--memory-gib", default=6.5, show_default=True,
                             help="GPU memory limit of each process; 0: all of it")
deadline_option = click.option("--deadline", type=float, default=0, help="stop after this many seconds")
json_option = click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures here too")
tiny_option = click.option("--tiny", is_flag=True, help="small enough for a CPU: shows that the script works")
flags_argument = click.argument("flags", nargs=-1, type=click.UNPROCESSED)


def numbers(context, parameter, text):
    """Callback of an option: "4e6,6e6" as [4000000, 6000000]."""
    try:
        return [int(float(word)) for word in text.split(",") if word]
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, such as 4e6,6e6") from None


def print_row(cells, widths):
    """One line of a table: the first column to the left, the others to the right; None is a dash."""
    texts = ["-" if cell is None else str(cell) for cell in cells]
    line = "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(texts, widths)))
    print(line.rstrip(), flush=True)


def count(number):
    """1,234 for 1234.4; None stays None."""
    return None if number is None else f"{number:,.0f}"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path, **contents):
    """After every row, so that an interrupted benchmark loses nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def today():
    """What every JSON file states. The devices are in its rows: asking CUDA here would take memory from the runs."""
    return dict(date=time.strftime("%Y-%m-%d"), torch=importlib.metadata.version("torch"))


if __name__ == "__main__":
    checkout, gib, *arguments = sys.argv[1:]
    sys.path.insert(0, checkout)
    limit_memory(float(gib))
    import train
    train.main(arguments, prog_name="train.py")
