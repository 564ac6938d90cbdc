"""Damage one file, then run the commands that read it: each refuses in one line, or the damage makes no difference.

    python tests/torture/corrupt.py --cases 2000

A case damages a file of a prepared corpus, of an interrupted preparation, of a data set or of a run: truncated, torn,
zeroed, deleted, replaced by another one of ours, by one of another program, or by a pickle that would run code; where
there are checksums, also one bit. Two cases run at a time.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import TINY, Program, prepared, read_checkpoint, report, same, snapshot, write_tales

# -----------------------------------------------------------------------------
# Ways to damage a file: (the scene, its bytes, rng) to its bytes then, None for no file

def truncated(scene, data, rng):
    return data[:rng.choice([0, 1, 64, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def torn(scene, data, rng):
    """The beginning of the file and the end of another version of it."""
    cut = rng.randrange(len(data))
    return data[:cut] + swapped(scene, data, rng)[cut:]


def zeroed(scene, data, rng):
    """A block that never reached the disk."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(len(data[start:start + 512])) + data[start + 512:]


def one_bit(scene, data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:]


def noise(scene, data, rng):
    return rng.randbytes(rng.choice([100, 5000]))


def deleted(scene, data, rng):
    return None


def swapped(scene, data, rng):
    """The same file of another corpus or run: another tokenizer, other weights."""
    path = scene.master / "other" / scene.file
    return path.read_bytes() if path.exists() else b""


def foreign(scene, data, rng):
    """Another file of ours."""
    return rng.choice(sorted(path for path in scene.master.glob("[do]*/*.*") if path.is_file())).read_bytes()


def stranger(scene, data, rng):
    """A checkpoint as other programs save them."""
    import torch
    weights = {"transformer.wte.weight": torch.zeros(8, 4)}
    return saved(scene, rng.choice([weights, [weights], dict(model=weights, model_args=dict(n_layer=2), iter_num=3)]))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.code = f"open({str(path)!r}, 'w').close()"

    def __reduce__(self):
        return eval, (self.code,)


def hostile(scene, data, rng):
    """A pickle that would run code: bare, in torch's zip, and in torch's older format."""
    contents = dict(read_checkpoint(scene.master / "out" / "ckpt.pt"), extra=Payload(scene.folder / "executed"))
    kind = rng.randrange(3)
    return pickle.dumps(contents) if kind == 2 else saved(scene, contents, _use_new_zipfile_serialization=bool(kind))


def saved(scene, contents, **options):
    import torch
    torch.save(contents, scene.folder / "made", **options)
    return (scene.folder / "made").read_bytes()


DAMAGE = [truncated, torn, zeroed, noise, deleted, foreign]
CHECKSUMMED = [*DAMAGE, one_bit, one_bit, swapped]
CHECKPOINT = [*CHECKSUMMED, hostile, hostile, stranger]


# -----------------------------------------------------------------------------
# The commands that read them, as typed in the folder of a case, and what they make, where that can be compared

RUN = " ".join([*TINY, "--eval-interval", "2"])
PREPARE = "preprocess.py prepare-dataset --vocab-size 300 --num-files 6 --dataset"
COMMANDS = {
    "prepare": (f"{PREPARE} FILE --data-dir new", None),
    "prepare again": (f"{PREPARE} source.txt", "data"),
    "resume preparing": (f"{PREPARE} source.txt --data-dir half", "half"),
    "train": (f"train.py {RUN} --max-iters 1 --out-dir new", "new/ckpt.pt"),
    "fine-tune": (f"train.py {RUN} --max-iters 1 --out-dir new --init-from out/best.pt", "new/ckpt.pt"),
    "resume": ("train.py --resume --max-iters 5 --data-dir data", "out/ckpt.pt"),
    "chat": ("chat.py --prompt Tale --max-new-tokens 4 --device cpu", None),
    "export": ("export.py --format pt --output new.pt", "new.pt"),
    "plot": ("plot_loss.py", None),
}
ANY_MODEL = {"chat", "export", "fine-tune"}  # take any whole checkpoint
FAMILIES = [
    (["data/train_000.bin", "data/val_000.bin", "data/tok300.model"], CHECKSUMMED, ["train", "prepare again"]),
    (["out/ckpt.pt"], CHECKPOINT, ["resume"]),
    (["out/best.pt"], CHECKPOINT, ["chat", "export", "fine-tune"]),
    (["out/metrics.jsonl", "out/config.json"], DAMAGE, ["plot", "resume"]),
    (["sets/tales.txt", "sets/tales.jsonl", "sets/tales.json", "sets/tales.csv", "sets/tales.parquet"], DAMAGE,
     ["prepare"]),
    (["data/meta.json"], [*DAMAGE, swapped], ["train", "prepare again"]),
    (["half/partial/arguments.json"], DAMAGE, ["resume preparing"]),
    (["half/partial/train.arrow", "half/partial/tok300.model", "half/partial/train_001.bin"], [deleted],
     ["resume preparing"]),
]


