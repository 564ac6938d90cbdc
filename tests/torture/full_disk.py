"""A full disk at every write, and a read-only one: what was there stays, one line says why, with room all ends well.

    python tests/torture/full_disk.py --steps 20

A limit on the size of files (RLIMIT_FSIZE) cuts them at many lengths. Where a small tmpfs can be mounted, full disks of
many sizes and a read-only one follow.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from harness import (TINY, Program, differences, leftovers, metrics, preparation, prepared, read_checkpoint, report,
                     run, write_tales)

from config import UserError

RUN = [*TINY, "--eval-interval", 2, "--save-minutes", 1e-9, "--max-iters", 4]


def limit_files(size):
    """No file of this process may grow past `size` bytes; such a write then fails as on a full disk."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def attempt(script, arguments, prepare=None):
    """(whether it succeeded, what was wrong with the way it failed or ''): it must end in one line."""
    code, output = Program(script, arguments, prepare).wait()
    clear = code == 0 or code == 1 and output.count("Error: ") == 1 and "Traceback" not in output
    return code == 0, "" if clear else f" exit {code}: {output[-600:]}"


class Corpus:
    """A corpus that is replaced by another one."""

    def __init__(self, folder):
        self.before, self.after, self.source = folder / "data", folder / "data_after", folder / "other.txt"
        run("preprocess", preparation(write_tales(folder / "tales.txt"), self.before))
        run("preprocess", preparation(write_tales(self.source, 1000, seed=1), self.after))

    def command(self, data):
        return "preprocess", preparation(self.source, data, "--overwrite")

    def harm(self, data):
        """What a failure has done."""
        return " the old corpus changed" if prepared(data) != prepared(self.before) else ""

    def missing(self, data):
        """How the outcome differs from that of an empty disk."""
        return leftovers(data) + ["other files"] * (prepared(data) != prepared(self.after))


class Run:
    """A run that is resumed."""

    def __init__(self, folder):
        self.data, self.before, self.after = folder / "data", folder / "out", folder / "out_after"
        run("train", [*RUN, "--data-dir", self.data, "--out-dir", self.before])
        shutil.copytree(self.before, self.after)
        run(*self.command(self.after))

    def command(self, out):
        return "train", ["--resume", "--max-iters", 8, "--data-dir", self.data, "--out-dir", out]

    def harm(self, out):
        try:
            read_checkpoint(out / "ckpt.pt"), read_checkpoint(out / "best.pt")
        except UserError as error:
            return f" {error.message}"
        old = metrics(self.before)
        return " the log lost lines" if metrics(out)[:len(old)] != old else ""

    def missing(self, out):
        return differences(self.after, out)


def trial(task, place, prepare, make_room=None):
    """Run the command without room and then with it: ("succeeded" or "refused", what went wrong or '').

    `prepare` takes the room from the first process; `make_room`: options of mount that give it back.
    """
    folder = shutil.copytree(task.before, place / "folder")
    succeeded, problem = attempt(*task.command(folder), prepare)
    if not succeeded:
        problem += task.harm(folder)
    if make_room:
        mount(place, make_room)
    if not succeeded:
        recovered, trouble = attempt(*task.command(folder))
        problem += trouble if trouble or recovered else " it failed with room, too"
    if wrong := task.missing(folder):
        problem += f" afterwards: {', '.join(wrong)}"
    return "succeeded" if succeeded else "refused", problem


def torture(steps, mounts=True, scratch=None):
    """(Counter of what happened, [what went wrong])."""
    count, failures = Counter(), []

    def note(what, outcome):
        happened, problem = outcome
        count[f"{what}: {happened}"] += 1
        if problem:
            failures.append(f"{what}:{problem}")

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        place, tasks = folder / "place", {"corpus": Corpus(folder), "run": Run(folder)}
        mounts = mounts and can_mount(folder / "probe")
        for name, task in tasks.items():
            sizes = [path.stat().st_size for path in task.after.iterdir()]
            for step in range(steps):
                part = (step / steps) ** 2
                place.mkdir()
                note(f"{name}, limited files", trial(task, place, (limit_files, 16 + int(1.05 * part * max(sizes)))))
                shutil.rmtree(place)
                if mounts:
                    used = sum(-(-size // 4096) * 4096 for size in sizes)
                    with tmpfs(place, used + 8192 + int(5 * part * used)):
                        note(f"{name}, full tmpfs", trial(task, place, None, "remount,size=64m"))
            if mounts:
                with tmpfs(place, 2**26):
                    note(f"{name}, read-only", trial(task, place, (mount, place, "remount,ro"), "remount,rw"))
    return count, failures


def mount(place, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)


@contextlib.contextmanager
def tmpfs(place, size):
    place.mkdir()
    try:
        mount(place, f"size={size}")
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)
        shutil.rmtree(place)


def can_mount(place):
    try:
        with tmpfs(place, 65536):
            return True
    except (OSError, subprocess.CalledProcessError):
        print("A tmpfs cannot be mounted here: only files are limited.", file=sys.stderr)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="different amounts of room")
    sys.exit(report(*torture(parser.parse_args().steps)))


if __name__ == "__main__":
    main()
