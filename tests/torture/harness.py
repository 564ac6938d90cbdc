"""What the torture scripts share: commands in processes of their own, a tiny corpus and run, and what must be equal."""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

STARTED, ROOT = time.monotonic(), Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--intermediate-size", "32", "--block-size", "32",
        "--tokens-per-iter", "128", "--batch-size", "2", "--log-interval", "3", "--eval-tokens", "300",
        "--final-eval-tokens", "300", "--sample-tokens", "5", "--dropout", "0.2", "--device", "cpu", "--compile", "off"]
TIMING = {"seconds", "elapsed", "tokens_per_second"}
PLACES = {"data_dir", "out_dir"}

# Importing torch takes seconds: a server imports everything once, and each process of ours is a fresh fork of it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
processes = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    processes.set_forkserver_preload(["chat", "export", "plot_loss", "preprocess", "train", "datasets",
                                      "pyarrow.parquet", "torch._dynamo"])


def run_script(script, arguments, output, prepare):
    """In a new process: what `python SCRIPT.py ARGUMENTS >OUTPUT 2>&1` does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the scripts have it while they import
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))
    sys.stdin = open(os.devnull, encoding="utf-8")
    if prepare:
        prepare[0](*prepare[1:])
    main = __import__(script).main
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(arguments, prog_name=f"{script}.py")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Program:
    """One of the scripts, run in a process of its own."""

    def __init__(self, script, arguments, prepare=None):
        """`prepare`: (function, arguments...) to call in the process first."""
        pipe, theirs = processes.Pipe(duplex=False)  # not a file: a full disk must not swallow the output
        self.process = processes.Process(target=run_script, args=(script, list(map(str, arguments)), theirs, prepare))
        self.process.start()
        theirs.close()
        self.output = bytearray()
        self.reader = threading.Thread(target=self.read, args=(pipe,), daemon=True)
        self.reader.start()

    def read(self, pipe):
        while data := os.read(pipe.fileno(), 65536):
            self.output += data

    def wait(self, seconds=300):
        """(exit status or "hang", output)."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        self.reader.join()
        return "hang" if code is None else code, self.output.decode("utf-8", "replace")


def another_system(missing):
    """Make the process one whose locale is not UTF-8, without fork, whose temporary folder is missing."""
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="cp1252", closefd=False) for n in (1, 2))
    multiprocessing.set_start_method("spawn", force=True)
    vars(os).pop("fork", None)
    tempfile.tempdir = str(missing)


def run(script, arguments, prepare=None, code=0):
    """The output of a script that has to end with `code`."""
    ended, output = Program(script, arguments, prepare).wait()
    assert ended == code, f"exit {ended}: {output[-1500:]}"
    return output


def write_tales(path, count=1200, seed=0):
    """A corpus of short texts, as a .txt or .jsonl file."""
    rng, words = random.Random(seed), "the cat sat on a mat and saw one red ball roll down hills while dogs ran".split()
    tales = [f"Tale {i}. {' '.join(rng.choices(words, k=rng.randint(5, 30)))}.\n\nEnd." for i in range(count)]
    text = ("\n<|endoftext|>\n".join(tales) if path.suffix == ".txt" else
            "".join(json.dumps(dict(text=tale)) + "\n" for tale in tales))
    path.write_text(text, encoding="utf-8")
    return path


def preparation(source, data, *flags):
    return ["prepare-dataset", "--dataset", source, "--vocab-size", 300, "--num-files", 6, "--workers", 2,
            "--data-dir", data, *flags]


def snapshot(folder):
    """{name: bytes} of all files below a folder, the lock apart."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name != "lock"}


def prepared(folder):
    """{name: bytes} of a corpus, without what belongs to an unfinished one."""
    return {name: data for name, data in snapshot(folder).items() if not name.startswith("partial/")}


def metrics(out):
    """The rows of metrics.jsonl without their timing; a line that is no row as its text."""
    rows = []
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append({name: value for name, value in json.loads(line).items() if name not in TIMING})
        except ValueError:
            rows.append(line)
    return rows


def same(a, b):
    """Equal to the last bit, all the way down, timing and the names of folders apart."""
    import torch
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMING | PLACES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read_checkpoint(path):
    from model import load_checkpoint
    return load_checkpoint(path)[1]


def differences(a, b):
    """What is wrong with run `b`, which should equal `a`: its checkpoints with all training state, and its log."""
    from config import UserError
    wrong = leftovers(b) + ["metrics.jsonl"] * (metrics(a) != metrics(b))
    for name in ("ckpt.pt", "best.pt"):
        try:
            wrong += [name] * (not same(read_checkpoint(a / name), read_checkpoint(b / name)))
        except UserError as error:
            wrong.append(error.message)
    return wrong


def leftovers(folder):
    """Temporary files and folders that should be gone."""
    return [path.name for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == "partial"]


def report(count, failures):
    """Print how often what happened, and every failure; returns the exit status."""
    for failure in failures:
        print(failure, file=sys.stderr)
    for name, number in {**count, "seconds": round(time.monotonic() - STARTED), "failures": len(failures)}.items():
        print(f"{number:10,}  {name}")
    return int(bool(failures))
