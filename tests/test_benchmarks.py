"""The numbers, tables and commands of tests/benchmarks, mostly on runs made up by hand."""

import importlib
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import model
import train
from config import IGNORE_INDEX, GPTConfig, SampleConfig, TrainConfig, only_fields
from data import Corpus

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
common, decode_speed, learning, memory, peers, several_gpus, studies, quality, train_speed = map(
    importlib.import_module, ("common", "decode_speed", "learning", "memory", "peers", "several_gpus", "studies",
                              "text_quality", "train_speed"))
SMALL = GPTConfig(block_size=12, vocab_size=260, n_layer=1, n_head=2, n_embd=16, intermediate_size=24)


def settings_of(flags):
    """What train.py makes of its flags; fails on one that it does not have."""
    return train.main.make_context("train.py", [str(word) for word in flags]).params


def write_run(folder, iterations=40, tokens_per_iter=1000, rate=500.0, start=30.0, bpb=lambda it: 1.0):
    """A run that took `start` seconds before its first iteration, then up to `rate` tokens per second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(iter=0, tokens=0, seconds=0.0, val_loss=8.0, val_bpb=0.5)]  # the untrained model counts as no best
    for it in range(10, iterations + 1, 10):
        at = dict(iter=it, tokens=it * tokens_per_iter, seconds=start + it * tokens_per_iter / rate)
        rows.append(at | dict(train_loss=2.0, lr=0.1, skipped=it // 20, peak_memory_mib=200 - it,
                              tokens_per_second=rate if it > 30 else rate * it / 40))
        rows.append(at | dict(val_loss=2.0, val_bpb=bpb(it)))
    rows[-1]["full_val_bpb"] = bpb(it) + 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(dict(model=dict(vocab_size=512))))
    for name in ("ckpt.pt", "best.pt"):
        (folder / name).write_text("weights")


@pytest.fixture
def pretend(monkeypatch):
    """train.py is not started: its flags are checked and kept, and it "writes" a run made up by `write_run`."""
    runs = []

    def run_process(command, timeout, cache_dir=None):
        at = command.index(common.__file__)
        given = settings_of(command[at + 3:]) | dict(checkout=command[at + 1], gib=float(command[at + 2]))
        runs.append(given | dict(torchrun=command[:at]))
        if given["dropout"] == 0:
            time.sleep(0.2)
        if given["dtype"] == "bfloat16":
            return "", "Error: no bfloat16 here."
        # A context of 16 tokens runs at 160 tokens per second, and so on; two processes are 1.9 times as fast.
        rate = 10 * given["block_size"] if given["block_size"] else 500
        write_run(Path(given["out_dir"]), max(40, min(given["max_iters"], 2000)), given["tokens_per_iter"] or 65536,
                  rate * (1.9 if command[:at] else 1), bpb=lambda it: 2 - it / 100)
        return "Device: cpu (1 threads), float32.\n--batch-size auto: micro-batches of 8 fit.\n", None

    monkeypatch.setattr(common, "run_process", run_process)
    return runs


def invoke(script, *arguments, expect=0):
    result = CliRunner().invoke(script.main, [*map(str, arguments)])
    assert result.exit_code == expect, result.output
    return result.output


# -----------------------------------------------------------------------------
# A run and its figures

def test_the_start_of_a_run_is_not_in_its_rate_and_its_final_figure_is_that_of_all_validation_stories(tmp_path):
    write_run(tmp_path, bpb=lambda it: 1 + abs(it - 30) / 100)
    row = common.read_run(tmp_path)
    assert (row["tokens_per_second"], row["seconds"], row["start_seconds"]) == (500, 110.0, 30.0)
    assert (row["best_iter"], row["best_bpb"], row["final_bpb"]) == (30, 1.0, 1.35)
    assert (row["iterations"], row["tokens"], row["skipped"], row["peak_mib"]) == (40, 40_000, 2, 190)
    assert row["curve"][0] == [10, 10_000, 50.0, 1.2] and len(row["curve"]) == 4


def test_a_process_that_fails_or_takes_too_long_has_a_reason():
    assert common.run_process(["-c", "print('fine')"], 60) == ("fine\n", None)
    assert common.run_process(["-c", "import time; time.sleep(60)"], 0.5)[1] == "stopped after 0 s"
    assert common.run_process(["-c", "raise SystemExit(3)"], 60)[1] == "exit status 3, no output"
    assert common.reason(1, "x\ntorch.OutOfMemoryError: CUDA out of memory.") == "does not fit"
    assert common.reason(1, "Error: no data.\nChildFailedError: see above\n") == "Error: no data."


def test_nothing_starts_near_the_deadline_and_what_starts_is_told_the_time_left():
    def left(timeout):
        return dict(timeout=timeout)
    assert common.Clock(19).timed(left)["error"] == "not started: the deadline is near"
    assert 95 < common.Clock(100).timed(left)["timeout"] <= 100
    assert common.Clock(0).timed(left, limit=240)["timeout"] == 240


# -----------------------------------------------------------------------------
# The studies

def test_a_real_run_gives_a_row_and_keeps_its_log_and_until_the_end_its_best_weights(data, tmp_path):
    study = studies.Study("real", {}, tmp_path, "on", 600, True, [], 32768)
    row = study.run("run", str(data), 12, 2)
    assert row["iterations"] == 12 and row["tokens"] == 12 * 512 and 2 < row["final_bpb"] < 5
    assert "cpu" in row["device"] and not row["compile_failed"] and 0 < row["epochs"] < 1
    log = {"config.json", "metrics.jsonl", "lock"}
    assert {path.name for path in (tmp_path / "real" / "run").iterdir()} == log | {"best.pt"}, "a teacher, perhaps"
    study.finish(None)
    assert {path.name for path in (tmp_path / "real" / "run").iterdir()} == log
    assert row["command"].startswith("python train.py --") and settings_of(row["command"].split()[2:])


def test_a_run_that_fails_is_a_row_with_its_reason_and_the_others_continue(data, tmp_path, pretend):
    output = invoke(studies, "precision", "--data-dir", data, "--work-dir", tmp_path, "--tokens", 1e6)
    saved = json.loads((tmp_path / "precision.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["float16", "bfloat16", "float32"]
    assert saved["rows"][1]["error"] == "Error: no bfloat16 here." and saved["table"] in output
    assert "| float32 | 500 | " in saved["table"] and all(row["command"] in output for row in saved["rows"])
    assert [given["max_iters"] for given in pretend] == [31] * 3
    assert {(given["eval_tokens"], given["final_eval_tokens"]) for given in pretend} == {(0, 0)}
    assert (tmp_path / "precision.png").read_bytes()[:4] == b"\x89PNG"
    drawn = common.read_jsonl(tmp_path / "precision" / "picture" / "float16" / "metrics.jsonl")
    assert drawn[1]["seconds"] == pytest.approx(10 * 32768 / 500), "without the start"


def test_contexts_get_the_iterations_that_take_equal_time_at_equal_tokens(data, tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(studies.Study, "plot", lambda self, rows, path: None)
    invoke(studies, "context", "--data-dir", data, "--work-dir", tmp_path, "--tiny", "--seconds", 512)
    probes, runs = pretend[::2], pretend[1::2]
    assert [given["block_size"] for given in runs] == [given["block_size"] for given in probes] == [16, 32, 64, 128]
    assert {given["batch_size"] * given["block_size"] for given in pretend} == {512}
    assert [given["max_iters"] for given in runs] == [160, 320, 640, 1280]


def test_corpora_of_different_tokenizers_are_refused(data, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(dict(tokenizer=dict(sha256="another"))))
    assert "one tokenizer" in invoke(studies, "regularization", "--data-dir", data, "--data-dir", tmp_path, expect=2)


def test_fifteen_runs_several_at_a_time_come_in_their_order(data, tmp_path, pretend):
    folders = [tmp_path / name for name in ("part10", "part30", "part100")]
    for folder in folders:
        folder.mkdir()
        (folder / "meta.json").write_text((data / "meta.json").read_text())
    where = [word for folder in folders for word in ("--data-dir", folder)]
    invoke(studies, "regularization", *where, "--work-dir", tmp_path / "work", "--jobs", 4)
    rows = json.loads((tmp_path / "work" / "regularization.json").read_text())["rows"]
    assert [row["corpus"] for row in rows] == ["part10"] * 5 + ["part30"] * 5 + ["part100"] * 5
    assert [row["setting"].split(",")[0] for row in rows[:3]] == ["dropout 0", "dropout 0.1", "dropout 0.2"]
    asked = {(given["data_dir"], given["dropout"], given["weight_decay"]) for given in pretend}
    assert asked == {(str(folder), *way) for folder in folders
                     for way in ((0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.1, 0), (0.1, 0.5))}
    assert (tmp_path / "work" / "regularization.png").exists()


def test_what_is_finished_when_a_study_is_stopped_is_in_its_file(data, tmp_path, pretend, monkeypatch):
    real = common.read_run

    def stop(folder, skip):
        if Path(folder).name == "adamw-learned":
            raise KeyboardInterrupt
        return real(folder, skip)

    monkeypatch.setattr(common, "read_run", stop)
    invoke(studies, "optimizer", "--data-dir", data, "--work-dir", tmp_path, expect=1)
    rows = json.loads((tmp_path / "optimizer.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["muon-learned", "muon-rotary"]
    assert len(pretend) == 3, "the last run is not started"


# -----------------------------------------------------------------------------
# Speed, memory, learning, several GPUs

@pytest.mark.parametrize("tiny", [True, False])
def test_every_row_of_ours_is_a_run_that_train_py_accepts(data, pretend, tiny):
    invoke(train_speed, "--data-dir", data, *(["--tiny"] if tiny else []))
    assert len(pretend) == sum(name.startswith("ours") for name in train_speed.ROWS)
    for given in pretend:
        config = TrainConfig(**only_fields(TrainConfig, given))
        assert train.grad_accum_steps(config, given["block_size"] or 256, config.batch_size) >= 1
        assert given["max_iters"] == 8 * given["log_interval"] == given["eval_interval"]
    assert {given["tokens_per_iter"] for given in pretend} == {512 if tiny else 65536}


def test_an_earlier_checkout_takes_turns_with_ours_and_medians_of_all_rounds_count(data, tmp_path, monkeypatch):
    runs = []

    def run_train(flags, out_dir, timeout, root, memory_gib, cache_dir):
        given = settings_of(flags)
        runs.append((root, given["data_dir"], given["optimizer"], given["compile"], memory_gib))
        if len(runs) == 3:
            return dict(error="does not fit")
        rate = (2 if root == str(ROOT) else 1) * 100 * len(runs) ** 2
        return dict(tokens_per_second=rate, peak_mib=9, start_seconds=1)

    monkeypatch.setattr(common, "run_train", run_train)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    output = invoke(train_speed, "--data-dir", data, "--before", tmp_path, "--before-data-dir", corpus, "--rounds", 3,
                    "--only", "ours-muon-256", "--json", tmp_path / "speed.json")
    assert runs == [(str(ROOT), str(data), None, "on", 6.5), (str(tmp_path), str(corpus), None, "on", 6.5)] * 3
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["name"], row["rates"]) for row in saved["rows"]] == [
        ("ours-muon-256", [200, 5000]), ("before-muon-256", [400, 1600, 3600])]
    assert saved["ratios"] == {"ours-muon / before-muon": 1.625}
    assert "ours-muon / before-muon, each at its fastest micro-batch: 1.625" in output


def test_ratios_compare_each_code_at_its_fastest_micro_batch():
    rates = {"ours-256": 90, "ours-128": 80, "ours-rotary-256": 99, "nanogpt-128": 45, "nanogpt-192": 30,
             "ours-eager-64": 20, "ours-muon-256": 81}
    rows = [dict(name=name, tokens_per_second=rate) for name, rate in rates.items()]
    assert train_speed.ratios([*rows, dict(name="nanogpt-256", error="does not fit")]) == {
        "ours / nanogpt": 2.0, "ours-muon / ours": 0.9}


def test_memory_is_that_of_whole_runs_each_way_and_under_limits(data, tmp_path, pretend):
    output = invoke(memory, "--data-dir", data, "--sizes", "16,32", "--json", tmp_path / "memory.json", "--picture",
                    tmp_path / "memory.png", "--", "--preset", "llama")
    limited, table = pretend[:3], pretend[3:]
    assert [(given["gib"], given["batch_size"], given["compile"]) for given in limited] == [
        (6.5, 128, "on"), (3.0, "auto", "on"), (3.0, "auto", "off")]
    assert [(given["batch_size"], given["compile"], given["activation_checkpointing"]) for given in table] == [
        (size, compiled, recompute) for size in (16, 32) for compiled in ("off", "on") for recompute in (None, True)]
    assert {given["preset"] for given in pretend} == {"llama"}
    assert re.search("^eager, 32 +190 +500 ", output, re.MULTILINE)
    assert "| 32 | 190 MiB, 500/s | 190 MiB, 500/s | 190 MiB, 500/s | 190 MiB, 500/s |" in output
    assert (tmp_path / "memory.png").exists()


def test_budgets_are_tried_upwards_until_one_reaches_the_target_on_all_validation_stories(data, tmp_path, pretend):
    output = invoke(learning, "--data-dir", data, "--budgets", "12e5,4e5,8e5", "--tokens", 0, "--target-bpb", 1.65,
                    "--json", tmp_path / "learning.json", "--", "--tokens-per-iter", "10000")
    assert [given["max_iters"] for given in pretend] == [40, 80]
    assert {(run["eval_interval"], run["eval_tokens"], run["final_eval_tokens"]) for run in pretend} == {(25, 0, 0)}
    short, enough = json.loads((tmp_path / "learning.json").read_text())["rows"]
    assert (short["final_bpb"], short["reached"], enough["final_bpb"], enough["reached"]) == (1.85, False, 1.45, True)
    assert (enough["tokens_at_target"], enough["seconds_at_target"]) == (400_000, 830.0)
    assert "ours reached the target with a budget of 0.80 M tokens, 1630.0 s" in output


def test_several_processes_are_compared_with_one_of_the_same_flags(data, tmp_path, pretend):
    invoke(several_gpus, "--data-dir", data, "--processes", 2, "--json", tmp_path / "gpus.json", "--", "--seed", "7")
    saved = json.loads((tmp_path / "gpus.json").read_text())
    assert (saved["ratio"], saved["largest_difference"], saved["validation_difference"]) == (1.9, 0, 0)
    one, two = (run | dict(out_dir=None, torchrun=None) for run in pretend)
    assert one == two and one["seed"] == 7
    assert [given["torchrun"] for given in pretend] == [
        [], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]]
    with torch.device("meta"):
        assert model.GPT(GPTConfig(**only_fields(GPTConfig, one))).count_parameters() > 100e6


def test_generation_is_timed_at_full_length(tmp_path):
    invoke(decode_speed, "--tiny", "--device", "cpu", "--batch", 1, "--batch", 3, "--json", tmp_path / "decode.json")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["batch"], row["prompt_tokens"], row["penalty"]) for row in rows] == [
        (1, 16, 1.1), (1, 16, 1.0), (3, 16, 1.1), (3, 16, 1.0), (1, 160, 1.1)]
    assert all(row["new_tokens"] == 8 and row["tokens_per_second"] > 0 for row in rows)


# -----------------------------------------------------------------------------
# Other repositories

GPT_OF_A_PEER = """
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.SIZE)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""
SHAPE_OF_A_PEER = """
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    SIZE: int = 384
    vocab_size: int = 4096
    dropout: float = 0.2
    bias: bool = False
"""


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "model.py").write_text((SHAPE_OF_A_PEER + GPT_OF_A_PEER).replace("SIZE", "n_embd"))
    (tmp_path / "train.py").write_text(
        "learning_rate, warmup = 1, 2\nlearning_rate = 6e-2\nmin_lr = 6e-5\nwarmup_iters = 2\nlr_decay_iters = 600\n"
        "weight_decay = 1e-1\nbeta1 = 0.9\nbeta2 = 0.95\ngrad_clip = 1.0\ndropout = 0.0\nbatch_size = 12\n"
        "gradient_accumulation_steps = 5 * 8\nblock_size = 1024\ndevice = open('/nowhere')\n")
    (tmp_path / "config" / "train_shakespeare_char.py").write_text("dropout = 0.2\n")
    return tmp_path


