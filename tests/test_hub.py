"""Data sets of the Hugging Face Hub, the default first, prepared by the command from a server on this machine."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hub import Hub, object_id

from data import Corpus

NAME = "roneneldan/TinyStories"
TRAIN = [f"data/train-{i:05}-of-00004-2d5a1467fff1081b.parquet" for i in range(4)]
VALIDATION = "data/validation-00000-of-00001-869c898b519ad725.parquet"
WORDS = "the cat sat on a mat café жила кошка 你好 😀 dogs ran far away home".split()
INTERRUPTED = "\nStopped. Rerun the same command to resume.\n"
SHORT_WAITS = dict(HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
ARGUMENTS = ["prepare-dataset", "--vocab-size", "330"]
BEGINNING = f"""
import json, runpy, sys, types
sys.path.insert(0, {str(ROOT)!r})
sys.modules["torch"] = types.ModuleType("torch")  # data.py imports it, which would take half of a command's time
import data
del sys.modules["torch"]  # `datasets` would use it
"""
ONE_COMMAND = ["-c", BEGINNING + f"runpy.run_path({str(ROOT / 'preprocess.py')!r}, run_name='__main__')", *ARGUMENTS]
MANY_COMMANDS = ["-c", BEGINNING + f"""
from click.testing import CliRunner
import preprocess
preprocess.time = types.SimpleNamespace(sleep=lambda seconds: None)
preprocess.import_datasets()  # its log lines go to the real stderr, not to that of one command
for name in sys.argv[1:]:
    arguments = [*{ARGUMENTS}, "--dataset", name, "--data-dir", "from-" + name.replace("/", "-").replace(":", "-")]
    result = CliRunner().invoke(preprocess.main, arguments)
    assert isinstance(result.exception, (SystemExit, type(None))), (name, result.output, result.exception)
    print(json.dumps([name, [result.exit_code, result.output]]))
