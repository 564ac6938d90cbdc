"""A training that saves as often as it can, readers that never stop, and a second training that never gets in.

    python tests/torture/save_storm.py --minutes 5
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from harness import TINY, Program, metrics, preparation, processes, read_checkpoint, report, run, write_tales


def invoke(script, *arguments):
    """(exit status, output) of a command in this process."""
    from click.testing import CliRunner
    result = CliRunner().invoke(__import__(script).main, [str(word) for word in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


def chat(out):
    code, output = invoke("chat", "--prompt", "Tale", "--max-new-tokens", 2, "--device", "cpu", "--out-dir", out)
    assert code == 0, output


def plot(out):
    code, output = invoke("plot_loss", out)
    assert code == 0, output


def checkpoint(out):
    checkpoint = read_checkpoint(out / "ckpt.pt")
    assert checkpoint["state"]["iter"] and checkpoint["optimizer"]["state"] and len(checkpoint["rng"])


def log(out):
    """Every line but the last one, which may be under way, is whole, and iterations ascend."""
    iters = [row["iter"] for row in metrics(out)[:-1]]
    assert iters and iters == sorted(iters)


def second_training(out):
    code, output = invoke("train", "--resume", "--max-iters", 1, "--out-dir", out)
    assert code == 1 and "is in use by another process" in output, output


VISITORS = [chat, plot, checkpoint, log, second_training]


def keep_coming(visitor, out, stop, results):
    """Visit until told to stop; put (name, visits, what failed)."""
    count, failures = 0, []
    while count == 0 or not stop.wait(0.01):
        try:
            visitor(out)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
        count += 1
    results.put((visitor.__name__, count, failures))


def torture(seconds, scratch=None):
    """({what: how often}, [what went wrong])."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        data, out = folder / "data", folder / "out"
        run("preprocess", preparation(write_tales(folder / "tales.txt"), data))
        training = Program("train", [*TINY, "--max-iters", 10**7, "--eval-interval", 3, "--save-minutes", 1e-9,
                                     "--log-interval", 1, "--data-dir", data, "--out-dir", out])
        while training.process.is_alive() and not (out / "best.pt").exists():
            time.sleep(0.01)
        stop, results = processes.Event(), processes.Queue()
        visitors = [processes.Process(target=keep_coming, args=(visitor, out, stop, results)) for visitor in VISITORS]
        for visitor in visitors:
            visitor.start()
        training.process.join(seconds)
        stop.set()
        count, failures = {}, []
        for _ in visitors:
            name, visits, wrong = results.get(timeout=300)
            count[name.replace("_", " ")] = visits
            failures += [f"{name}: {what}" for what in wrong]
        if training.process.is_alive():
            os.kill(training.process.pid, signal.SIGTERM)
        code, output = training.wait()
        if code != 143 or "Traceback" in output:
            failures.append(f"training ended with {code}: {output[-600:]}")
        return count | {"saves": read_checkpoint(out / "ckpt.pt")["state"]["iter"]}, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    sys.exit(report(*torture(60 * parser.parse_args().minutes)))


if __name__ == "__main__":
    main()
