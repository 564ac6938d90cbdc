"""Feed every command files that are damaged, foreign or hostile: it says so in a line, or they make no difference.

    python tests/torture/corrupt.py --cases 2000

Each case spoils one file of a prepared corpus, a run, a half-finished preparation or a data set: cut, flipped, swapped,
emptied, made a directory, replaced by a pickle that would run code, by another shape or format, by wrong types. The
real commands run in the same process through click's CliRunner, two workers beside each other, with an alarm after 30 s.
"""

import argparse
import io
import itertools
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from harness import TINY, Clock, prepared, preparation, processes, read, run, same, snapshot, table, write_tales

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


def append(path, rng, scene):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 2, 100])))


def directory(path, rng, scene):
    path.unlink()
    path.mkdir()


def noise(path, rng, scene):
    path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000])))


def gone(path, rng, scene):
    path.unlink()


def hostile(path, rng, scene):
    """A pickle that would run code: bare, in torch's zip, and in torch's older format."""
    import torch
    payload, kind = Payload(scene.marker), rng.randrange(3)
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
    """Put something strange at a random place of a nested value, or take that place away."""
    at = rng.choice(list(leaves(value)))
    place = value
    taken = rng.random() < 0.15
    for key in at[:-1]:
        place = place[key]
    before = place[at[-1]]
    strange = [item for item in STRANGE if type(item) is not type(before)]
    if taken:
        del place[at[-1]]
    else:
        place[at[-1]] = rng.choice(strange)
    return taken


def strange_json(path, rng, scene):
    """Another type somewhere in a JSON file; a digest that the file carries is made to fit a new value."""
    lines = path.suffix == ".jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if lines else None
    value = rows or json.loads(path.read_text(encoding="utf-8"))
    taken = replaced(value, rng)
    if isinstance(value, dict) and "sha256" in value and not taken:
        import preprocess
        value["sha256"] = preprocess.digest(value)
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")


def broken_json(path, rng, scene):
    texts = ["", "[", "[]", "{}", "null", "1", '"x"', "[" * 100_000, '{"a": ' * 50_000, "NaN", "1e999", '{"format": 1}',
             "\ufeff{}", "9" * 5000]
    path.write_text(rng.choice(texts), encoding="utf-8")


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
    before = place[key]
    if isinstance(before, torch.Tensor) and kind < 2:
        place[key] = rng.choice([before.double(), before.flatten()[:-1], torch.full_like(before, float("nan")) if (
            before.is_floating_point()) else before.float() * float("nan"),
                                 before[None], torch.zeros(0), torch.zeros(3, dtype=torch.int64)])
    elif kind == 2 and not isinstance(place, list) and place is not contents.get("train_config") and (
            place is not contents.get("model_config")):
        del place[key]
    else:
        place[key] = rng.choice([item for item in STRANGE if type(item) is not type(before)])
    torch.save(contents, path)


def other_checkpoint(path, rng, scene):
    """Another format, a shape that does not fit, or settings that ask for 10^12 parameters."""
    import torch
    contents = torch.load(path, weights_only=True)
    config, weights = contents["model_config"], contents["model"]
    kind = rng.randrange(6)
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

    def __init__(self, master, place):
        self.master, self.place, self.other = master, place, master / "other"
        self.marker = place / "executed"
        self.pool = [path for path in master.rglob("*") if path.is_file() and path.stat().st_size]
        # Written for people: nothing reads them again, so what they say makes no difference.
        self.unread = {"preset"}

    def fresh(self):
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.master, self.place)


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


