"""Feed every command files that are damaged, foreign or hostile: it says so in a line, or they make no difference.

    python tests/torture/corrupt.py --cases 2000

Each case spoils one file of a prepared corpus, a run, a half-finished preparation or a data set: cut, flipped, swapped,
emptied, made a directory, replaced by a pickle that would run code, by another shape or format, by wrong types. The
real commands run in the same process through click's CliRunner, in two workers, with an alarm after 30 s. Some chosen
cases run as a program of their own, for what only that shows: imports and exit statuses.
"""

import argparse
import io
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from harness import ROOT, TINY, Clock, prepared, preparation, processes, read, run, same, snapshot, table, write_tales

RUN = [*TINY, "--compile", "off", "--eval-interval", "2", "--final-eval-tokens", "300"]
SECONDS = 30


class Hang(BaseException):
    pass


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return eval, (f"open({self.marker!r}, 'w').close()",)


# What can happen to the bytes of any file. Each takes (path, rng, scene) and spoils the file.

def cut(path, rng, scene):
    size = path.stat().st_size
    classes = [0, 1, 2, 3, 7, 64, size // 100, size // 4, size // 2, size - 1000, size - 100, size - 2, size - 1,
               rng.randrange(size + 1)]
    length = min(max(0, rng.choice(classes)), size)
    path.write_bytes(path.read_bytes()[:length])


def flip_bit(path, rng, scene):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_byte(path, rng, scene):
    data = bytearray(path.read_bytes())
    anywhere, begin, end = (rng.randrange(min(most, len(data))) for most in (len(data), 200, 400))
    data[rng.choice([anywhere, begin, -1 - end])] = rng.randrange(256)
    path.write_bytes(data)


def zero_block(path, rng, scene):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at:at + 512] = bytes(len(data[at:at + 512]))
    path.write_bytes(data)


def empty(path, rng, scene):
    path.write_bytes(b"")


def halve(path, rng, scene):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def append(path, rng, scene):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 2, 100])))


def directory(path, rng, scene):
    path.unlink()
    path.mkdir()


def noise(path, rng, scene):
    path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000])))


def gone(path, rng, scene):
    path.unlink()


def hostile(path, rng, scene, kind=None):
    """A pickle that would run code: bare, in torch's zip, and in torch's older format."""
    import torch
    payload, kind = Payload(scene.marker), rng.randrange(3) if kind is None else kind
    if kind == 0:
        path.write_bytes(pickle.dumps(payload))
    else:
        contents = dict(format=1, model_config={}, model={}, tokenizer=torch.zeros(1), extra=payload)
        torch.save(contents, path, _use_new_zipfile_serialization=kind == 1)


def foreign(path, rng, scene):
    """Some other file of ours in its place."""
    others = [other for other in scene.pool if other.read_bytes() != path.read_bytes()]
    shutil.copy(rng.choice(others), path)


ANY_FILE = [cut, cut, flip_bit, flip_bit, flip_byte, zero_block, append, directory, noise, gone, hostile, foreign]
STRANGE = [None, True, -1, 0, 1.5, "", "text", [], {}, [1], {"a": 1}, 10**30, float("inf"), float("nan"), "../../x",
           "\udcff\u0000", [[[]]], 2**63]