def measured(capsys, **job):
    peers.main(dict(memory_gib=6.5, tiny=True, compiled=True, batch_size=4) | job)
    return json.loads(capsys.readouterr().out.removeprefix("RESULT "))


def test_a_peer_is_timed_in_its_own_step_with_our_data(data, nanogpt, capsys):
    row = measured(capsys, name="nanogpt", folder=str(nanogpt), data_dir=str(data), tokens_per_iter=512, log_interval=2)
    assert row["tokens_per_second"] > 100 and row["start_seconds"] >= 0


def test_a_peer_learns_by_its_own_settings_until_it_reaches_the_target(data, nanogpt, capsys):
    job = dict(name="nanogpt_char", folder=str(nanogpt), data_dir=str(data), seconds=60, eval_tokens=1000,
               eval_every=4096)
    row = measured(capsys, **job, tokens=40_000, target_bpb=2.8)
    assert len(row["curve"]) > 1 and row["curve"][-2][3] > 2.8 >= row["final_bpb"] > 1
    assert (row["settings"]["learning_rate"], row["settings"]["dropout"]) == (6e-2, 0.2)
    assert measured(capsys, **job, tokens=8192, target_bpb=0.1)["tokens"] == 8192


def test_the_config_module_of_a_peer_does_not_replace_ours(tmp_path):
    (tmp_path / "config.py").write_text(SHAPE_OF_A_PEER.replace("SIZE", "n_embed") + """
@dataclass
class TrainingConfig:
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 5
    lr_decay_iters: int = 9
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    batch_size: int = 2
    gradient_accumulation_steps: int = 3
""")
    (tmp_path / "model.py").write_text("import torch\nfrom config import GPTConfig\n"
                                       + GPT_OF_A_PEER.replace("SIZE", "n_embed"))
    ours = sys.modules["config"]
    assert peers.load_model("smolgpt", tmp_path, peers.TINY_SHAPE, 300, 0.1).wte.weight.shape == (300, 32)
    settings = peers.peer_settings("smolgpt", tmp_path)
    assert (settings["tokens_per_iter"], settings["dropout"]) == (2 * 3 * 256, 0.2) and sys.modules["config"] is ours


