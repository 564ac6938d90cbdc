"""A training that saves as often as it can, and four readers that never stop: no torn read, no failed save.

    python tests/torture/save_storm.py --minutes 5
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from harness import TINY, Clock, preparation, processes, read, run, start, table, write_tales


def read_chat(out):
    import chat
    chat.load_writer(chat.find_checkpoint(out), "cpu", "float32")


def read_whole(out):
    from model import build_model, read_checkpoint
    contents = read_checkpoint(out / "ckpt.pt")
    build_model(contents, out / "ckpt.pt")
    assert contents["progress"]["iter"] and contents["optimizer"] and len(contents["rng"])


def read_plot(out):
    import plot_loss
    plot_loss.summary(plot_loss.read_run(out))


def read_log(out):
    """Every line but the last one, which may be under way, is whole, and iterations ascend."""
    import json
    *lines, _ = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    iters = [json.loads(line)["iter"] for line in lines]
    assert iters == sorted(iters) and iters


READERS = dict(chat=read_chat, checkpoint=read_whole, plot=read_plot, log=read_log)


def keep_reading(name, out, stop, results):
    """Read until told to stop; put (reader, reads, [what failed])."""
    count, failures = 0, []
    while not stop.is_set():
        try:
            READERS[name](out)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
        count += 1
    results.put((name, count, failures))


def storm(seconds, scratch=None):
    """({what: how many}, [what went wrong])."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        data, out, log = folder / "data", folder / "out", folder / "log"
        assert run("preprocess", preparation(write_tales(folder / "tales.txt"), data), log) == 0, read(log)
        flags = [*TINY, "--compile", "off", "--max-iters", 10**7, "--eval-interval", 3, "--save-minutes", 1e-9,
                 "--log-interval", 1, "--data-dir", data, "--out-dir", out]
        training = start("train", flags, log)
        while training.is_alive() and not ((out / "best.pt").exists() and (out / "ckpt.pt").exists()):
            time.sleep(0.05)
        stop, results = processes.Event(), processes.Queue()
        readers = [processes.Process(target=keep_reading, args=(name, out, stop, results)) for name in READERS]
        for reader in readers:
            reader.start()
        training.join(seconds)
        failures = [] if training.is_alive() else [f"training ended: {read(log)[-600:]}"]
        stop.set()
        counts = {}
        for _ in readers:
            name, count, torn = results.get(timeout=120)
            counts[f"reads: {name}"] = count
            failures += [f"{name}: {what}" for what in torn]
        if training.is_alive():
            os.kill(training.pid, signal.SIGTERM)
        training.join(60)
        if training.exitcode != 143 or "Traceback" in read(log):
            failures.append(f"training ended with {training.exitcode}: {read(log)[-600:]}")
        from model import read_checkpoint
        return counts | {"saves": read_checkpoint(out / "ckpt.pt")["progress"]["iter"]}, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    clock = Clock()
    counts, failures = storm(60 * parser.parse_args().minutes)
    for line in failures[:20]:
        print(line, file=sys.stderr)
    sys.exit(table({**counts, "seconds": round(clock()), "!torn reads and failed saves": len(failures)}))


if __name__ == "__main__":
    main()