def leaves(value, at=()):
    """The places in a nested value."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))


def replaced(value, rng):
    """Put something strange at a random place of a nested value, or take that place away; where, and whether so."""
    at = rng.choice(list(leaves(value)))
    place = value
    taken = rng.random() < 0.15
    for key in at[:-1]:
        place = place[key]
    before = place[at[-1]]
    strange = [item for item in STRANGE if type(item) is not type(before) and item != before]  # True is 1.0
    if taken:
        del place[at[-1]]
    else:
        place[at[-1]] = rng.choice(strange)
    return at, taken


def strange_json(path, rng, scene):
    """Another type somewhere in a JSON file; a digest that the file carries is made to fit a new value."""
    lines = path.suffix == ".jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if lines else None
    value = rows or json.loads(path.read_text(encoding="utf-8"))
    at, taken = replaced(value, rng)
    if isinstance(value, dict) and "sha256" in value and not taken and at != ("sha256",):
        import preprocess
        value["sha256"] = preprocess.digest(value)
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")


BROKEN = ["", "[", "[]", "{}", "null", "1", '"x"', "[" * 100_000, '{"a": ' * 50_000, "NaN", "1e999", '{"format": 1}',
          "\ufeff{}", "9" * 5000]


def broken_json(path, rng, scene, text=None):
    path.write_text(text or rng.choice(BROKEN), encoding="utf-8")


def strange_checkpoint(path, rng, scene):
    """Another type, or nothing, somewhere in a checkpoint; its settings excepted where the place is only taken away."""
    import torch
    contents = torch.load(path, weights_only=True)
    place = contents
    keys = [key for key in contents if key not in scene.unread]
    key = rng.choice(keys)
    if isinstance(contents[key], dict | list) and contents[key] and rng.random() < 0.85:
        at = rng.choice(list(leaves(contents[key])))
        for step in (key, *at[:-1]):
            place = place[step]
        key = at[-1]
    kind = rng.randrange(4)
    before, settings = place[key], any(place is contents.get(name) for name in ("train_config", "model_config"))
    if isinstance(before, torch.Tensor) and kind < 2:
        place[key] = rng.choice([before.double(), before.flatten()[:-1], torch.full_like(before, float("nan")) if (
            before.is_floating_point()) else before.float() * float("nan"),
                                 before[None], torch.zeros(0), torch.zeros(3, dtype=torch.int64), before.bfloat16(),
                                 before.to_sparse(), before.to("meta"), before.cfloat()])
    elif kind == 2 and not isinstance(place, list) and not settings:
        del place[key]
    else:
        place[key] = rng.choice([item for item in STRANGE if type(item) is not type(before)])
        scene.forged = settings  # 0 is a dropout as 0.2 is
    torch.save(contents, path)


def other_checkpoint(path, rng, scene, kind=None):
    """Another format, a shape that does not fit, or settings that ask for 10^12 parameters."""
    import torch
    contents = torch.load(path, weights_only=True)
    config, weights = contents["model_config"], contents["model"]
    kind = rng.randrange(6) if kind is None else kind
    if kind == 0:
        contents["format"] = rng.choice([0, 2, 99, -1])
    elif kind == 1:
        config |= dict(n_layer=256, n_embd=16384, n_head=64, intermediate_size=65536)
    elif kind == 2:
        config |= rng.choice([dict(n_layer=2), dict(n_embd=32), dict(vocab_size=301), dict(block_size=64),
                              dict(position="rotary"), dict(qk_norm=True), dict(bias=True), dict(intermediate_size=64)])
    elif kind == 3:
        name = rng.choice(list(weights))
        weights[name] = torch.full_like(weights[name], float(rng.choice(["nan", "inf"])))
    elif kind == 4:
        del weights[rng.choice(list(weights))]
    else:
        weights["extra.weight"] = torch.zeros(3)
    torch.save(contents, path)


def wrong_pickle(path, rng, scene):
    """A checkpoint whose zip is whole and whose pickle is not: spoiled, or one that would run code."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    data = bytearray(entries[name])
    if rng.random() < 0.3:
        data = pickle.dumps(Payload(scene.marker), protocol=2)
    else:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    entries[name] = bytes(data)
    scene.forged = True
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    path.write_bytes(out.getvalue())


def swapped_corpora(path, rng, scene):
    """The same file of another corpus."""
    shutil.copy(scene.other / path.name if (scene.other / path.name).exists() else scene.other / "meta.json", path)


class Scene:
    """What the cases spoil, in a folder of one worker: a corpus, a run, a half-made preparation, data sets."""

    def __init__(self, master, place, invoke):
        """`invoke` is in_this_process or in_its_own."""
        self.master, self.place, self.other, self.invoke = master, place, master / "other", invoke
        self.marker = place / "executed"
        self.pool = [path for path in master.rglob("*") if path.is_file() and path.stat().st_size]
        # Written for people: nothing reads them again, so what they say makes no difference.
        self.unread = {"preset"}

    def fresh(self):
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.master, self.place)

    def spoil(self, name, mutation, rng):
        """Begin anew and spoil one file; False where that changed nothing."""
        self.fresh()
        self.forged = False  # checksums made to fit, and every form kept: only a signature could tell
        self.spoiled = self.place / name
        mutation(self.spoiled, rng, self)
        return not self.spoiled.is_file() or self.spoiled.read_bytes() != (self.master / name).read_bytes()