def test_the_learning_rate_of_peers_warms_up_falls_and_stays():
    settings = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=19)
    rates = [peers.learning_rate(it, settings) for it in (0, 8, 9, 14, 19, 100)]
    assert rates == pytest.approx([0.1, 0.9, 1.0, 0.55, 0.1, 0.1])


# -----------------------------------------------------------------------------
# The quality of text

def test_words_are_lower_case_and_keep_their_apostrophes():
    assert quality.split_words("Tom's dog, 3 cats... Él can’t!") == ["tom's", "dog", "3", "cats", "él", "can’t"]


def test_repeated_n_grams_are_those_that_occurred_before():
    assert quality.repeated_fraction("a b c d e".split()) == 0
    assert quality.repeated_fraction("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert quality.repeated_fraction("a b c".split()) == 0


@pytest.mark.parametrize("times, looping", [(1, False), (2, False), (3, True)])
def test_a_story_loops_when_eight_words_occur_three_times(times, looping):
    assert quality.loops(("one two three four five six seven eight and then " * times).split()) is looping


def test_distinct_looks_at_equally_many_words_of_every_column():
    assert quality.distinct(["a b a b".split(), "a b".split()], 1, limit=100) == 2 / 6
    assert quality.distinct(["a b a b".split(), "c d".split()], 1, limit=5) == 3 / 5
    assert quality.distinct(["a b c".split()], 2, limit=100) == 1


def test_words_and_phrases_of_the_training_text_are_found():
    columns = [[["the", "cat", "sat", "down"]], [["a", "cat", "sat"]]]
    known, copied = quality.scan_training(["Now the cat sat.", "A dog!"], columns, n=3)
    assert known == {"the", "cat", "sat", "a"} and copied == {("the", "cat", "sat")}
    assert quality.fraction_of(["cat", "cat", "down"], known) == pytest.approx(2 / 3)


@pytest.mark.parametrize("length", [2, 11, 12, 13, 19, 40])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_windows_score_each_token_once_with_half_a_window_before_it(length, first):
    ids, scored = list(range(100, 100 + length)), []
    for x, y in quality.windows(ids, first, 12):
        assert len(x) == len(y) == 12
        for i, target in enumerate(y):
            if target != IGNORE_INDEX:
                assert x[i] == target - 1
                assert i >= 5 or x[0] == 100
                scored.append(target)
    assert scored == ids[max(first, 1):]


@pytest.fixture(scope="module")
def net():
    """A model that is not uniform: fresh blocks write nothing, so the embeddings alone decide."""
    torch.manual_seed(1)
    net = model.GPT(SMALL).eval()
    torch.nn.init.normal_(net.wte.weight)
    return net


@torch.inference_mode()
def test_perplexity_is_that_of_the_whole_story_where_one_window_holds_it(net):
    ids = list(range(40, 49))
    nats = torch.nn.functional.cross_entropy(net(torch.tensor([[1, *ids]]))[0], torch.tensor([*ids, 2]))
    story = quality.Story(ids, True, "")
    assert quality.perplexity(net, [story], 1, 2, 1, 4) == pytest.approx(math.exp(nats), rel=1e-4)


def test_stories_end_at_the_end_or_at_the_limit(net):
    class Loaded:
        device, model = torch.device("cpu"), net

        class tokenizer:
            eos_id = 7
            decode = staticmethod(str)

    prompts = torch.tensor([[1, 40, 41]] * 30)
    sampling = SampleConfig(max_new_tokens=30, temperature=100, top_k=0)
    stories = quality.generate_stories(Loaded, prompts, sampling, batch_size=8, seed=1)
    assert len(stories) == 30 and all(story.ids[:2] == [40, 41] for story in stories)
    assert all(7 not in story.ids[2:] and story.ended == (len(story.ids) < 32) for story in stories)
    assert len({tuple(story.ids) for story in stories}) == 30 and 0 < sum(story.ended for story in stories) < 30


def test_real_stories_are_grammatical_and_a_model_of_another_corpus_is_refused(data, tmp_path):
    corpus = Corpus(data)
    assert all(story.ids == corpus.tokenizer.encode(story.text) for story in quality.real_stories(corpus, 3, 8, 300))
    torch.manual_seed(1)
    net = model.GPT(GPTConfig(block_size=300, vocab_size=corpus.tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8,
                              intermediate_size=8))
    model.save_checkpoint(tmp_path / "best.pt", net, corpus.tokenizer.model_bytes)
    invoke(quality, "--checkpoint", tmp_path / "best.pt", "--data-dir", data, "--count", 3, "--max-new-tokens", 300,
           "--settings", "greedy", "--device", "cpu", "--json", tmp_path / "quality.json")
    columns = json.loads((tmp_path / "quality.json").read_text())["columns"]
    real, greedy = columns["real"], columns["greedy"]
    assert (real["grammatical"], real["ends by itself"], greedy["grammatical"]) == (1, 1, 0)
    assert real["perplexity"] > 100, "the model knows nothing"
    # An unknown field at the end changes the bytes of the tokenizer, and nothing else.
    model.save_checkpoint(tmp_path / "best.pt", net, corpus.tokenizer.model_bytes + b"\xc0\x3e\x01")
    output = invoke(quality, "--checkpoint", tmp_path / "best.pt", "--data-dir", data, expect=1)
    assert "has another tokenizer than the corpus" in output