"""]


def tales(count, seed):
    rng = random.Random(seed)
    return [f"Tale {i} of {seed}. " + " ".join(rng.choices(WORDS, k=20)) + ".\n\nEnd." for i in range(count)]


def text_file(texts):
    return "\n<|endoftext|>\n".join(texts).encode()


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), file)
    return file.getvalue()


def tiny_stories(seed):
    """({path: bytes}, [training stories, validation stories]), laid out as the real ones; each file has empty rows."""
    train, val = [tales(60 + i, 10 * seed + i) for i in range(4)], tales(20, 10 * seed + 4)
    files = {"README.md": b"---\nlicense: cdla-sharing-1.0\n---\n", "TinyStories-train.txt": b"not this",
             "TinyStories_all_data.tar.gz": b"nor this", VALIDATION: parquet(val)}
    files |= {path: parquet(["", *texts, None]) for path, texts in zip(TRAIN, train, strict=True)}
    return files, [sum(train, []), val]


FILES, STORIES = tiny_stories(0)
OIDS = {path: object_id(path, data) for path, data in FILES.items()}
TEXTS = tales(90, 20)


def start(hub, folder, *options, program=ONE_COMMAND, **environment):
    """The command as a process in `folder`, which also contains the cache of the libraries."""
    folder.mkdir(exist_ok=True)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    known |= dict(HF_ENDPOINT=hub.address, HF_HOME=str(folder / "hf"), NO_PROXY="*", HF_UPDATE_DOWNLOAD_COUNTS="0",
                  PYTHONIOENCODING="utf-8")
    return subprocess.Popen([sys.executable, *program, *options], cwd=folder, env=known | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def output(process, code=0):
    """What a process prints until its end, which must come with `code` and without a traceback."""
    text = process.communicate(timeout=60)[0]
    assert process.returncode == code and "Traceback" not in text, text
    return text


def wait_for_stall(hub, count):
    """Until `count` requests are left without an answer."""
    deadline = time.monotonic() + 60
    while hub.stalled < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stories(folder):
    """[training stories, validation stories] of a corpus."""
    tokenizer, meta = Corpus(folder).tokenizer, json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    found = []
    for split in ("train", "val"):
        ids = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in meta[split]])
        starts = np.flatnonzero(ids == tokenizer.bos_id)
        found.append([tokenizer.decode(story[1:-1].tolist()) for story in np.split(ids, starts[1:])])
    return found


def sent(hub):
    """What was downloaded, whole or in part, in order: the names of small files, the ids of large ones."""
    found = (re.fullmatch("/cdn/(.+)|/api/resolve-cache/.*/[0-9a-f]{40}/(.+)", path)
             for method, path, size in hub.log if method == "GET" and size)
    return [match[1] or match[2] for match in found if match]


# -----------------------------------------------------------------------------
# Most of a command's time goes into importing datasets, so what the tests begin with runs at once.

@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory):
    """{name: (hub, folder, process)}"""
    folder, stall = tmp_path_factory.mktemp("hub"), dict(do="stall", after=500)
    with contextlib.ExitStack() as stack:
        hubs = {name: stack.enter_context(Hub()) for name in ("stalls", "killed", "many", "texts")}
        for hub in hubs.values():
            hub.commit(NAME, FILES)
        hubs["stalls"].faults = [stall | dict(on="GET /cdn", skip=1)]
        hubs["killed"].faults = [stall | dict(on=OIDS[TRAIN[2]])]
        hubs["texts"].commit("owner/texts", {"README.md": b"# Texts\n", "a.txt": text_file(TEXTS[:50]),
                                             "b/b.txt": text_file(TEXTS[50:])})
        hubs["texts"].faults = [stall | dict(on="GET .*/tree/", after=None, times=1), stall | dict(on=r"GET .*\.txt")]
        many_data_sets(hubs["many"])
        options = dict(
            stalls=(SHORT_WAITS, []), killed=({}, []), texts=(SHORT_WAITS, ["--dataset", "owner/texts"]),
            many=(dict(program=MANY_COMMANDS), [NAME, *REFUSALS, *PREPARED]))
        processes = {name: start(hubs[name], folder / name, *arguments, **keywords)
                     for name, (keywords, arguments) in options.items()}
        yield {name: (hubs[name], folder / name, process) for name, process in processes.items()}
        for process in processes.values():
            process.kill()


@pytest.fixture(scope="module")
def said(started):
    """{data set: [exit code, output]} of the commands that run one after another in one process."""
    return dict(json.loads(line) for line in output(started["many"][2]).splitlines() if line.startswith("["))


def many_data_sets(hub):
    names = ("one", "two")
    card = "configs:\n" + "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in names)
    hub.commit("a/parts", {"README.md": f"---\n{card}---\n".encode()}
               | {f"{name}/a.parquet": parquet(tales(50, seed)) for seed, name in enumerate(names)})
    hub.commit("a/test", {"data/test-00000-of-00001.parquet": parquet(tales(50, 2))})
    hub.commit("a/recovers", {"train.parquet": parquet(tales(50, 3))})
    for name in ("gated", "denied", "busy", "broken", "login", "late"):
        hub.commit(f"a/{name}", {"train.parquet": parquet(tales(9, 9))})
    hub.commit("a/damaged", {"train/a.parquet": parquet(tales(9, 8)), "train/b.parquet": b"PAR1, cut off"})
    hub.gated, hub.renamed = {"a/gated"}, {"tales": "a/test"}
    hub.faults = [dict(do="status", on="/api/datasets/a/recovers", status=503, headers={}, times=3)]
    hub.faults += [dict(do="status", on=on, status=status, headers=headers) for on, status, headers in (
        ("/api/datasets/a/unreachable", 307, {"Location": "http://127.0.0.1:9"}),
        ("/a/denied/resolve", 403, {"X-Error-Code": "GatedRepo"}),
        ("/api/datasets/a/busy", 429, {"Retry-After": 60}),
        ("/api/datasets/a/broken", 500, {}),
        ("/api/datasets/a/login", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        ("/cdn/" + object_id("a.parquet", parquet(tales(9, 9))), 403, {"X-Error-Message": "Request has expired"}))]


ACCEPT = "accept its terms at https://huggingface.co/datasets/a/{}, log in with `hf auth login`, then rerun."
OTHERWISE = "or pass --dataset sample for the built-in corpus, or --dataset with a local file or folder."
REFUSALS = {  # data set: what the message must contain, the last at its end
    "a/unreachable": ["cannot be reached for a/unreachable (", "refused", "check the network and rerun, " + OTHERWISE],
    "no/such": ["there is no data set no/such", "or it needs a login (`hf auth login`)", OTHERWISE[3:]],
    "tales": ["the full name of tales is a/test: pass --dataset a/test."],
    "a/parts": ["a/parts has the configurations one, two: choose one, such as --dataset a/parts:one."],
    "a/parts:three": ["a/parts has the configurations one, two: choose one, such as --dataset a/parts:one."],
    "a/gated": ["You must be authenticated", ACCEPT.format("gated")],
    "a/denied": ["to ask for access", ACCEPT.format("denied")],
    "a/busy": ["cannot be reached for a/busy (429 Too Many Requests", "rerun in a few minutes, " + OTHERWISE],
    "a/broken": ["cannot be reached for a/broken (Server error '500 Internal Server Error'",
                 "rerun in a few minutes, " + OTHERWISE],
    "a/login": ["(Invalid credentials in Authorization header)", "log in with `hf auth login`, " + OTHERWISE],
    "a/late": ["a/late could not be read", "(403 Forbidden: Request has expired.): rerun to resume, or pass --dataset "
               "sample for the built-in corpus."],
    "a/damaged": ["a/damaged could not be read", "Parquet magic bytes not found", "rerun to resume, or pass --dataset "
                  "sample for the built-in corpus."],
}
PREPARED = {"a/parts:two": tales(50, 1), "a/test": tales(50, 2), "a/recovers": tales(50, 3)}


# -----------------------------------------------------------------------------
# Truths

@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_during_a_stall_ends_at_once_and_text_files_follow_the_rules_of_local_ones(started):
    hub, folder, process = started["texts"]
    wait_for_stall(hub, 3)  # one list of files and both files, in threads
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    text = output(process, 130)
    assert text.endswith(INTERRUPTED) and time.monotonic() - begun < 3
    assert re.search(f"timed out.* GET {hub.address}/api/datasets/owner/texts/tree/.*\nRetrying", text), text
    hub.faults.clear()
    text += output(start(hub, folder, "--dataset", "owner/texts"))
    assert "unauthenticated" not in text and "Repo card" not in text  # nothing that the reader has to do
    train, val = stories(folder / "data")
    assert sorted(train + val) == sorted(TEXTS) and len(val) < 5
    assert "\nread: 2 files      " in text and "not read (another format): 1 (README.md)" in text


def test_a_killed_download_resumes_with_what_is_missing_at_the_same_commit_and_absorbs_faults(started, request):
    hub, folder, process = started["killed"]
    wait_for_stall(hub, 1)
    process.kill()
    process.wait()
    assert sent(hub) == ["README.md", *(OIDS[path] for path in TRAIN[:2])]
    hub.commit(NAME, tiny_stories(1)[0])
    hub.faults = [dict(on="GET.*" + OIDS[TRAIN[2]], times=1, do="drop", after=1000),
                  dict(on="GET.*" + OIDS[VALIDATION], times=1, do="status", status=429, headers={"Retry-After": 0})]
    hub.log.clear()
    text = output(start(hub, folder))
    assert "Error while downloading" in text and "Rate limited. Waiting" in text
    assert set(sent(hub)) == {OIDS[path] for path in (TRAIN[2], TRAIN[3], VALIDATION)}
    request.getfixturevalue("said")  # undisturbed, it has made the same files
    results = [{path.name: path.read_bytes() for path in result.iterdir()}
               for result in (folder / "data", started["many"][1] / "from-roneneldan-TinyStories")]
    assert results[0] == results[1]


def test_the_default_has_every_story_its_own_validation_and_is_read_from_no_other_file(started, said):
    hub, folder, _ = started["many"]
    code, text = said[NAME]
    assert code == 0 and stories(folder / "from-roneneldan-TinyStories") == STORIES
    assert re.search(r"\n  skipped: empty +8 +0\n", text)
    assert all(sent(hub).count(OIDS[path]) == 1 for path in [*TRAIN, VALIDATION])
    assert not [name for name in sent(hub) if name.endswith(".txt") or name == OIDS["TinyStories_all_data.tar.gz"]]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_said_in_words_with_the_way_out(said, name):
    code, text = said[name]
    line = re.sub("^The Hugging Face Hub answers .*\n", "", text.removesuffix("\n"), flags=re.MULTILINE)
    assert code == 1 and line.startswith("Error: ") and "\n" not in line, text
    assert all(words in line for words in REFUSALS[name]) and line.endswith(REFUSALS[name][-1]), text


def test_a_busy_hub_is_asked_again_for_half_a_minute_with_a_line_each_time(said):
    for name, status in ("a/busy", 429), ("a/broken", 500), ("a/recovers", 503):
        assert said[name][1].startswith("".join(
            f"The Hugging Face Hub answers {status}: asking again in {seconds} s.\n" for seconds in (2, 6, 18)))
    assert "asking again" not in "".join(said[name][1] for name in ("a/unreachable", "a/login", "no/such", NAME))


@pytest.mark.parametrize("name", PREPARED)
def test_a_configuration_and_a_test_split_alone_are_training_text(started, said, name):
    assert said[name][0] == 0, said[name]
    train, val = stories(started["many"][1] / ("from-" + re.sub("[/:]", "-", name)))
    assert sorted(train + val) == sorted(PREPARED[name]) and len(val) < 5


def test_a_download_that_stalls_is_reported_and_ends_by_itself(started):
    lines = output(started["stalls"][2], 1).splitlines()
    assert sum(line.startswith("Error while downloading from http://127.0.0.1") for line in lines) >= 6
    assert lines[-1] == f"Error: {NAME} could not be read from the Hugging Face Hub (timed out): rerun to resume, or " \
        "pass --dataset sample for the built-in corpus."