def make_master(folder):
    """Two corpora, a finished run of each, a preparation stopped before its last step, and data sets."""
    log = folder.parent / "log"

    def must(script, arguments, prepare=None, code=0):
        assert run(script, arguments, log, prepare) == code, read(log)[-1500:]

    folder.mkdir()
    sets = folder / "sets"
    sets.mkdir()
    for suffix in (".txt", ".jsonl"):
        write_tales(sets / f"tales{suffix}", 300)
    rows = [json.loads(line) for line in (sets / "tales.jsonl").read_text(encoding="utf-8").splitlines()]
    (sets / "tales.json").write_text(json.dumps(rows), encoding="utf-8")
    (sets / "tales.csv").write_text("text\n" + "".join('"' + row["text"] + '"\n' for row in rows), encoding="utf-8")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sets / "tales.parquet")
    write_tales(folder / "source.txt", 1200)
    must("preprocess", preparation(folder / "source.txt", folder / "data"))
    must("preprocess", preparation(write_tales(folder / "other.txt", 1000, seed=5), folder / "other"))
    must("preprocess", preparation(folder / "source.txt", folder / "half"), (stop_before_the_end,), code=1)
    must("train", [*RUN, "--max-iters", 4, "--data-dir", folder / "data", "--out-dir", folder / "out"])
    must("train", [*RUN, "--max-iters", 2, "--n-embd", 32, "--data-dir", folder / "other",
                   "--out-dir", folder / "out2"])


def stop_before_the_end():
    import preprocess

    def stop(*_):
        raise preprocess.UserError("stopped here")

    preprocess.finish = stop


def in_this_process(script, arguments):
    """(exit status, output, stdout); raises what the command did not handle."""
    from click.testing import CliRunner
    result = CliRunner().invoke(__import__(script).main, [str(word) for word in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output, result.stdout


def in_its_own(script, arguments):
    """The same of `python SCRIPT ARGUMENTS`."""
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)], capture_output=True,
                          encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL)
    if "Traceback" in done.stderr or done.returncode not in (0, 1):
        raise RuntimeError(f"exit {done.returncode}: {done.stderr}")
    return done.returncode, done.stdout + done.stderr, done.stdout


# The commands that read what was spoiled: (exit status, output, what came of it, None where nothing can be compared).

def check_training(scene):
    return saved_by(scene, "new", *RUN, "--max-iters", 1)


def check_beginning_from(scene):
    return saved_by(scene, "new", *RUN, "--max-iters", 1, "--init-from", scene.place / "out" / "best.pt")


def check_resume(scene):
    return saved_by(scene, "out", "--resume", "--max-iters", 5)


def saved_by(scene, out, *arguments):
    code, output, _ = scene.invoke("train", [*arguments, "--data-dir", scene.place / "data", "--out-dir",
                                             scene.place / out])
    return code, output, code == 0 and read_checkpoint(scene.place / out / "ckpt.pt")


def check_preparing_again(scene):
    return prepared_by(scene, "data", preparation(scene.master / "source.txt", scene.place / "data"))


def check_going_on(scene):
    return prepared_by(scene, "half", preparation(scene.master / "source.txt", scene.place / "half"))


def prepared_by(scene, data, arguments):
    code, output, _ = scene.invoke("preprocess", arguments)
    return code, output, code == 0 and prepared(scene.place / data)


def check_chat(scene):
    code, output, text = scene.invoke("chat", ["--prompt", "Tale", "--seed", 1, "--max-new-tokens", 4, "--device",
                                               "cpu", "--out-dir", scene.place / "out"])
    return code, output, code == 0 and text


def check_export(scene):
    output = scene.place / "new.pt"
    code, text, _ = scene.invoke("export", ["--format", "pt", "--out-dir", scene.place / "out", "--output", output])
    return code, text, code == 0 and read_checkpoint(output)


def check_plot(scene):
    code, output, _ = scene.invoke("plot_loss", [scene.place / "out"])
    return code, output, None  # numbers in a log cannot be checked against anything


