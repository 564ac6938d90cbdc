"""What the torture scripts share: real processes, a tiny corpus, a tiny run, and what must be equal."""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
# The server that forks our processes (below) looks here for what it imports first.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--intermediate-size", "32", "--block-size", "32",
        "--tokens-per-iter", "128", "--batch-size", "2", "--log-interval", "3", "--eval-tokens", "300",
        "--final-eval-tokens", "300", "--sample-tokens", "5", "--dropout", "0.2", "--device", "cpu"]
TIMING = {"seconds", "tokens_per_second"}

# Importing torch takes seconds. A server imports it once, and each process of ours is a fresh fork of that server.
if "forkserver" in multiprocessing.get_all_start_methods():
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["harness", "warm"])
else:
    processes = multiprocessing.get_context("spawn")


def call(script, arguments, log, prepare=None):
    """In a new process: what `python SCRIPT ARGUMENTS > LOG 2>&1` does. `log` is a path or one end of a pipe."""
    with open(log, "a", encoding="utf-8") if isinstance(log, str) else log as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))
    sys.stdin = open(os.devnull, encoding="utf-8")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare:
        prepare[0](*prepare[1:])
    sys.argv = [f"{script}.py", *arguments]
    __import__(script).main(list(arguments), prog_name=f"{script}.py")


def start(script, arguments, log, prepare=None):
    """A process that runs one of the scripts; `prepare`: (function, arguments...) to call in it first."""
    arguments = [str(word) for word in arguments]
    if prepare is None:
        process = processes.Process(target=call, args=(script, arguments, str(log)))
        process.start()
        return process
    # What is prepared may forbid writing, so here this process keeps the log.
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=call, args=(script, arguments, theirs, prepare))
    process.start()
    theirs.close()
    threading.Thread(target=keep_log, args=(ours, log), daemon=True).start()
    return process


def keep_log(pipe, log):
    with open(log, "ab", buffering=0) as file:
        while text := os.read(pipe.fileno(), 65536):
            file.write(text)


def run(script, arguments, log, prepare=None):
    """The exit status of a script that runs to its end."""
    process = start(script, arguments, log, prepare)
    process.join(120)
    time.sleep(0.05 if prepare else 0)  # the last words are still in the pipe
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hang"
    return process.exitcode


def read(path):
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""


def tales(count, seed=0):
    """`count` different short texts."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and saw one red ball roll down hills while big dogs ran far away home".split()
    return [f"Tale {i}. " + " ".join(rng.choices(words, k=rng.randint(5, 30))) + ".\n\nEnd." for i in range(count)]


def write_tales(path, count=1200, seed=0):
    """A corpus of tales as a text or jsonl file."""
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(tales(count, seed)), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in tales(count, seed)), encoding="utf-8")
    return path


def preparation(source, data, *flags):
    return ["prepare-dataset", "--dataset", source, "--vocab-size", 300, "--num-files", 6, "--workers", 2,
            "--data-dir", data, *flags]


def snapshot(folder):
    """{name: bytes} of all files below a folder, the lock apart."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name != "lock"}


def prepared(folder):
    """The bytes of what a preparation leaves for training: tokenizer, shards, meta.json."""
    return {name: data for name, data in snapshot(folder).items() if os.sep not in name}


def metrics(out):
    rows = [json.loads(line) for line in read(Path(out) / "metrics.jsonl").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def same(a, b):
    """Equal to the last bit, all the way down, but for timing and the name of the folder."""
    import torch
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        skip = {"seconds", "out_dir", "max_iters"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in skip)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(a, b):
    """The files of two finished runs that differ: both checkpoints with all training state, and the log."""
    from model import read_checkpoint
    wrong = [name for name in ("ckpt.pt", "best.pt") if not same(read_checkpoint(a / name), read_checkpoint(b / name))]
    return wrong + ["metrics.jsonl"] * (metrics(a) != metrics(b)) + leftovers(b)


def leftovers(folder):
    """Temporary files and folders that should be gone."""
    return [path.name for path in Path(folder).rglob("*") if path.name.endswith((".tmp", ".partial"))]


def table(rows):
    """Print {what: figure}, and return the exit status: 0 where every row whose name begins with `!` is 0."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"  {name.lstrip('!'):{width}}  {value if isinstance(value, str) else f'{value:,}':>10}")
    return int(any(value for name, value in rows.items() if name.startswith("!")))


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self.start = time.monotonic()

    def __call__(self):
        return time.monotonic() - self.start
