"""Kill prepare-dataset and train.py at random moments, repeat the command, and compare every file.

    python tests/torture/kill.py --times 200 --others 60

Half of the rounds prepare a corpus, half train. A round kills the process up to six times, half of the times when the
next temporary file appears, which is inside a write. After each kill it gives the same command again, training with
--resume once there is a ckpt.pt. At the end everything must equal an undisturbed run, bit for bit. Further rounds press
Ctrl-C, terminate, or stop the process and let it continue.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import TINY, Program, differences, leftovers, prepared, preparation, report, run, write_tales

# A save after every iteration; an evaluation, with best.pt, after every third.
RUN = [*TINY, "--max-iters", "12", "--eval-interval", "3", "--save-minutes", "1e-9"]


class Preparing:
    """A preparation to disturb."""

    name = "preparation"

    def __init__(self, reference, folder, kind):
        self.source, self.reference, self.folder = reference / f"tales{kind}", reference / f"data{kind}", folder

    def command(self):
        return "preprocess", preparation(self.source, self.folder)

    def wrong(self):
        one, two = prepared(self.reference), prepared(self.folder)
        return [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] + leftovers(self.folder)


class Training:
    """A training to disturb."""

    name = "training"

    def __init__(self, reference, folder, kind):
        self.data, self.reference, self.folder = reference / f"data{kind}", reference / f"out{kind}", folder

    def command(self):
        folders = ["--data-dir", self.data, "--out-dir", self.folder]
        if (self.folder / "ckpt.pt").exists():
            return "train", ["--resume", *folders]
        # Killed between the two files of its first evaluation, a run has a best.pt alone.
        return "train", [*RUN, *folders, *["--overwrite"] * (self.folder / "best.pt").exists()]

    def wrong(self):
        return differences(self.reference, self.folder)


def undisturbed(reference, kinds):
    """Make what all rounds are compared with; {name of the task: its seconds}."""
    seconds = {}
    run("plot_loss", ["--help"])  # the first process of all waits for the imports
    for kind in kinds:
        write_tales(reference / f"tales{kind}")
        for task in (Preparing, Training):
            started = time.monotonic()
            run(*task(reference, reference / f"{'data' if task is Preparing else 'out'}{kind}", kind).command())
            seconds[task.name] = time.monotonic() - started
    return seconds


def disturb(process, how, folder, seconds, rng):
    """Send a signal within `seconds`, or inside the next write; whether one was under way, None if it came too late."""
    def writing():
        # os.walk, since rglob fails where a folder vanishes meanwhile
        return any(name.endswith(".tmp") for _, _, names in os.walk(folder) for name in names)
    moment, inside = time.monotonic() + rng.uniform(0, seconds), rng.random() < 1 / 2
    while process.is_alive() and time.monotonic() < moment:
        time.sleep(0.001)
    while process.is_alive() and inside and not writing():
        pass
    if not process.is_alive():
        return None
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(process.pid, signal.SIGSTOP)  # so that what is seen now is what the signal finds
        hit = writing()
        if how == signal.SIGSTOP:
            time.sleep(rng.uniform(0, 0.3))
        else:
            os.kill(process.pid, how)
        os.kill(process.pid, signal.SIGCONT)
        return hit


def play_round(task, how, times, seconds, rng, count):
    """Run a task to its end through up to `times` signals; what went wrong, or ''."""
    for left in range(times, -1, -1):
        program = Program(*task.command())
        if left:
            hit = disturb(program.process, how, task.folder, seconds, rng)
            count["sent"] += hit is not None
            count["inside a write"] += bool(hit)
        code, output = program.wait()
        if "Traceback" in output:
            return output[-600:]
        if code == 0 or code == 1 and "has finished its 12 iterations" in output:  # killed after the last save
            return ", ".join(task.wrong())
        # Click ends with 1 where Ctrl-C comes while it reads the command line.
        if not left or code not in (-how, 128 + how, 1 if how == signal.SIGINT else -how):
            return f"exit {code}: {output[-600:]}"


def torture(times, others, seed=0, scratch=None, kinds=(".txt", ".jsonl")):
    """(Counter of what happened, [what went wrong])."""
    rng, count, failures = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        reference = Path(folder)
        seconds = undisturbed(reference, kinds)
        for how, number in ((signal.SIGKILL, times), (signal.SIGINT, others // 3), (signal.SIGTERM, others // 3),
                            (signal.SIGSTOP, others // 3)):
            for task_class, left in ((Preparing, number - number // 2), (Training, number // 2)):
                name = f"{how.name}, {task_class.name}"
                while left:
                    task, happened = task_class(reference, reference / "round", rng.choice(kinds)), Counter()
                    most = rng.randint(1, min(6, left))
                    wrong = play_round(task, how, most, 1.1 * seconds[task.name], rng, happened)
                    left -= happened["sent"]
                    count[name] += happened["sent"]
                    count[f"{name}, inside a write"] += happened["inside a write"]
                    if wrong:
                        failures.append(f"{name}: {wrong}")
                    shutil.rmtree(task.folder, ignore_errors=True)
    return count, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="how often to send SIGKILL")
    parser.add_argument("--others", type=int, default=60,
                        help="how often to press Ctrl-C, send SIGTERM, or send SIGSTOP and SIGCONT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(report(*torture(options.times, options.others, options.seed)))


if __name__ == "__main__":
    main()
