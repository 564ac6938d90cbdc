"""A disk that is full at every write, and a folder that cannot be written: what was there stays, and a line says why.

    python tests/torture/full_disk.py [--steps 20]

A limit on the size of files (RLIMIT_FSIZE) cuts each file at many lengths; where a small tmpfs can be mounted, real
full disks of many sizes and a read-only one follow.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from harness import TINY, Clock, differences, metrics, preparation, prepared, read, run, snapshot, table, write_tales

RUN = [*TINY, "--compile", "off", "--eval-interval", "2", "--save-minutes", "1e-9", "--max-iters"]


def limit_files(size):
    """No file of this process may grow past `size` bytes; such a write then fails as on a full disk."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Scene:
    """A finished corpus and run to harm, and what they must become."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.source, self.other = write_tales(folder / "tales.txt"), write_tales(folder / "other.txt", 1000, seed=1)
        self.must("preprocess", preparation(self.source, folder / "data"))
        self.must("preprocess", preparation(self.other, folder / "data_after"))
        where = ["--data-dir", folder / "data"]
        self.must("train", [*RUN, 4, *where, "--out-dir", folder / "out"])
        self.must("train", [*RUN, 4, *where, "--out-dir", folder / "out_after"])
        self.must("train", ["--resume", "--max-iters", 8, *where, "--out-dir", folder / "out_after"])

    def must(self, script, arguments):
        assert run(script, arguments, self.log) == 0, read(self.log)[-800:]

    def attempt(self, script, arguments, prepare=None):
        """(exit status, problem or ''): a failure must end in one clear line and no traceback."""
        log = self.folder / "attempt"
        log.unlink(missing_ok=True)
        code = run(script, arguments, log, prepare)
        text = read(log)
        errors = [line for line in text.splitlines() if line.startswith("Error: ")]
        if code == 0:
            return code, ""
        return code, "" if code == 1 and len(errors) == 1 and "Traceback" not in text else f"exit {code}: {text[-500:]}"

    def preparation(self, place, prepare=None, room=lambda: None):
        """Replace a corpus while the disk is full, then again with room: 'ended well' or 'refused', and problems."""
        data = shutil.copytree(self.folder / "data", place / "data")
        before, command = prepared(data), preparation(self.other, data, "--overwrite")
        code, problem = self.attempt("preprocess", command, prepare)
        if code and prepared(data) != before:
            problem += " the old corpus changed"
        room()
        again, trouble = self.attempt("preprocess", command)
        # meta.json names the source, and both went to the same place, so all files must be equal.
        if again or trouble or prepared(data) != prepared(self.folder / "data_after"):
            problem += f" afterwards: {trouble or 'other files'}"
        return "refused" if code else "ended well", problem

    def training(self, place, prepare=None, room=lambda: None):
        """The same for a run that is gone on with."""
        out = shutil.copytree(self.folder / "out", place / "out")
        before = snapshot(out)
        command = ["--resume", "--max-iters", 8, "--data-dir", self.folder / "data", "--out-dir", out]
        code, problem = self.attempt("train", command, prepare)
        if code:
            from config import UserError
            from model import build_model, read_checkpoint
            for name in ("ckpt.pt", "best.pt"):
                try:
                    build_model(read_checkpoint(out / name), name)
                except UserError as error:
                    problem += f" {error.message}"
            rows = metrics_that_are_whole(out)
            if rows[:3] != metrics(self.folder / "out")[:3]:
                problem += " the log lost lines"
            if (out / "config.json").read_bytes()[:1] != before["config.json"][:1]:
                problem += " config.json is broken"
        room()
        again, trouble = self.attempt("train", command)
        finished = "finished its 8 iterations" in read(self.folder / "attempt")  # the log's last line alone was lost
        wrong = [] if again else differences(self.folder / "out_after", out)
        if (again and not finished) or trouble or wrong:
            problem += f" afterwards: {trouble or wrong or read(self.folder / 'attempt')[-300:]}"
        return "refused" if code else "ended well", problem


def metrics_that_are_whole(out):
    import json
    rows = []
    for line in read(out / "metrics.jsonl").split("\n"):
        try:
            rows.append({k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")})
        except ValueError:
            pass
    return rows


def torture(steps, mounts=True, scratch=None):
    count, failures = Counter(), []

    def note(what, outcome):
        happened, problem = outcome
        count[f"{what}: {happened}"] += 1
        if problem:
            failures.append(f"{what}: {problem}")
            print(failures[-1], file=sys.stderr)

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        scene, place = Scene(folder), folder / "place"
        for step in range(steps):
            for what, method, files in (("corpus, file size limit", scene.preparation, folder / "data_after"),
                                        ("run, file size limit", scene.training, folder / "out_after")):
                largest = max(path.stat().st_size for path in files.iterdir())
                place.mkdir()
                note(what, method(place, (limit_files, 16 + int(largest * 1.05 * (step / steps) ** 2))))
                shutil.rmtree(place)
        if mounts and can_mount(folder):
            for step in range(steps):
                for what, method, files in (("corpus, full tmpfs", scene.preparation, folder / "data"),
                                            ("run, full tmpfs", scene.training, folder / "out")):
                    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files.rglob("*"))
                    size = used + 8192 + int(5 * used * (step / steps) ** 2)
                    with Disk(place, size) as disk:
                        note(what, method(place, room=disk.grow))
            for what, method in (("corpus, read-only disk", scene.preparation),
                                 ("run, read-only disk", scene.training)):
                with Disk(place, 2**26) as disk:
                    note(what, method(place, (disk.read_only,), disk.grow))
        else:
            count["tmpfs cannot be mounted here"] += 1
    return count, failures


class Disk:
    """A small tmpfs."""

    def __init__(self, place, size):
        self.place, self.size = place, size

    def mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)]
        subprocess.run(command, check=True, capture_output=True)

    def __enter__(self):
        self.place.mkdir()
        self.mount(f"size={self.size}")
        return self

    def grow(self):
        self.mount("remount,rw,size=64m")

    def read_only(self):
        self.mount("remount,ro")

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.place)], check=True, capture_output=True)
        self.place.rmdir()


def can_mount(folder):
    try:
        with Disk(folder / "probe", 65536):
            return True
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(folder / "probe", ignore_errors=True)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="different amounts of room")
    clock = Clock()
    count, failures = torture(parser.parse_args().steps)
    sys.exit(table({**count, "seconds": round(clock()), "!harmed, unclear or not repaired": len(failures)}))


if __name__ == "__main__":
    main()