def invoke(script, arguments):
    """(exit status, output, stdout); raises what the command did not handle."""
    from click.testing import CliRunner
    result = CliRunner().invoke(__import__(script).main, [str(word) for word in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output, result.stdout


# The families of cases: which files, what may happen to them, and the commands with what they must answer.

def check_training(scene):
    code, output, _ = invoke("train", [*RUN, "--max-iters", 1, "--data-dir", scene.place / "data", "--out-dir",
                                       scene.place / "new"])
    if code == 0:
        from model import read_checkpoint
        return code, output, read_checkpoint(scene.place / "new" / "ckpt.pt")
    return code, output, None


def check_preparing_again(scene):
    code, output, _ = invoke("preprocess", preparation(scene.master / "source.txt", scene.place / "data"))
    return code, output, code == 0 and prepared(scene.place / "data")


def check_going_on(scene):
    code, output, _ = invoke("preprocess", preparation(scene.master / "source.txt", scene.place / "half"))
    return code, output, code == 0 and prepared(scene.place / "half")


def check_chat(scene):
    code, output, text = invoke("chat", ["--prompt", "Tale", "--seed", 1, "--max-new-tokens", 4, "--device", "cpu",
                                         "--out-dir", scene.place / "out"])
    return code, output, code == 0 and text


def check_resume(scene):
    code, output, _ = invoke("train", ["--resume", "--max-iters", 5, "--data-dir", scene.place / "data", "--out-dir",
                                       scene.place / "out"])
    if code == 0:
        from model import read_checkpoint
        return code, output, read_checkpoint(scene.place / "out" / "ckpt.pt")
    return code, output, None


def check_plot(scene):
    code, output, _ = invoke("plot_loss", [scene.place / "out"])
    return code, output, None  # numbers in a log cannot be checked against anything


def check_data_set(scene):
    name = scene.spoiled.name
    new = scene.place / "new"
    code, output, _ = invoke("preprocess", ["prepare-dataset", "--dataset", scene.spoiled, "--vocab-size", 300,
                                            "--workers", 1, "--data-dir", new])
    if code == 0:
        import preprocess
        assert len(preprocess.open_corpus(new).train) and name
    return code, output, None  # a text with another letter is a text


FAMILIES = [
    # weight, files, mutations beside ANY_FILE, checks, which snapshot a refusal must leave alone
    (5, ["data/train_000.bin", "data/val_000.bin", "data/tok300.model", "data/meta.json"], [swapped_corpora],
     [check_training, check_preparing_again]),
    (4, ["data/meta.json"], [strange_json, strange_json, strange_json, broken_json],
     [check_training, check_preparing_again]),
    (4, ["out/ckpt.pt"], [strange_checkpoint, strange_checkpoint, other_checkpoint, wrong_pickle], [check_resume]),
    (4, ["out/best.pt"], [strange_checkpoint, other_checkpoint, wrong_pickle], [check_chat]),
    (2, ["out/metrics.jsonl"], [strange_json, strange_json, broken_json], [check_plot, check_resume]),
    (2, ["out/config.json"], [strange_json, strange_json, broken_json], [check_plot, check_resume]),
    (3, ["half/tokens.partial/plan.json", "half/text/text.json", "half/tokens.partial/tok300.model",
         "half/text/train_000.parquet", "half/tokens.partial/train_001.bin"], [], [check_going_on]),
    (2, ["half/tokens.partial/plan.json", "half/text/text.json"], [strange_json, broken_json], [check_going_on]),
    (4, ["sets/tales.txt", "sets/tales.jsonl", "sets/tales.json", "sets/tales.csv", "sets/tales.parquet"], [],
     [check_data_set]),
]
COMPARED = {check_training, check_preparing_again, check_going_on, check_chat, check_resume}


def alarm(*_):
    raise Hang


def torture(numbers, seed, master, place):
    """Cases `numbers` in one worker: [(number, file, what was done, verdict, detail)]."""
    signal.signal(signal.SIGALRM, alarm)
    scene, results = Scene(master, place), []
    references = {}
    for check in COMPARED:
        scene.fresh()
        references[check] = check(scene)
        assert references[check][0] == 0, references[check][1]
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        _, files, special, checks = rng.choices(FAMILIES, [family[0] for family in FAMILIES])[0]
        scene.fresh()
        name = rng.choice(files)
        mutation = rng.choice(special * 3 + ANY_FILE if len(special) > 1 else special + ANY_FILE)
        scene.spoiled = place / name
        untouched = scene.spoiled.read_bytes()
        mutation(scene.spoiled, rng, scene)
        if scene.spoiled.is_file() and scene.spoiled.read_bytes() == untouched:
            results.append((number, name, mutation.__name__, "unchanged", ""))
            continue
        for check in checks:
            verdict, detail = judge(check, scene, references)
            if scene.marker.exists():
                verdict, detail = "executed", mutation.__name__
            if verdict == "wrong data" and mutation is wrong_pickle:
                verdict = "forged"  # checksums made to fit and every form kept: only a signature could tell
            results.append((number, name, f"{mutation.__name__} {check.__name__[6:]}", verdict, detail[-700:]))
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


def all_cases(cases, seed=0, workers=2, scratch=None, verbose=False):
    """Counter of verdicts over `cases` cases, and the bad ones."""
    count, bad = Counter(), []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        make_master(folder / "master")
        chunk = max(1, min(100, cases // workers))
        chunks = list(itertools.batched(range(cases), chunk)) if hasattr(itertools, "batched") else [
            range(at, min(cases, at + chunk)) for at in range(0, cases, chunk)]
        with ProcessPoolExecutor(workers, mp_context=processes) as pool:
            waiting = {pool.submit(torture, list(numbers), seed, folder / "master", folder / f"worker{i}"): numbers
                       for i, numbers in enumerate(chunks)}
            for future in as_completed(waiting):
                try:
                    results = future.result()
                except Exception as error:  # a worker that died took its cases with it
                    results = [(waiting[future][0], "", "", "crash", repr(error))]
                for result in results:
                    count[result[3]] += 1
                    if result[3] in BAD:
                        bad.append(result)
                        if verbose:
                            print(*result, file=sys.stderr, flush=True)
        count["cases"] = len(range(cases)) - count["unchanged"]
    return count, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    clock = Clock()
    count, _ = all_cases(options.cases, options.seed, verbose=True)
    rows = {"files spoiled": count["cases"], "commands refused in one line": count["refused"],
            "commands that the damage made no difference to": count["no difference"],
            "forged with fitting checksums, and taken": count["forged"], "seconds": round(clock())}
    sys.exit(table(rows | {f"!{verdict}": count[verdict] for verdict in BAD}))


if __name__ == "__main__":
    main()