def check_data_set(scene):
    return prepared_anew(scene, ["--dataset", scene.spoiled, "--vocab-size", 300])  # another letter, another text


def check_given_tokenizer(scene):
    return prepared_anew(scene, ["--dataset", scene.master / "source.txt", "--tokenizer", scene.spoiled])


def prepared_anew(scene, arguments):
    new = scene.place / "new"
    code, output, _ = scene.invoke("preprocess", ["prepare-dataset", "--workers", 1, "--data-dir", new, *arguments])
    if code == 0:
        import preprocess
        assert len(preprocess.open_corpus(new).train)
    return code, output, None


def read_checkpoint(path):
    import model
    return model.read_checkpoint(path)


COMPARED = {check_training, check_preparing_again, check_going_on, check_chat, check_export, check_beginning_from,
            check_resume}
ANY_MODEL = {check_chat, check_export, check_beginning_from}  # they take what is a checkpoint, whoever made it

# The families of random cases: weight, files, mutations beside ANY_FILE, and the commands.
FAMILIES = [
    (5, ["data/train_000.bin", "data/val_000.bin", "data/tok300.model", "data/meta.json"], [swapped_corpora],
     [check_training, check_preparing_again]),
    (4, ["data/meta.json"], [strange_json, strange_json, strange_json, broken_json],
     [check_training, check_preparing_again]),
    (4, ["out/ckpt.pt"], [strange_checkpoint, strange_checkpoint, other_checkpoint, wrong_pickle], [check_resume]),
    (4, ["out/best.pt"], [strange_checkpoint, other_checkpoint, wrong_pickle],
     [check_chat, check_export, check_beginning_from]),
    (2, ["out/metrics.jsonl"], [strange_json, strange_json, broken_json], [check_plot, check_resume]),
    (2, ["out/config.json"], [strange_json, strange_json, broken_json], [check_plot, check_resume]),
    (3, ["half/tokens.partial/plan.json", "half/text/text.json", "half/tokens.partial/tok300.model",
         "half/text/train_000.parquet", "half/tokens.partial/train_001.bin"], [], [check_going_on]),
    (2, ["half/tokens.partial/plan.json", "half/text/text.json"], [strange_json, broken_json], [check_going_on]),
    (4, ["sets/tales.txt", "sets/tales.jsonl", "sets/tales.json", "sets/tales.csv", "sets/tales.parquet"], [],
     [check_data_set]),
    (1, ["data/tok300.model"], [], [check_given_tokenizer]),
]

# The chosen cases, a program of its own each: files, mutations, and the command.
DAMAGE = [directory, empty, halve]
PICKLES = [partial(hostile, kind=kind) for kind in range(3)]
FOREIGN_MODELS = [partial(other_checkpoint, kind=kind) for kind in (0, 1, 4)]  # format, 10^12 parameters, a weight less
NESTED = partial(broken_json, text="[" * 100_000)
PROGRAMS = [(file, mutation, check) for files, mutations, check in (
    (["out/best.pt"], DAMAGE + PICKLES + FOREIGN_MODELS, check_chat),
    (["out/ckpt.pt"], DAMAGE + PICKLES + FOREIGN_MODELS, check_resume),
    (["out/best.pt"], [directory, PICKLES[1], FOREIGN_MODELS[1]], check_export),
    (["out/best.pt"], [halve, PICKLES[0], FOREIGN_MODELS[0]], check_beginning_from),
    (["data/train_000.bin", "data/tok300.model"], [*DAMAGE, PICKLES[0]], check_training),
    (["data/meta.json"], [directory, NESTED, swapped_corpora], check_training),
    (["data/meta.json"], [empty], check_preparing_again),
    (["half/tokens.partial/plan.json", "half/text/train_000.parquet"], [directory, halve], check_going_on),
    (["out/metrics.jsonl"], [directory, empty, NESTED], check_plot),
    (["sets/tales.parquet", "sets/tales.json"], [halve, PICKLES[0]], check_data_set),
) for file in files for mutation in mutations]


def alarm(*_):
    raise Hang