def make_master(folder):
    """A corpus, a run, an interrupted preparation, data sets, and another corpus and run."""
    (folder / "sets").mkdir(parents=True)
    for suffix in (".txt", ".jsonl"):
        write_tales(folder / "sets" / f"tales{suffix}", 300)
    rows = [json.loads(line) for line in (folder / "sets" / "tales.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "sets" / "tales.json").write_text(json.dumps(rows), encoding="utf-8")
    csv = "text\n" + "".join(f'"{row["text"]}"\n' for row in rows)
    (folder / "sets" / "tales.csv").write_text(csv, encoding="utf-8")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "sets" / "tales.parquet")
    write_tales(folder / "source.txt")
    write_tales(folder / "other.txt", 1000, seed=5)
    for command in (f"{PREPARE} source.txt", f"{PREPARE} other.txt --data-dir other/data",
                    f"train.py {RUN} --max-iters 4",
                    f"train.py {RUN} --max-iters 2 --n-embd 32 --data-dir other/data --out-dir other/out"):
        code, output = run_in(folder, command)
        assert code == 0, output
    run_in(folder, f"{PREPARE} source.txt --data-dir half", stopped=True)


def run_in(folder, command, stopped=False):
    """(exit status, output) of a command in `folder`; `stopped`: before a preparation moves its files into place."""
    script, *arguments = command.split()
    return Program(script.removesuffix(".py"), arguments, (enter, folder, stopped)).wait()


def enter(folder, stopped):
    os.chdir(folder)
    if stopped:
        import preprocess
        preprocess.publish = lambda *_: sys.exit(1)


def read(path):
    return read_checkpoint(path) if path.suffix == ".pt" else prepared(path)


# -----------------------------------------------------------------------------
# The cases

class Scene:
    """A copy of the master to damage one file of."""

    def __init__(self, master, folder, file):
        self.master, self.folder, self.file = master, Path(shutil.copytree(master, folder)), file

    def verdict(self, command, expected, is_whole):
        """What a command made of the damage, and its output."""
        before, (text, made) = snapshot(self.folder), COMMANDS[command]
        code, output = run_in(self.folder, text.replace("FILE", self.file))
        after = snapshot(self.folder)
        if (self.folder / "executed").exists():
            return "EXECUTED", output
        if code == 0:
            if made and not same(read(self.folder / made), expected[command]):
                return "another whole model was taken" if is_whole and command in ANY_MODEL else "WRONG RESULT", output
            return "no difference" if made else "taken, nothing to compare", output
        if code != 1 or output.count("Error: ") != 1 or "Traceback" in output:
            return "UNCLEAR", f"exit status {code}. {output}"
        harmed = [name for name in before if before[name] != after.get(name)
                  and not name.startswith(("new", "half/partial"))]
        return f"HARMED {harmed}" if harmed else "refused in one line", output


def play_case(number, seed, master, folder, expected):
    """[(verdict, details)] of one case."""
    rng = random.Random(f"{seed} {number}")
    files, damages, commands = FAMILIES[number % len(FAMILIES)]
    file, damage = rng.choice(files), rng.choice(damages)
    scene = Scene(master, folder, file)
    path, whole = scene.folder / file, (master / file).read_bytes()
    data = damage(scene, whole, rng)
    if data == whole:
        return [("undamaged", "")]
    path.unlink() if data is None else path.write_bytes(data)
    is_whole = path.suffix == ".pt" and any(data == other.read_bytes() for other in master.rglob("*.pt"))
    results = [(command, *scene.verdict(command, expected, is_whole)) for command in commands]
    shutil.rmtree(folder)
    return [(verdict, f"case {number}, {file} {damage.__name__}, {command}: {output[-600:]}")
            for command, verdict, output in results]


def torture(cases, seed=0, scratch=None):
    """(Counter of verdicts, [those that must not be])."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        master = folder / "master"
        make_master(master)
        expected = dict.fromkeys(["prepare again", "resume preparing"], prepared(master / "data"))
        for command in {command for number in range(cases) for command in FAMILIES[number % len(FAMILIES)][2]}:
            text, made = COMMANDS[command]
            if made and command not in expected:
                scene = Scene(master, folder / command, None)
                code, output = run_in(scene.folder, text)
                assert code == 0, output
                expected[command] = read(scene.folder / made)
        jobs = [pool.submit(play_case, number, seed, master, folder / str(number), expected) for number in range(cases)]
        results = [result for job in jobs for result in job.result()]
    return (Counter(verdict for verdict, _ in results),
            [f"{verdict}: {details}" for verdict, details in results if verdict[:2].isupper()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(report(*torture(options.cases, options.seed)))


if __name__ == "__main__":
    main()
