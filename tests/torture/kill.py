"""Kill prepare-dataset and train.py at random moments, saves included, repeat the command, and compare every file.

    python tests/torture/kill.py --times 200

Half of the rounds prepare a corpus, half train. A round kills the process once to six times (half of the kills as
soon as a temporary file appears, which is inside a write), and gives the same command again after each, training with
--resume once there is a checkpoint. In the end everything must equal an undisturbed run, bit for bit. Further rounds
press Ctrl-C, terminate, or stop the process and let it continue.
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

from harness import TINY, Clock, differences, leftovers, prepared, preparation, read, run, start, table, write_tales

# A save after every iteration; an evaluation, with best.pt, after every third.
RUN = [*TINY, "--max-iters", "12", "--eval-interval", "3", "--save-minutes", "1e-9", "--compile", "off"]
GENTLE = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Preparing:
    """One preparation that is disturbed."""

    name = "preparation"

    def __init__(self, reference, folder, kind):
        self.reference, self.folder, self.kind = reference, folder / "data", kind

    def command(self):
        return "preprocess", preparation(self.reference / f"tales{self.kind}", self.folder)

    def writes(self):
        return [*self.folder.rglob("*.tmp")] if self.folder.exists() else []

    def wrong(self):
        one, two = prepared(self.reference / f"data{self.kind}"), prepared(self.folder)
        return [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] + leftovers(self.folder)


class Training:
    """One training that is disturbed."""

    name = "training"

    def __init__(self, reference, folder, kind):
        self.reference, self.folder, self.data = reference, folder / "out", reference / "data.txt"

    def command(self):
        where = ["--data-dir", self.data, "--out-dir", self.folder]
        if (self.folder / "ckpt.pt").exists():
            return "train", ["--resume", *where]
        return "train", [*RUN, *where, *["--overwrite"] * (self.folder / "best.pt").exists()]

    def writes(self):
        return [*self.folder.glob("*.tmp")] if self.folder.exists() else []

    def wrong(self):
        return differences(self.reference / "out", self.folder)


def undisturbed(folder):
    """Make what all rounds are compared with; seconds that a preparation and a training take."""
    seconds = {}
    for kind in (".txt", ".jsonl"):
        clock = Clock()
        log = folder / "log"
        command = preparation(write_tales(folder / f"tales{kind}"), folder / f"data{kind}")
        assert run("preprocess", command, log) == 0, read(log)
        seconds["preparation"] = clock()
    clock = Clock()
    assert run("train", [*RUN, "--data-dir", folder / "data.txt", "--out-dir", folder / "out"], log) == 0, read(log)
    seconds["training"] = clock()
    return seconds


def disturb(process, how, task, seconds, rng):
    """Send the signal at a random moment, or inside a write; True where a write was under way."""
    deadline, inside = time.monotonic() + rng.uniform(0, seconds), rng.random() < 1 / 2
    while time.monotonic() < deadline and process.is_alive() and not (inside and task.writes()):
        time.sleep(0 if inside else 0.001)
    if not process.is_alive():
        return None
    try:
        os.kill(process.pid, signal.SIGSTOP)  # so that what is seen now is what the signal finds
        hit = bool(task.writes())
        if how == signal.SIGSTOP:
            time.sleep(rng.uniform(0, 0.3))
        else:
            os.kill(process.pid, how)
    except ProcessLookupError:  # it ended a moment before
        return None
    with contextlib.suppress(ProcessLookupError):  # dead of SIGKILL
        os.kill(process.pid, signal.SIGCONT)
    return hit


def round_of(task, how, most, seconds, count, rng, log):
    """Run one task to its end through 1 to 6 disturbances, `most` at most. `count` is a Counter of what happened."""
    for left in range(min(most, rng.randint(1, 6)), -1, -1):
        process = start(*task.command(), log)
        if left:
            hit = disturb(process, how, task, seconds * 1.1, rng)
            count["disturbed"] += hit is not None
            count["inside a write"] += bool(hit)
        process.join(120)
        if process.exitcode is None:
            process.kill()
            return "hang"
        if process.exitcode == 0:
            break
        if left and process.exitcode in (-how, GENTLE.get(how), 1 if how == signal.SIGINT else None):
            continue
        return f"exit {process.exitcode}: {read(log)[-600:]}"
    if process.exitcode:
        return f"exit {process.exitcode}: {read(log)[-600:]}"
    if "Traceback" in read(log):
        return f"traceback: {read(log)[-600:]}"
    return ", ".join(task.wrong())


def torture(times, others, seed=0, scratch=None, verbose=False):
    """(Counter of what happened, [what went wrong])."""
    rng, count, failures = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        reference = Path(folder)
        seconds = undisturbed(reference)
        wanted = {signal.SIGKILL: times} | dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGSTOP), others // 3)
        number = 0
        while left := {how: n for how, n in wanted.items() if n > 0}:
            how, number = next(iter(left)), number + 1
            place = reference / "round"
            place.mkdir()
            task = (Preparing, Training)[number % 2](reference, place, rng.choice([".txt", ".jsonl"]))
            happened = Counter()
            wrong = round_of(task, how, wanted[how], seconds[task.name], happened, rng, place / "log")
            wanted[how] -= happened["disturbed"]
            name = signal.Signals(how).name
            count[f"{name}, {task.name}"] += happened["disturbed"]
            count[f"{name}, of these inside a write"] += happened["inside a write"]
            count["rounds"] += 1
            if verbose:
                print(f"\r{dict(count)}", end="", file=sys.stderr)
            if wrong:
                failures.append(f"round {number}, {signal.Signals(how).name}, {task.name}: {wrong}")
                print(failures[-1], file=sys.stderr)
            shutil.rmtree(place)
    return count, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="how often to send SIGKILL")
    parser.add_argument("--others", type=int, default=60,
                        help="how often to send Ctrl-C, SIGTERM, SIGSTOP with SIGCONT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    clock = Clock()
    count, failures = torture(options.times, options.others, options.seed, verbose=True)
    print(file=sys.stderr)
    sys.exit(table({**count, "seconds": round(clock()), "!rounds that ended otherwise than an undisturbed run":
                    len(failures)}))


if __name__ == "__main__":
    main()