def torture(cases, invoke, seed, master, place):
    """Some of the cases (see all_cases) in one worker: [(case, file, what was done, verdict, detail)]."""
    signal.signal(signal.SIGALRM, alarm)
    scene, results, references = Scene(master, place, invoke), [], {}
    for case in cases:
        rng = random.Random(f"{seed} {case}")
        if isinstance(case, str):
            name, mutation, check = PROGRAMS[int(case.split()[-1])]
            checks = [check]
        else:
            _, files, special, checks = rng.choices(FAMILIES, [family[0] for family in FAMILIES])[0]
            name = rng.choice(files)
            mutation = rng.choice(special * 3 + ANY_FILE if len(special) > 1 else special + ANY_FILE)
        for check in checks:
            if check in COMPARED and check not in references:
                scene.fresh()
                references[check] = check(Scene(master, place, in_this_process))
                assert references[check][0] == 0, references[check][1]
        what = getattr(mutation, "__name__", None) or mutation.func.__name__
        if not scene.spoil(name, mutation, rng):
            results.append((case, name, what, "unchanged", ""))
            continue
        whole = what == "foreign" and name.endswith(".pt") and any(
            other.suffix == ".pt" and other.read_bytes() == scene.spoiled.read_bytes() for other in scene.pool)
        for check in checks:
            verdict, detail = judge(check, scene, references)
            if scene.marker.exists():
                verdict, detail = "executed", what
            if verdict == "wrong data" and scene.forged:
                verdict = "forged"
            if verdict == "wrong data" and whole and check in ANY_MODEL:
                verdict = "another model"
            results.append((case, name, f"{what} {check.__name__[6:]}", verdict, detail[-700:]))
    return results


def judge(check, scene, references):
    before = snapshot(scene.place)
    signal.alarm(SECONDS)
    try:
        code, output, result = check(scene)
    except Hang:
        return "hang", ""
    except Exception as error:
        import traceback
        return "traceback", "".join(traceback.format_exception(error))
    finally:
        signal.alarm(0)
    after = snapshot(scene.place)
    if code == 0:
        if check in COMPARED and not same(result, references[check][2]):
            return "wrong data", output
        return "no difference", ""
    # Refused: one line, and every file is as it was, but for what a half-made preparation may begin anew.
    if sum(line.startswith("Error: ") for line in output.splitlines()) != 1:
        return "unclear", output
    made = ("new", "half/tokens.partial", "half/text.partial")
    harmed = [name for name in before if before[name] != after.get(name) and not name.startswith(made)]
    return ("harmed", f"{harmed}: {output}") if harmed else ("refused", "")


BAD = ("traceback", "hang", "wrong data", "harmed", "executed", "unclear", "crash")


def all_cases(cases, programs, seed=0, workers=2, scratch=None, verbose=False):
    """Counter of verdicts over `cases` random cases and the chosen ones numbered in `programs`; the bad ones."""
    count, bad = Counter(), []
    jobs = [(list(range(cases))[at::-(-cases // 100)], in_this_process) for at in range(-(-cases // 100))]
    jobs += [([f"program {i}" for i in programs[at::workers]], in_its_own) for at in range(workers)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        make_master(folder / "master")
        with ProcessPoolExecutor(workers, mp_context=processes) as pool:
            waiting = {pool.submit(torture, some, invoke, seed, folder / "master", folder / f"worker{i}"): some
                       for i, (some, invoke) in enumerate(jobs)}
            for future in as_completed(waiting):
                try:
                    results = future.result()
                except Exception as error:  # a worker that died took its cases with it
                    results = [(waiting[future], "", "", "crash", repr(error))]
                for result in results:
                    count[result[3]] += 1
                    if result[3] in BAD:
                        bad.append(result)
                        if verbose:
                            print(*result, file=sys.stderr, flush=True)
        count["cases"] = cases + len(programs) - count["unchanged"]
    return count, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    clock = Clock()
    count, _ = all_cases(options.cases, range(len(PROGRAMS)), options.seed, verbose=True)
    rows = {"files spoiled": count["cases"], "of these read by a program of its own": len(PROGRAMS),
            "commands refused in one line": count["refused"],
            "commands that the damage made no difference to": count["no difference"],
            "whole checkpoints of another model in its place, and taken": count["another model"],
            "forged with fitting checksums, and taken": count["forged"], "seconds": round(clock())}
    sys.exit(table(rows | {f"!{verdict}": count[verdict] for verdict in BAD}))


if __name__ == "__main__":
    main()
