import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import export
import model as model_file
import preprocess
import train
from config import IGNORE_INDEX, PRESETS, GPTConfig, TrainConfig, UserError, folder_lock, only_fields
from data import Corpus, TrainLoader, Validation
from model import GPT, TrainingLoss, load_checkpoint, save_checkpoint
from train import MuonAdamW, configure_optimizer, estimate_loss, lr_multiplier, orthogonalize

CPU = torch.device("cpu")
GradScaler = torch.amp.GradScaler
TINY = GPTConfig(block_size=8, vocab_size=260, n_layer=1, n_head=2, n_embd=16, intermediate_size=32)
SMALL = dict(n_layer=1, n_head=2, n_embd=16, intermediate_size=32, block_size=32, tokens_per_iter=128, batch_size=2,
             max_iters=12, eval_interval=5, eval_tokens=400, final_eval_tokens=400, log_interval=3, sample_tokens=5,
             dropout=0.2, device="cpu")
pytestmark = pytest.mark.usefixtures("signals", "quick_measurements")
TIMING = {"seconds", "elapsed", "tokens_per_second", "peak_memory_mib"}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes under /proc")


@pytest.fixture(scope="module")
def corpus(data):
    return Corpus(data)


def arguments(data, out, **settings):
    """The command line of a small run; True is a flag alone, None none."""
    settings = SMALL | dict(data_dir=data, out_dir=out) | settings
    return [word for name, value in settings.items() if value is not None
            for word in ([train.flag(name)] if value is True else [train.flag(name), str(value)])]


@pytest.fixture
def quick_measurements(monkeypatch):
    monkeypatch.setattr(train, "MEASURE_SECONDS", 0)


def command(words, expect=0):
    """Run train.py with these words and return its output; its exit code is `expect`, an error of it is one line."""
    result = CliRunner().invoke(train.main, list(map(str, words)))
    assert result.exit_code == expect, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def run_train(data, out, expect=0, **settings):
    return command(arguments(data, out, **settings), expect)


def resume(out, *words, expect=0):
    return command(["--resume", "--out-dir", out, *words], expect)


def printed_command(output, script="train.py"):
    """The words of the last command for `script` in the output, as a shell splits them."""
    return shlex.split(re.findall(rf"python {script}([^`\n]*)", output)[-1])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training_lines(out):
    return [row for row in metrics(out) if "train_loss" in row]


def validation_lines(out):
    return [row for row in metrics(out) if "val_loss" in row]


def saved(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a, b):
    """Equal to the last bit, at every depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMING)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b, *settings):
    """Whether two runs are equal but for timing and the settings named: weights, optimizer, random state, log."""
    one, two = saved(a), saved(b)
    for checkpoint in (one, two):
        for name in ("out_dir", *settings):
            checkpoint["train_config"].pop(name)
    return same(one, two) and same(metrics(a), metrics(b))


def at_each_step(monkeypatch, action):
    """Call action(optimizer, number) before each update of the weights; the first is number 1."""
    real, numbers = MuonAdamW.step, itertools.count(1)

    def step(optimizer):
        action(optimizer, next(numbers))
        return real(optimizer)
    monkeypatch.setattr(MuonAdamW, "step", step)


def at_each_loss(monkeypatch, change):
    """Replace the training loss of each micro-batch by change(loss, iteration), counted from 1, two per iteration."""
    real, numbers = GPT.forward, itertools.count(2)

    def forward(model, idx, targets=None):
        loss = real(model, idx, targets)
        return change(loss, next(numbers) // 2) if model.training and targets is not None else loss
    monkeypatch.setattr(GPT, "forward", forward)


def stop_at(monkeypatch, iteration, number=signal.SIGINT):
    at_each_step(monkeypatch, lambda optimizer, n: signal.raise_signal(number) if n == iteration else None)


def weights_of(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


# -----------------------------------------------------------------------------
# The optimizer

def test_orthogonalized_matrices_have_singular_values_near_one():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalize(x).flatten(1), (u @ v).flatten(1)).min() > 0.97
    assert torch.allclose(orthogonalize(x.mT), orthogonalize(x).mT, atol=1e-5)


def muon_by_hand(weight, grad, momentum, lr, decay):
    """One step for one plain matrix in float64, from the definition of Jordan et al.; (weight, momentum)."""
    momentum = 0.95 * momentum + 0.05 * grad
    update = 0.05 * grad + 0.95 * momentum
    x = update / update.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return weight * (1 - lr * decay) - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x, momentum


PARTS = {"c_attn": ["q", "k", "v"], "c_fc": ["gate", "up"], "attn.c_proj": ["all"], "mlp.c_proj": ["all"]}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_updated_as_its_optimizer_is_defined_with_its_own_rate_decay_betas_and_parts(name):
    config = TrainConfig(optimizer=name, weight_decay=0.3, beta1=0.8, beta2=0.7, muon_learning_rate=0.05,
                         embedding_learning_rate=0.02, learning_rate=0.01)
    model, generator = GPT(replace(TINY, n_layer=2, bias=True)), torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data.normal_(generator=generator)
    optimizer = configure_optimizer(model, config)
    optimizer.found_inf = torch.zeros(())
    matrices, plain, expected = {}, {}, {n: p.detach().double() for n, p in model.named_parameters()}
    for n, p in expected.items():
        parts = next((parts for key, parts in PARTS.items() if f"{key}.weight" in n), None)
        if name == "muon" and parts:
            matrices[n] = [[part.clone(), torch.zeros_like(part)] for part in p.chunk(len(parts))]
        else:
            decay = 0.3 if name == "adamw" and p.dim() == 2 else 0.0
            plain[n] = torch.optim.AdamW([torch.nn.Parameter(p.clone())], lr=0.02 if name == "muon" else 0.01,
                                         betas=(0.8, 0.7), weight_decay=decay, foreach=False)
    assert len(matrices) == (8 if name == "muon" else 0)
    for _ in range(3):
        for n, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
            if n in matrices:
                grads = p.grad.double().chunk(len(matrices[n]))
                matrices[n] = [muon_by_hand(w, g, m, 0.05, 0.3) for (w, m), g in zip(matrices[n], grads, strict=True)]
                expected[n] = torch.cat([weight for weight, _ in matrices[n]])
            else:
                (reference,) = plain[n].param_groups[0]["params"]
                reference.grad = p.grad.double()
                plain[n].step()
                expected[n] = reference.detach()
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.allclose(p.double(), expected[n], atol=2e-5), n


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_where_found_inf_is_1_a_step_changes_neither_weights_nor_moments_nor_counts(name, bad):
    model = GPT(TINY)
    optimizer = configure_optimizer(model, TrainConfig(optimizer=name))

    def step(found_inf, value):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.found_inf = torch.tensor(float(found_inf))
        optimizer.step()
        return [copy.deepcopy(optimizer.state_dict()["state"]), weights_of(optimizer)]

    fresh = weights_of(optimizer)
    state, weights = step(1, bad)
    assert same(weights, fresh) and not any(value.any() for entry in state.values() for value in entry.values())
    good = step(0, 0.5)
    assert len(good[0]) == (9 if name == "adamw" else 8) and not any(map(torch.equal, good[1], fresh))
    assert all(value.isfinite().all() and value.any() for entry in good[0].values() for key, value in entry.items()
               if key != "step" or "momentum" not in entry)
    assert same(step(1, bad), good)


def test_the_learning_rate_warms_up_holds_and_decays_to_its_ratio():
    wsd = TrainConfig(max_iters=1000, warmup_iters=50, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.1)
    rates = [lr_multiplier(it, wsd) for it in range(1101)]
    assert rates[0] == pytest.approx(1 / 51) and rates[49] == pytest.approx(50 / 51)
    assert set(rates[50:601]) == {1.0} and rates[800] == pytest.approx(0.55)
    assert rates[1000:] == pytest.approx([0.1] * 101)
    cosine = replace(wsd, schedule="cosine", min_lr_ratio=0.0)
    assert [lr_multiplier(it, cosine) for it in (50, 240, 525, 1000)] == pytest.approx([1.0, 0.904508, 0.5, 0.0])
    short = TrainConfig(max_iters=20, warmup_iters=100)
    assert [lr_multiplier(it, short) for it in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0]), "a tenth of the run"


# -----------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("align_stories", [False, True])
def test_validation_loss_is_the_plain_mean_at_any_batch_size(corpus, align_stories):
    torch.manual_seed(0)
    model = GPT(replace(TINY, vocab_size=512, block_size=32, dropout=0.5)).train()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    validation = Validation(corpus, 32, 1000, align_stories)
    results = [estimate_loss(model, validation, size, CPU, torch.float32) for size in (1, 8, 1000)]
    assert all(one == pytest.approx(results[0], rel=1e-6) for one in results) and model.training
    total, count, model = 0.0, 0, model.eval()
    for x, y in validation.batches(1, CPU):
        n = int((y != IGNORE_INDEX).sum())
        logits = model(x[:, :n]).double()[0]
        total += -logits.log_softmax(-1)[range(n), y[0, :n]].sum().item()
        count += n
    assert count == validation.num_targets and len(validation.starts) % 8
    assert results[0] == dict(val_loss=pytest.approx(total / count, rel=1e-6), floor=validation.floor,
                              val_bpb=pytest.approx(total / math.log(2) / validation.text_bytes, rel=1e-6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_evaluation_compute_in_the_dtype_that_was_asked_for(data, tmp_path, monkeypatch, dtype):
    seen, real = set(), GPT.forward

    def forward(model, idx, targets=None):
        loss = real(model, idx, targets)
        seen.add((model.training, str(model.lm_head(model.ln_f.weight).dtype), str(loss.dtype)))
        return loss
    monkeypatch.setattr(GPT, "forward", forward)
    run_train(data, tmp_path, dtype=dtype, max_iters=1)
    assert seen == {(training, f"torch.{dtype}", "torch.float32") for training in (True, False)}


def test_evaluating_and_printing_stories_never_change_the_training(data, tmp_path):
    run_train(data, tmp_path / "often", eval_interval=1)
    run_train(data, tmp_path / "seldom", eval_interval=100, sample_tokens=0)
    one, two = (saved(tmp_path / name) for name in ("often", "seldom"))
    assert all(same(one[key], two[key]) for key in ("model", "optimizer", "rng"))


def test_the_story_that_is_printed_is_drawn_in_evaluation_mode_and_training_continues_in_its_own(corpus):
    torch.manual_seed(0)
    model = GPT(replace(TINY, vocab_size=512, block_size=32, dropout=0.9)).train()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    stories = [train.sample_story(model, corpus.tokenizer, 80, seed, CPU) for seed in (5, 5, 5, 6)]  # two windows
    assert stories[0] == stories[1] == stories[2] != stories[3] and all(stories) and model.training
    model.generate = lambda *_: corpus.tokenizer.encode("a\x1b[31m\x0eb\n\tc")
    assert train.sample_story(model, corpus.tokenizer, 80, 5, CPU) == "a\ufffd[31m\ufffdb\n\tc", "sent to a terminal"


@pytest.mark.parametrize("final", [3000, 0])  # 0: all
def test_the_last_line_has_the_loss_over_the_final_evaluation_tokens_under_its_own_name(data, tmp_path, corpus, final):
    run_train(data, tmp_path, final_eval_tokens=final)
    *before, last = validation_lines(tmp_path)
    assert [row["iter"] for row in before] == [0, 5, 10] and not any("full_val_loss" in row for row in before)
    model = load_checkpoint(tmp_path / "ckpt.pt")[0]
    for prefix, tokens in (("", 400), ("full_", final)):
        exact = estimate_loss(model, Validation(corpus, 32, tokens, False), 2, CPU, torch.float32)
        assert {name: last[prefix + name] for name in exact} == pytest.approx(exact, rel=1e-6)
        assert exact.keys() == {"val_loss", "val_bpb", "floor"}


def test_each_evaluation_prints_another_story_and_a_resume_repeats_none(data, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(train, "sample_story", lambda model, tokenizer, length, seed, device: seeds.append(seed) or "")
    run_train(data, tmp_path, max_iters=10)
    resume(tmp_path, "--max-iters", 12)
    assert [row["iter"] for row in validation_lines(tmp_path)] == [0, 5, 10, 12] and len(set(seeds)) == len(seeds) == 3


def test_a_loss_is_described_with_its_distance_to_the_floor_once_that_is_near():
    assert train.describe_loss(1.5, 0.7, 1.2) == "loss 1.5000, 0.7000 bits per byte, 25.0% above the floor of 1.2000"
    assert train.describe_loss(2.5, 1.0, 1.2) == "loss 2.5000, 1.0000 bits per byte (floor 1.2000)"
    assert train.describe_loss(2.5, 1.0) == "loss 2.5000, 1.0000 bits per byte"


# -----------------------------------------------------------------------------
# The loop

@pytest.mark.parametrize("settings, unused, advice", [
    (dict(learning_rate=1e-9), "--learning-rate", "--muon-learning-rate"),
    (dict(optimizer="adamw", muon_learning_rate=0.1), "--muon-learning-rate", "--learning-rate"),
    (dict(optimizer="adamw", embedding_learning_rate=0.1), "--embedding-learning-rate", "--learning-rate"),
    (dict(schedule="cosine", decay_fraction=0.1), "--decay-fraction", "--schedule wsd")])
def test_a_flag_without_effect_is_refused_and_the_one_that_works_is_named(data, tmp_path, settings, unused, advice):
    output = run_train(data, tmp_path, expect=1, **settings)
    assert f"{unused} has no effect with" in output and advice in output.partition("has no effect")[2]


@pytest.mark.parametrize("optimizer, rate, peak", [("muon", "muon_learning_rate", 0.03),
                                                   ("adamw", "learning_rate", 0.004)])
def test_a_run_makes_max_iters_updates_at_the_rates_of_the_schedule_and_logs_them(data, tmp_path, monkeypatch,
                                                                                  optimizer, rate, peak):
    seen = []
    at_each_step(monkeypatch, lambda optimizer, n: seen.append(
        [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]))
    run_train(data, tmp_path, optimizer=optimizer, max_iters=23, log_interval=1, **{rate: peak})
    config, rows = TrainConfig(max_iters=23), metrics(tmp_path)
    expected = [lr_multiplier(it, config) for it in range(23)]
    assert [[pytest.approx(one)] * len(rates) for one, rates in zip(expected, seen, strict=True)] == seen
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([peak * one for one in expected])
    assert [row["iter"] for row in rows if "train_loss" in row] == list(range(1, 24))
    assert [row["iter"] for row in rows if "val_loss" in row] == [0, 5, 10, 15, 20, 23]
    assert all(row["tokens"] == row["iter"] * 128 for row in rows)


def gradients(data, out, monkeypatch, **settings):
    """(gradients at the first update, the log)"""
    seen = []
    at_each_step(monkeypatch, lambda optimizer, n: seen.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]))
    run_train(data, out, **dict(dropout=0, log_interval=1, max_iters=3, grad_clip=0) | settings)
    return seen[0], training_lines(out)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_four_micro_batches_of_one_are_one_of_four(data, tmp_path, monkeypatch, dtype, tolerance):
    whole, log = gradients(data, tmp_path / "whole", monkeypatch, batch_size=4, dtype=dtype)
    parts, same_log = gradients(data, tmp_path / "parts", monkeypatch, batch_size=1, dtype=dtype)
    assert all((a - b).norm() <= tolerance * a.norm() for a, b in zip(whole, parts, strict=True)) and whole[-1].any()
    for a, b in zip(log, same_log, strict=True):
        assert (a["train_loss"], a["grad_norm"]) == pytest.approx((b["train_loss"], b["grad_norm"]), rel=tolerance)


class Conversions(TorchDispatchMode):
    """Counts how often a matrix of this shape is made bfloat16."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype is torch.bfloat16 and made.shape == self.shape:
            self.count += 1
        return made


def test_the_micro_batches_of_an_iteration_share_the_half_precision_weights(data, tmp_path):
    with Conversions(512, 16) as embedding:
        run_train(data, tmp_path, dtype="bfloat16", batch_size=1, max_iters=2, sample_tokens=0)
    assert embedding.count == 2 + 3, "two iterations of four; evaluations at 0 and 2, and the final one"


def test_gradients_are_clipped_as_a_whole_and_a_grad_clip_of_0_clips_nothing(data, tmp_path, monkeypatch):
    plain, log = gradients(data, tmp_path / "plain", monkeypatch)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in plain))
    assert norm > 0.1 and log[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    clipped, log = gradients(data, tmp_path / "clipped", monkeypatch, grad_clip=0.01)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-5), "the norm before it was clipped"
    assert all(torch.allclose(c, p * 0.01 / norm, rtol=1e-3, atol=1e-9) for c, p in zip(clipped, plain, strict=True))


def test_the_loss_logged_is_the_mean_of_all_micro_batches_since_the_last_line_also_across_a_resume(data, tmp_path,
                                                                                                   monkeypatch):
    losses = []
    at_each_loss(monkeypatch, lambda loss, n: losses.append(loss.item()) or loss)
    stop_at(monkeypatch, 4)
    run_train(data, tmp_path, log_interval=7, expect=130)
    resume(tmp_path)
    means = {row["iter"]: row["train_loss"] for row in training_lines(tmp_path)}
    assert means == pytest.approx({7: sum(losses[:14]) / 14, 12: sum(losses[14:]) / 10}, rel=1e-6) and len(losses) == 24


@pytest.mark.parametrize("settings", [{}, dict(seed=5, align_stories=True)])
def test_a_run_reads_the_windows_and_the_validation_text_that_its_settings_say(data, tmp_path, monkeypatch, corpus,
                                                                              settings):
    seen, real = {True: [], False: []}, GPT.forward

    def forward(model, idx, targets=None):
        seen[model.training].append((idx, targets))
        return real(model, idx, targets)
    monkeypatch.setattr(GPT, "forward", forward)
    run_train(data, tmp_path, max_iters=5, **settings)
    aligned = settings.get("align_stories", False)
    batches = TrainLoader(corpus.train, 32, settings.get("seed", 1337), aligned).batches(0, 2, CPU)
    assert same(seen[True], list(itertools.islice(batches, 10)))
    assert same(seen[False], 3 * list(Validation(corpus, 32, 400, aligned).batches(2, CPU)))


def test_the_loss_falls_and_stays_above_the_floor(data, tmp_path):
    run_train(data, tmp_path, max_iters=100, eval_interval=50, dropout=0, tokens_per_iter=512, batch_size=16, n_embd=32,
              eval_tokens=2000)
    rows = validation_lines(tmp_path)
    assert rows[0]["val_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert rows[-1]["val_loss"] < 0.4 * rows[0]["val_loss"]
    assert all(row["val_loss"] > row["floor"] > 0.1 for row in rows)


class Clock:
    """Stands in for the module time: it shows what a test says."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


def test_seconds_count_training_alone_and_tokens_per_second_are_those_of_the_last_interval(data, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)

    def takes(seconds, real):
        def slow(*args, **kwargs):
            clock.now += seconds
            return real(*args, **kwargs)
        return slow
    monkeypatch.setattr(train, "estimate_loss", takes(1e4, train.estimate_loss))
    monkeypatch.setattr(train, "sample_story", takes(1e5, train.sample_story))
    monkeypatch.setattr(train.Run, "save", takes(1e6, train.Run.save))

    def step(optimizer, n):
        clock.now += n  # iteration n takes n seconds
        if n == 7:
            signal.raise_signal(signal.SIGINT)
    at_each_step(monkeypatch, step)
    run_train(data, tmp_path, save_minutes=1e9, expect=130)
    resume(tmp_path)
    assert all(row["seconds"] == row["iter"] * (row["iter"] + 1) / 2 for row in metrics(tmp_path))
    rates = {3: 3 * 128 / (1 + 2 + 3), 6: 3 * 128 / (4 + 5 + 6), 9: 2 * 128 / (8 + 9), 12: 3 * 128 / (10 + 11 + 12)}
    assert {row["iter"]: row["tokens_per_second"] for row in training_lines(tmp_path)} == pytest.approx(rates, abs=0.5)


class Machine:
    """One on which iterations, evaluations, stories and saves take known seconds, by a clock of its own."""

    def __init__(self, monkeypatch, iteration=1.0):
        self.clock, self.iteration, self.began = Clock(), iteration, None
        monkeypatch.setattr(train, "time", self.clock)
        monkeypatch.setattr(train, "estimate_loss", self.takes(lambda model, validation, *args:
                                                               validation.num_targets / 800, train.estimate_loss))
        monkeypatch.setattr(train, "sample_story", self.takes(lambda *args: 2, train.sample_story))
        monkeypatch.setattr(train.Run, "save", self.takes(lambda *args, **kwargs: 1, train.Run.save))
        monkeypatch.setattr(train, "prepare_out_dir", self.begins(train.prepare_out_dir))
        monkeypatch.setattr(MuonAdamW, "step", self.takes(lambda *args: self.iteration, MuonAdamW.step))

    def takes(self, seconds, real):
        def slow(*args, **kwargs):
            self.clock.now += seconds(*args, **kwargs)
            return real(*args, **kwargs)
        return slow

    def begins(self, real):
        def prepare_out_dir(*args):
            self.began = self.clock.now
            return real(*args)
        return prepare_out_dir

    def seconds(self):
        """Since the first iteration of the last command began; the evaluation before it is half a second."""
        return self.clock.now - self.began


TIMED = dict(max_iters=None, minutes=2, log_interval=5, eval_interval=20, eval_tokens=400, final_eval_tokens=4000)


def took(output):
    """(iterations, seconds) of the run that printed this."""
    iters, minutes = re.search(r"([\d,]+) iterations took (\d+) min", output).groups()
    return int(iters.replace(",", "")), 60 * int(minutes)


def test_a_run_with_a_time_ends_with_it_evaluations_stories_and_saves_included(data, tmp_path, monkeypatch):
    machine = Machine(monkeypatch)
    output = run_train(data, tmp_path, **TIMED)
    assert machine.seconds() == pytest.approx(120, abs=3)
    elapsed, iters = saved(tmp_path)["state"]["elapsed"], saved(tmp_path)["state"]["iter"]
    assert took(output) == (iters, 120) and 60 < iters < 120
    rates = [row["lr"] for row in training_lines(tmp_path)]
    assert rates[-1] < 0.1 * max(rates), "the learning rate has decayed"
    first, final = (Validation(Corpus(data), 32, tokens, False).num_targets / 800 for tokens in (400, 4000))
    last = first + final + 2 + 2 * 1  # the evaluations with a story and two saves
    assert machine.seconds() - (elapsed + last) == pytest.approx(first), "the evaluation at 0: not counted"
    assert machine.began > 0, "the measuring before it: neither"


@pytest.mark.parametrize("change", [2.0, 0.5])
def test_a_speed_that_changes_before_the_decay_changes_the_iterations_and_not_the_time(data, tmp_path, monkeypatch,
                                                                                      change):
    machine = Machine(monkeypatch)

    def slower(optimizer, n):
        machine.iteration = change if n > 20 else 1.0
    at_each_step(monkeypatch, slower)
    iters, _ = took(run_train(data, tmp_path, **TIMED))
    assert machine.seconds() == pytest.approx(120, abs=6) and (iters < 65 if change > 1 else iters > 110)


def test_a_speed_that_varies_from_line_to_line_is_averaged(data, tmp_path, monkeypatch):
    machine = Machine(monkeypatch)

    def vary(optimizer, n):
        machine.iteration = 0.7 if n // 5 % 2 else 1.3
    at_each_step(monkeypatch, vary)
    run_train(data, tmp_path, **TIMED)
    assert machine.seconds() == pytest.approx(120, abs=4)


def test_a_run_with_a_time_is_repeated_by_the_iterations_that_it_prints(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Machine(patch)
        output = run_train(data, tmp_path / "timed", **TIMED | dict(minutes=1))
    flags = re.search(r"without a clock: (.*)", output)[1].split()
    command([*arguments(data, tmp_path / "again", **TIMED | dict(minutes=None)), *flags])
    assert same(saved(tmp_path / "timed")["model"], saved(tmp_path / "again")["model"])


@pytest.mark.parametrize("stop", [20, 70])
@pytest.mark.parametrize("compiling", [0, 60])
def test_a_run_with_a_time_that_is_stopped_and_resumed_ends_with_it_too(data, tmp_path, monkeypatch, stop, compiling):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(train, "compile_model", machine.takes(lambda *args: compiling, train.compile_model))
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        run_train(data, tmp_path, **TIMED, expect=130)
    before = saved(tmp_path)["state"]["elapsed"]
    assert took(resume(tmp_path))[1] == 120
    assert before + machine.seconds() == pytest.approx(120, abs=4)


def test_a_resume_on_a_slower_machine_says_what_it_will_miss(data, tmp_path, monkeypatch):
    machine = Machine(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(patch, 70)
        run_train(data, tmp_path, **TIMED, expect=130)
    machine.iteration = 5.0
    output = resume(tmp_path)
    assert re.search(r"the run ends about \d+ (s|min) late\.", output), output


@pytest.mark.parametrize("enough", [0, 20], ids=["a slow machine", "a fast one"])
def test_the_time_of_an_iteration_is_that_of_its_micro_batches_and_one_update_without_the_warmup(data, tmp_path, monkeypatch,
                                                                                                 enough):
    clock, run = Clock(), opened(data, tmp_path)
    durations = itertools.chain([50.0], itertools.repeat(1.0))  # of micro-batches, the first of which is slow

    def takes(seconds, real):
        def slow(*args):
            clock.now += next(seconds)
            return real(*args)
        return slow
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "MEASURE_SECONDS", enough)
    monkeypatch.setattr(MuonAdamW, "step", takes(itertools.repeat(3.0), MuonAdamW.step))
    assert train.measure_iteration(takes(durations, run.training_loss), 2, 8, run) == 8 * 1 + 3


def test_hours_and_minutes_add_up(data, tmp_path, monkeypatch):
    Machine(monkeypatch)
    assert took(run_train(data, tmp_path, **TIMED | dict(minutes=1, hours=1 / 60)))[1] == 120


def test_a_time_is_refused_with_what_contradicts_it(data, tmp_path):
    assert "omit --max-iters" in run_train(data, tmp_path, hours=1, expect=2)
    assert "omit --schedule cosine" in run_train(data, tmp_path, hours=1, max_iters=None, schedule="cosine", expect=1)
    assert not list(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_run_of_more_than_a_day_says_so_before_it_starts(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LONG_FLOPS", 0)
    monkeypatch.setattr(train, "measure_iteration", lambda *args: 3600.0)
    warning = "Warning: on this device the run takes about"
    assert warning not in run_train(data, tmp_path / "short", max_iters=12)
    stop_at(monkeypatch, 1)
    output = run_train(data, tmp_path / "long", max_iters=240, expect=130)
    assert f"{warning} 10 days" in output and "--hours 8" in output
    assert output.index(warning) < output.index("iter 0:")


def test_a_run_is_saved_every_save_minutes_at_each_evaluation_and_at_the_end(data, tmp_path, monkeypatch):
    clock, saves = Clock(), []
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train.Run, "save", lambda run, name, **how: saves.append((name, run.state.iter)))
    at_each_step(monkeypatch, lambda optimizer, n: setattr(clock, "now", clock.now + 60))
    run_train(data, tmp_path, eval_interval=7, save_minutes=2.5)
    assert [it for name, it in saves if name == "ckpt.pt"] == [3, 6, 7, 10, 12]


def test_a_progress_bar_replaces_the_lines_on_a_terminal(data, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    terminal, plain = Terminal(), io.StringIO()  # neither has reconfigure, as in a notebook
    for name, stream in (("stdout", plain), ("stderr", terminal)):
        monkeypatch.setattr(sys, name, stream)
    train.main(arguments(data, tmp_path), standalone_mode=False)
    assert "12/12 loss" in terminal.getvalue() and "tokens/s" in terminal.getvalue()
    last = [text for text in terminal.getvalue().split("\r") if "/12" in text][-1]
    assert "0/12 evaluating" in terminal.getvalue() and "evaluating" not in last, "the line comes back afterwards"
    assert "iter 12: validation loss" in plain.getvalue() and "iter 12/12" not in plain.getvalue()


# -----------------------------------------------------------------------------
# Numbers that are not finite

def infinite_gradient(loss):
    """The same loss with an infinite gradient."""
    loss.register_hook(lambda grad: grad * math.inf)
    return loss


@pytest.mark.parametrize("bad", [lambda loss: loss * math.nan, lambda loss: loss + math.inf, infinite_gradient])
@pytest.mark.parametrize("settings, kept, end", [
    (dict(log_interval=3, eval_interval=6), 6, 9), (dict(log_interval=100, eval_interval=4), 4, 8),
    (dict(log_interval=100, save_minutes=1e-9), 6, 7), (dict(optimizer="adamw", log_interval=1), 5, 7)])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing_and_ends_the_run_at_the_next_look(
        data, tmp_path, monkeypatch, bad, settings, kept, end):
    weights, on_disk = {}, {}

    def step(optimizer, n):
        weights[n] = weights_of(optimizer)
        if n == 7:
            on_disk.update({name: (tmp_path / name).read_bytes() for name in ("ckpt.pt", "best.pt")})
    at_each_step(monkeypatch, step)
    at_each_loss(monkeypatch, lambda loss, n: bad(loss) if n == 7 else loss)
    output = run_train(data, tmp_path, expect=1, **settings)
    half = "--learning-rate 0.001" if "optimizer" in settings else "--muon-learning-rate 0.01"
    assert f"not finite at iteration {end}" in output and f"half the learning rate, {half}" in output
    assert len(weights) == end and same(weights.get(8, weights[7]), weights[7]) and not same(weights[6], weights[7])
    assert saved(tmp_path)["state"]["iter"] == kept
    assert on_disk == {name: (tmp_path / name).read_bytes() for name in on_disk}
    assert max(row["iter"] for row in metrics(tmp_path)) < end


@pytest.mark.parametrize("broken, broken_at, stop, message", [
    ("weights", 7, True, "made weights that are not finite"), ("moments", 7, True, "not finite"),
    ("weights", 10, False, "the validation loss is not finite at iteration 10")])
def test_weights_and_moments_that_are_not_finite_are_never_saved(data, tmp_path, monkeypatch, broken, broken_at, stop,
                                                                 message):
    real, numbers = MuonAdamW.step, itertools.count(1)

    def step(optimizer):
        real(optimizer)
        if next(numbers) == broken_at:
            weight = optimizer.param_groups[0]["params"][-1]
            (weight.data if broken == "weights" else optimizer.state[weight]["exp_avg_sq"]).fill_(math.nan)
            if stop:
                signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(MuonAdamW, "step", step)
    output = run_train(data, tmp_path, expect=1)
    assert message in output and "--muon-learning-rate 0.01" in output
    assert saved(tmp_path)["state"]["iter"] == saved(tmp_path, "best.pt")["state"]["iter"] == 5


# -----------------------------------------------------------------------------
# The GradScaler

@pytest.fixture
def cpu_scaler(monkeypatch):
    """Every run has a GradScaler, as float16 on CUDA has one: cpu_scaler(scale, interval of its growth)."""
    def use(scale, interval=2000):
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: GradScaler("cpu", init_scale=scale,
                                                                                  growth_interval=interval))
    return use


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scaler_is_on_exactly_for_float16_on_cuda(monkeypatch, device, dtype):
    monkeypatch.setattr(train, "choose_device", torch.device)
    monkeypatch.setattr(train, "choose_dtype", lambda *_: dtype)
    monkeypatch.setattr(train, "configure_optimizer", lambda *_: None)
    monkeypatch.setattr(train, "TrainLoader", lambda *_: None)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: (device, enabled))
    run = train.Run("rtx3050", MagicMock(), TrainConfig(device=device), MagicMock())
    assert run.scaler == (device, device == "cuda" and dtype is torch.float16)


def test_gradients_are_unscaled_before_they_are_clipped(data, tmp_path, cpu_scaler):
    run_train(data, tmp_path / "plain", grad_clip=0.01)
    cpu_scaler(1024.0)  # a power of two: scaling rounds nothing
    run_train(data, tmp_path / "scaled", grad_clip=0.01)
    plain, scaled = (training_lines(tmp_path / name) for name in ("plain", "scaled"))
    assert [[row.pop("loss_scale") for row in rows] for rows in (plain, scaled)] == [[1.0] * 4, [1024.0] * 4]
    assert same(plain, scaled) and same(saved(tmp_path / "plain")["model"], saved(tmp_path / "scaled")["model"])


def test_an_update_that_is_skipped_changes_nothing_but_the_scale_and_is_counted_in_the_log(data, tmp_path, monkeypatch,
                                                                                           cpu_scaler):
    weights = []
    cpu_scaler(8.0)
    at_each_step(monkeypatch, lambda optimizer, n: weights.append(weights_of(optimizer)))
    at_each_loss(monkeypatch, lambda loss, n: infinite_gradient(loss) if n in (2, 5) else loss)
    run_train(data, tmp_path, log_interval=1, max_iters=6)
    resume(tmp_path, "--max-iters", 8)
    rows = training_lines(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert [row["loss_scale"] for row in rows] == [8.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, False, True, False, False, False]
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [False, True, False, False, True, False, False]


def test_a_line_says_the_time_left_with_evaluations_and_how_many_updates_were_skipped(data, tmp_path, monkeypatch,
                                                                                      cpu_scaler):
    clock, real = Clock(), estimate_loss

    def takes_six_minutes(*args):
        clock.now += 360
        return real(*args)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "estimate_loss", takes_six_minutes)
    cpu_scaler(8.0)
    at_each_step(monkeypatch, lambda optimizer, n: setattr(clock, "now", clock.now + 60))
    at_each_loss(monkeypatch, lambda loss, n: infinite_gradient(loss) if n == 5 else loss)
    output, skipped = run_train(data, tmp_path), "1 skipped"
    lines = re.findall(r"^iter (\d+)/12: loss [\d.]+(?:, (.+?) left)?, .*?(\d+ skipped)?$", output, re.MULTILINE)
    assert lines == [("3", "", ""), ("6", "18 min", skipped), ("9", "6 min", skipped), ("12", "0 s", skipped)]


@pytest.mark.parametrize("count", [30, 31])
def test_more_than_thirty_skipped_updates_in_a_row_end_the_run_with_advice(data, tmp_path, monkeypatch, cpu_scaler,
                                                                          count):
    cpu_scaler(2.0**20)
    bad = {1, 2, 3, *range(10, 10 + count)}
    at_each_loss(monkeypatch, lambda loss, n: infinite_gradient(loss) if n in bad else loss)
    output = run_train(data, tmp_path, max_iters=50, log_interval=1, eval_interval=35, sample_tokens=0,
                       expect=int(count > 30))
    if count > 30:
        assert "not finite at iteration 40" in output and "--dtype float32" in output
        assert saved(tmp_path)["state"]["iter"] == 35
    else:
        assert training_lines(tmp_path)[-1]["skipped"] == 33


def test_a_loss_that_is_not_finite_ends_a_run_with_a_scaler_too(data, tmp_path, monkeypatch, cpu_scaler):
    cpu_scaler(2.0)
    at_each_loss(monkeypatch, lambda loss, n: loss * math.nan if n == 4 else loss)
    assert "not finite at iteration 5" in run_train(data, tmp_path, log_interval=100, expect=1)


def test_the_scale_and_its_count_survive_a_resume(data, tmp_path, cpu_scaler):
    cpu_scaler(8.0, 4)
    run_train(data, tmp_path, max_iters=6)
    assert saved(tmp_path)["scaler"]["_growth_tracker"] == 2
    cpu_scaler(1.0, 4)
    resume(tmp_path, "--max-iters", 9)
    assert training_lines(tmp_path)[-1]["loss_scale"] == 32.0
    assert saved(tmp_path)["scaler"]["_growth_tracker"] == 1


def test_a_run_may_change_between_devices_with_and_without_a_scaler(data, tmp_path, monkeypatch, cpu_scaler):
    run_train(data, tmp_path, max_iters=3, dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *_, **__: GradScaler("cpu", init_scale=8.0))
        resume(tmp_path, "--max-iters", 6, "--dtype", "float32")
    resume(tmp_path, "--max-iters", 9)
    assert [row["loss_scale"] for row in training_lines(tmp_path)] == [1.0, 8.0, 1.0]


# -----------------------------------------------------------------------------
# best.pt

def given_losses(monkeypatch, *losses):
    """Let the next evaluations find these losses; returns the list of their (weights, number of targets)."""
    losses, asked = iter(losses), []

    def found(model, validation, *rest):
        asked.append((copy.deepcopy(model.state_dict()), validation.num_targets))
        return estimate_loss(model, validation, *rest) | dict(val_loss=next(losses))
    monkeypatch.setattr(train, "estimate_loss", found)
    return asked


def test_best_is_the_model_of_the_lowest_loss_also_when_it_rises_again_and_after_a_resume(data, tmp_path, monkeypatch):
    def best():
        return saved(tmp_path, "best.pt")["state"]["iter"]
    asked = given_losses(monkeypatch, 0.1, 3.0, 1.0, 2.0, 0.2)  # of the untrained model, at 2, 4, 6; and the full one
    run_train(data, tmp_path, eval_interval=2, max_iters=6)
    assert best() == 4 and same(saved(tmp_path, "best.pt")["model"], asked[2][0])
    assert "optimizer" not in saved(tmp_path, "best.pt")
    given_losses(monkeypatch, 1.5, 0.3)
    resume(tmp_path, "--max-iters", 8)
    assert best() == 4
    given_losses(monkeypatch, 0.9, 0.9)
    assert "best validation loss 0.9000" in resume(tmp_path, "--max-iters", 10)
    assert best() == 10


def test_best_has_the_loss_that_the_log_says(data, tmp_path, corpus):
    run_train(data, tmp_path, max_iters=30, eval_interval=3, muon_learning_rate=0.5, warmup_iters=0)
    rows = validation_lines(tmp_path)[1:]
    best, lowest = saved(tmp_path, "best.pt"), min(rows, key=lambda row: row["val_loss"])
    assert best["state"]["iter"] == lowest["iter"]
    model, validation = load_checkpoint(tmp_path / "best.pt")[0], Validation(corpus, 32, 400, False)
    again = estimate_loss(model, validation, 2, CPU, torch.float32)
    assert again["val_loss"] == pytest.approx(lowest["val_loss"], rel=1e-6)


# -----------------------------------------------------------------------------
# Stop and resume

@pytest.mark.parametrize("number, settings", [
    (signal.SIGINT, dict(optimizer="muon", activation_checkpointing=True)),
    (signal.SIGINT, dict(optimizer="adamw", position="rotary", qk_norm=True, align_stories=True)),
    (signal.SIGTERM, dict(dtype="bfloat16", schedule="cosine", bias=True))])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(data, tmp_path, monkeypatch, number, settings):
    run_train(data, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 7, number)  # between two lines of the log and two evaluations
        output = run_train(data, tmp_path / "my run", expect=128 + number, **settings)
    assert "Stopped and saved at iteration 7." in output
    command(printed_command(output))
    assert same_run(tmp_path / "whole", tmp_path / "my run")


def wait_until(condition, seconds, what):
    """Its first true value; the test fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.005)
    return value


def last_iteration(out):
    """The last iteration that the log has a complete line of, 0 before there is one."""
    with contextlib.suppress(OSError):
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return max((json.loads(line)["iter"] for line in lines), default=0)
    return 0


def signalled(words, number, out, iteration):
    """(exit code, output) of a train.py that gets a signal once its log has the iteration."""
    with open(out.with_suffix(".txt"), "w+", encoding="utf-8") as output, subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words], stdout=output, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: last_iteration(out) >= iteration or process.poll() is not None, 60, "progress")
        process.send_signal(number)
        code = process.wait(60)
        output.seek(0)
        return code, output.read()


def test_a_real_process_interrupted_and_its_successor_killed_equal_one_undisturbed(data, tmp_path):
    long = dict(max_iters=170, log_interval=10, eval_interval=40, sample_tokens=0)
    run_train(data, tmp_path / "whole", **long)
    out = tmp_path / "out"
    words = arguments(data, out, **long)
    for number, iteration, expected in ((signal.SIGINT, 20, 130), (signal.SIGKILL, 110, -9)):
        code, output = signalled(words, number, out, iteration)
        assert code == expected and "Traceback" not in output, output
        assert ("Resume with: python train.py --resume" in output) == (number != signal.SIGKILL)
        assert saved(out)["state"]["iter"] < 170
        words = ["--resume", "--out-dir", str(out)]
    resume(out)
    assert same_run(tmp_path / "whole", out)


def test_a_second_ctrl_c_stops_at_once_without_saving(data, tmp_path, monkeypatch, capfd):
    def step(optimizer, n):
        if n == 7:
            signal.raise_signal(signal.SIGINT)
            before = files(tmp_path)
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                assert files(tmp_path) == before
        assert n < 8
    at_each_step(monkeypatch, step)
    run_train(data, tmp_path, expect=130)
    printed = capfd.readouterr().err
    assert "Press Ctrl-C again to stop at once" in printed and "Stopped. Nothing was saved since" in printed
    assert saved(tmp_path)["state"]["iter"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_iteration_is_complete_leaves_nothing_that_blocks_the_same_command(data, tmp_path,
                                                                                                   monkeypatch, number):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, number)
        run_train(data, tmp_path, expect=128 + number)
    assert not list(tmp_path.glob("*.pt"))
    run_train(data, tmp_path)
    assert [row["iter"] for row in validation_lines(tmp_path)] == [0, 5, 10, 12]


def test_a_resume_drops_what_was_logged_after_its_checkpoint_and_lines_that_are_damaged(data, tmp_path):
    run_train(data, tmp_path)
    kept = metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\x00\xff\n[3]\n{"loss": 1}\n' + path.read_bytes().replace(b"\n", b'\n{"iter": 3, "tr\n', 1)
                     + b'{"iter": 13, "train_loss": 9.0}\n{"iter": 14, "train_lo')
    resume(tmp_path, "--max-iters", 15)
    assert metrics(tmp_path)[:len(kept)] == kept
    assert [row["iter"] for row in metrics(tmp_path)[len(kept):]] == [15, 15]


def test_settings_of_memory_device_and_reports_may_change_at_a_resume_and_are_recorded(data, tmp_path):
    run_train(data, tmp_path, max_iters=4)
    changes = dict(max_iters=8, batch_size=4, log_interval=1, eval_interval=4, dtype="bfloat16", compile="off",
                   activation_checkpointing=True, final_eval_tokens=100, sample_tokens=0, save_minutes=1.0)
    run_train(data, tmp_path, resume=True, **changes)
    assert [row["iter"] for row in training_lines(tmp_path)] == [3, 4, 5, 6, 7, 8]
    config = json.loads((tmp_path / "config.json").read_text())["train"]
    assert config == saved(tmp_path)["train_config"] and changes.items() <= config.items()


# -----------------------------------------------------------------------------
# Fine-tuning

def test_fine_tuning_takes_weights_and_shape_from_the_checkpoint_and_nothing_of_how_it_learned(data, tmp_path):
    run_train(data, tmp_path / "base", muon_learning_rate=0.5, warmup_iters=1, weight_decay=0.7, seed=3, preset="demo",
              position="learned")
    base, out = saved(tmp_path / "base", "best.pt"), tmp_path / "tuned"
    tuned = ["--init-from", tmp_path / "base" / "best.pt", "--data-dir", data, "--out-dir", out, "--dropout", "0.1",
             "--max-iters", 2, "--tokens-per-iter", 64, "--batch-size", 2, "--eval-tokens", 400, "--final-eval-tokens",
             100, "--sample-tokens", 0, "--device", "cpu"]
    command(tuned)
    end = saved(out)
    assert end["model_config"] == base["model_config"] | dict(dropout=0.1) and end["preset"] == "demo"
    expected = TrainConfig(**only_fields(TrainConfig, PRESETS["demo"]))
    for name in ("muon_learning_rate", "embedding_learning_rate", "warmup_iters", "weight_decay", "seed"):
        assert end["train_config"][name] == getattr(expected, name), name
    assert expected.warmup_iters == 50, "the preset's, not the default"
    last = min(row["val_loss"] for row in validation_lines(tmp_path / "base")[1:])
    assert validation_lines(out)[0]["val_loss"] == pytest.approx(last, rel=0.05) and end["state"]["iter"] == 2
    steps = [state["step"].item() for state in end["optimizer"]["state"].values() if "exp_avg" in state]
    assert steps and set(steps) == {2.0}


def test_fine_tuning_takes_the_learning_settings_of_the_preset_given(corpus):
    shape = GPTConfig(**only_fields(GPTConfig, PRESETS["demo"]), vocab_size=512)
    checkpoint = dict(tokenizer=corpus.tokenizer.model_bytes, preset="rtx3050")
    given = dict(data_dir="data", seed=4)
    preset, same_shape, config = train.settings_for_init_from(checkpoint, shape, "demo", given, corpus, "a.pt")
    assert (preset, same_shape) == ("demo", shape)
    assert (config.tokens_per_iter, config.max_iters, config.warmup_iters, config.seed) == (5120, 320, 50, 4)
    del given["seed"]
    assert train.settings_for_init_from(checkpoint, shape, None, given, corpus, "a.pt")[2] == TrainConfig()


def test_fine_tuning_refuses_another_shape_and_the_deletion_of_its_own_checkpoint(data, tmp_path):
    run_train(data, tmp_path, max_iters=1)
    start = ["--init-from", tmp_path / "best.pt", "--data-dir", data]
    before = files(tmp_path)
    assert "--n-layer 2 contradicts" in command([*start, "--n-layer", 2, "--out-dir", tmp_path / "b"], expect=1)
    assert "contradicts" in command([*start, "--preset", "demo", "--out-dir", tmp_path / "c"], expect=1)
    assert "--overwrite would delete" in command([*start, "--overwrite", "--out-dir", tmp_path], expect=1)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert not list(tmp_path.glob("*/*.pt"))


def test_fine_tuning_on_a_corpus_with_another_tokenizer_prints_two_commands_that_mend_it(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_train(data, tmp_path / "my run", max_iters=1)
    words = "cats dogs birds sat ran flew here there now then".split()
    Path("my tales.txt").write_text("<|endoftext|>".join(f"{a} {b} {c}." for a in words for b in words for c in words))
    prepare = ["prepare-dataset", "--dataset", "my tales.txt", "--vocab-size", "300", "--data-dir", "my data"]
    assert CliRunner().invoke(preprocess.main, prepare).exit_code == 0
    start = ["--init-from", "my run/best.pt", "--data-dir", "my data", "--out-dir", "tuned", "--max-iters", 1,
             "--tokens-per-iter", 64, "--batch-size", 2, "--eval-tokens", 400, "--device", "cpu"]
    output = command(start, expect=1)
    for script, main in (("export.py", export.main), ("preprocess.py", preprocess.main)):
        result = CliRunner().invoke(main, printed_command(output, script))
        assert result.exit_code == 0, result.output
    command(start)


# -----------------------------------------------------------------------------
# A teacher

@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A checkpoint of another size, another kind of positions and a longer context than SMALL."""
    out = tmp_path_factory.mktemp("teacher")
    run_train(data, out, max_iters=6, n_layer=2, n_embd=24, position="rotary", block_size=48, tokens_per_iter=96)
    return out / "best.pt"


def test_a_teacher_changes_what_is_learned_and_the_loss_in_the_log_stays_that_of_the_text(data, tmp_path, teacher):
    alone, taught = tmp_path / "alone", tmp_path / "taught"
    for out, settings in ((alone, {}), (taught, dict(teacher=teacher))):
        run_train(data, out, log_interval=1, dropout=0, **settings)
    losses = [[row["train_loss"] for row in training_lines(out)] for out in (alone, taught)]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5), "of the same weights, on the same text"
    assert not same(saved(alone)["model"], saved(taught)["model"])


def test_the_closer_the_teacher_is_followed_the_closer_the_student_is_to_it(data, tmp_path, teacher, corpus):
    ids = torch.tensor(corpus.val.read(0, 33), dtype=torch.long)[None]
    expected, distances = load_checkpoint(teacher)[0](ids[:, :32]).softmax(-1), []
    for weight in (0.01, 1):
        out = tmp_path / str(weight)
        run_train(data, out, teacher=teacher, teacher_weight=weight, max_iters=80, eval_interval=80, dropout=0)
        student = load_checkpoint(out / "ckpt.pt")[0](ids[:, :32]).log_softmax(-1)
        distances.append(torch.nn.functional.kl_div(student, expected, reduction="sum"))
    assert distances[1] < 0.5 * distances[0]


def test_stopped_and_resumed_with_a_teacher_equals_never_stopped_bit_for_bit(data, tmp_path, monkeypatch, teacher):
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved.pt"
    run_train(data, whole, teacher=teacher)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        run_train(data, parts, teacher=teacher, expect=130)
    shutil.copy(teacher, moved)  # its contents matter, not its name
    resume(parts, "--teacher", moved)
    assert same_run(whole, parts, "teacher")
    assert saved(parts)["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()


def test_four_micro_batches_of_one_with_a_teacher_are_one_of_four(data, tmp_path, monkeypatch, teacher):
    (one, log), (four, same_log) = (gradients(data, tmp_path / str(size), monkeypatch, batch_size=size, teacher=teacher)
                                    for size in (4, 1))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(one, four, strict=True))
    assert [row["train_loss"] for row in log] == pytest.approx([row["train_loss"] for row in same_log], rel=1e-5)


def test_a_plan_and_fine_tuning_work_with_a_teacher_too(data, tmp_path, teacher):
    output = run_train(data, tmp_path / "plan", teacher=teacher, plan=True)
    assert f"Teacher: {teacher}" in output and "Measured: " in output
    start = tmp_path / "start" / "best.pt"
    run_train(data, start.parent, max_iters=2)
    tuned = dict.fromkeys(("n_layer", "n_head", "n_embd", "intermediate_size", "block_size"))
    run_train(data, tmp_path / "tuned", teacher=teacher, init_from=start, max_iters=2, **tuned)
    assert saved(tmp_path / "tuned")["train_config"]["teacher"] == str(teacher)


def test_a_resume_asks_for_the_same_teacher(data, tmp_path, teacher):
    taught, alone, other = tmp_path / "taught", tmp_path / "alone", tmp_path / "alone" / "best.pt"
    run_train(data, taught, teacher=teacher, max_iters=2)
    run_train(data, alone, max_iters=2)
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    for out, path, message in ((taught, other, f"the SHA-256 {digest}: pass that one"),
                               (alone, teacher, "has none: omit it"),
                               (taught, tmp_path / "gone.pt", "gone.pt does not exist: pass its path with --teacher")):
        before = files(out)
        assert message in resume(out, "--max-iters", 4, "--teacher", path, expect=1)
        assert files(out) == before


def test_a_teacher_that_cannot_read_the_text_is_refused(data, tmp_path, teacher):
    assert "reads at most 48 tokens: use --block-size 48 or another" in run_train(
        data, tmp_path / "out", teacher=teacher, block_size=64, expect=1)
    model, checkpoint = load_checkpoint(teacher)
    other = tmp_path / "other.pt"
    save_checkpoint(other, model, checkpoint["tokenizer"] + b"another")
    output = run_train(data, tmp_path / "out", teacher=other, expect=1)
    assert f"{other} has another tokenizer than the corpus" in output and "export.py --format tokenizer" in output
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_flags_of_a_teacher_are_refused_where_they_have_no_effect_or_would_delete_it(data, tmp_path):
    assert "--teacher-weight has no effect without --teacher" in run_train(data, tmp_path / "out", teacher_weight=0.3,
                                                                           expect=1)
    out = tmp_path / "first"
    run_train(data, out, max_iters=2)
    before = files(out)
    assert "--overwrite would delete" in run_train(data, out, teacher=out / "best.pt", overwrite=True, expect=1)
    assert files(out) == before


# -----------------------------------------------------------------------------
# What is refused, and what is printed

@pytest.mark.parametrize("words, message", [
    (["--n-layer", "2"], "--n-layer 2 contradicts .* which has 1"),
    (["--dropout", "0.3"], "--dropout 0.3 contradicts .* which has 0.2"),
    (["--seed", "1"], "--seed 1 contradicts .* which has 1337"),
    (["--muon-learning-rate", "0.1"], "--muon-learning-rate 0.1 contradicts .* which has 0.02"),
    (["--align-stories"], "--align-stories True contradicts .* which has False"),
    (["--preset", "demo"], "--preset demo contradicts .* which has rtx3050"),
    (["--max-iters", "2"], "finished its 2 iterations.*chat.py --out-dir .*larger --max-iters"),
    (["--batch-size", "3", "--max-iters", "4"], "use --batch-size 2 or --tokens-per-iter 96"),
])
def test_a_resume_refuses_what_contradicts_the_run_and_changes_no_file(data, tmp_path, words, message):
    run_train(data, tmp_path, max_iters=2)
    before = files(tmp_path)
    assert re.search(message, resume(tmp_path, *words, expect=1))
    assert before == files(tmp_path)


def test_a_resume_refuses_to_change_anything_else_that_decides_what_is_learned(data, tmp_path):
    run_train(data, tmp_path, max_iters=2)
    for words in ("--tokens-per-iter 256", "--optimizer adamw", "--embedding-learning-rate 0.5", "--schedule cosine",
                  "--min-lr-ratio 0.5", "--warmup-iters 1", "--decay-fraction 0.5", "--weight-decay 0.2", "--beta1 0.8",
                  "--beta2 0.8", "--grad-clip 2", "--position rotary", "--bias", "--qk-norm"):
        output = resume(tmp_path, *words.split(), "--max-iters", 4, expect=1)
        assert f"{words.split()[0]} " in output and "contradicts" in output


def prepared_again(data, folder, change=None):
    """A copy of the corpus; `change` edits the bytes of its training shard."""
    shutil.copytree(data, folder)
    if change:
        path, meta = folder / "train_000.bin", json.loads((folder / "meta.json").read_text())
        path.write_bytes(change(path.read_bytes()))
        meta["train"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_resume_needs_the_same_corpus_in_whatever_folder(data, tmp_path):
    run_train(prepared_again(data, tmp_path / "a"), tmp_path / "out", max_iters=2)
    (tmp_path / "a").rename(tmp_path / "b")
    more = ["--max-iters", 4]
    assert f"the corpus in {tmp_path / 'a'} does not exist" in resume(tmp_path / "out", *more, expect=1)
    other = prepared_again(data, tmp_path / "other", lambda ids: ids[2:] + ids[:2])
    output = resume(tmp_path / "out", "--data-dir", other, *more, expect=1)
    assert f"trained on another corpus than that in {other}" in output
    resume(tmp_path / "out", "--data-dir", tmp_path / "b", *more)
    resume(tmp_path / "out", "--max-iters", 6)  # the new folder was recorded


@pytest.mark.parametrize("lost, named", [(["optimizer", "scaler", "rng", "cuda_rng"], "optimizer, rng, scaler"),
                                         (["state", "corpus"], "corpus, state")])
def test_a_checkpoint_for_chatting_or_of_an_earlier_version_is_not_resumed_but_can_be_fine_tuned(data, tmp_path, lost,
                                                                                                 named):
    out = tmp_path / "my run"
    run_train(data, out, max_iters=2)
    if len(lost) == 4:
        shutil.copy(out / "best.pt", out / "ckpt.pt")
    else:
        torch.save({name: value for name, value in saved(out).items() if name not in lost}, out / "ckpt.pt")
    before = files(out)
    output = resume(out, "--max-iters", 4, expect=1)
    assert f"cannot resume from {out / 'ckpt.pt'}" in output and named in output and before == files(out)
    assert printed_command(output)[:2] == (start := ["--init-from", str(out / "ckpt.pt")])
    command([*start, *arguments(data, tmp_path / "tuned", max_iters=1)])


def test_a_folder_with_a_run_is_kept_unless_told_and_the_same_command_twice_harms_nothing(data, tmp_path):
    run_train(data, tmp_path, max_iters=2)
    before = files(tmp_path)
    assert re.search("--resume continues it, --overwrite replaces it", run_train(data, tmp_path, expect=1))
    (tmp_path / "ckpt.pt").rename(tmp_path / "kept.pt")
    assert "already contains a run" in run_train(data, tmp_path, expect=1), "best.pt alone is a run too"
    (tmp_path / "kept.pt").rename(tmp_path / "ckpt.pt")
    for words in (["--resume", "--overwrite"], ["--resume", "--init-from", tmp_path / "best.pt"]):
        assert "omit --overwrite and --init-from" in command([*words, "--out-dir", tmp_path], expect=2)
    assert before == files(tmp_path)


def test_overwriting_removes_all_of_the_run_before(data, tmp_path, monkeypatch):
    run_train(data, tmp_path, max_iters=6)
    stop_at(monkeypatch, 1)
    run_train(data, tmp_path, overwrite=True, expect=130)
    assert not list(tmp_path.glob("*.pt")) and [row["iter"] for row in metrics(tmp_path)] == [0]
    run_train(data, tmp_path)


def test_overwriting_removes_nothing_when_the_new_run_cannot_start(data, tmp_path, corpus):
    run_train(data, tmp_path, max_iters=2)
    before = files(tmp_path)
    settings = dict(block_size=2**16, tokens_per_iter=2**16, batch_size=1, overwrite=True)
    assert len(corpus.train) <= 2**16 and "prepare more text" in run_train(data, tmp_path, expect=1, **settings)
    assert files(tmp_path) == before


def test_a_finished_run_that_gets_more_iterations_says_that_its_learning_rate_rises_again(data, tmp_path):
    assert "rises" not in run_train(data, tmp_path)
    output = resume(tmp_path, "--max-iters", 24)
    now = re.search(r"learning rate rises again, to (\S+),", output)[1]
    assert float(now) == pytest.approx(max(row["lr"] for row in training_lines(tmp_path)), rel=0.05)
    assert "rises" not in resume(tmp_path, "--max-iters", 25)


def test_a_folder_in_use_is_refused_and_free_again_after_a_run(data, tmp_path):
    with folder_lock(tmp_path):
        assert f"{tmp_path} is in use by another process" in run_train(data, tmp_path, expect=1)
        assert list(files(tmp_path)) == ["lock"]
    run_train(data, tmp_path, max_iters=1)
    with folder_lock(tmp_path):
        assert "in use" in resume(tmp_path, "--max-iters", 2, expect=1)


def test_what_is_missing_names_the_command_to_type(data, tmp_path):
    output = resume(tmp_path / "no run", expect=1)
    assert printed_command(output) == ["--out-dir", str(tmp_path / "no run")]
    output = run_train(tmp_path / "no data", tmp_path / "out", expect=1)
    assert printed_command(output, "preprocess.py") == ["prepare-dataset", "--data-dir", str(tmp_path / "no data")]
    assert "best.pt does not exist" in run_train(data, tmp_path / "out", init_from=tmp_path / "best.pt", expect=1)


def test_the_vocabulary_comes_from_the_corpus_and_a_flag_that_contradicts_it_is_refused(data, tmp_path):
    assert "--vocab-size 4096 contradicts the prepared corpus" in run_train(data, tmp_path, vocab_size=4096, expect=1)
    run_train(data, tmp_path, vocab_size=512, max_iters=1)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["vocab_size"] == 512


def test_accumulation_must_be_a_whole_number_and_the_error_names_values_that_work(monkeypatch):
    config = TrainConfig(tokens_per_iter=65536)
    assert train.grad_accum_steps(config, 256, 32) == 8
    for batch_size, size, tokens in ((24, 16, 61440), (300, 256, 76800)):
        with pytest.raises(UserError, match=f"use --batch-size {size} or --tokens-per-iter {tokens}$"):
            train.grad_accum_steps(config, 256, batch_size)
        train.grad_accum_steps(config, 256, size)
        train.grad_accum_steps(replace(config, tokens_per_iter=tokens), 256, batch_size)
    with pytest.raises(UserError, match="use --tokens-per-iter 5120$"):
        train.grad_accum_steps(replace(config, tokens_per_iter=5000), 160, 32)
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    assert train.grad_accum_steps(config, 256, 32) == 4
    with pytest.raises(UserError, match="on each of 2 GPUs.*use --batch-size 128 or --tokens-per-iter 131072$"):
        train.grad_accum_steps(config, 256, 256)


def test_a_finished_run_names_the_next_commands_also_if_it_was_told_to_stop_at_its_last_iteration(data, tmp_path,
                                                                                                  monkeypatch):
    stop_at(monkeypatch, 2)
    output = run_train(data, tmp_path / "my run", max_iters=2)
    assert "Finished: best validation loss" in output and "--resume" not in output
    for script in ("chat.py", "plot_loss.py"):
        assert printed_command(output, script) == ["--out-dir", str(tmp_path / "my run")]
    assert printed_command(resume(tmp_path / "my run", expect=1), "chat.py") == ["--out-dir", str(tmp_path / "my run")]


@on_linux
def test_a_full_disk_while_logging_ends_the_run_which_can_be_resumed(data, tmp_path, monkeypatch):
    out = tmp_path / "my run"

    def fill_disk(optimizer, n):
        if n == 7:
            (out / "metrics.jsonl").unlink()
            (out / "metrics.jsonl").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        at_each_step(patch, fill_disk)
        output = run_train(data, out, expect=1)
    assert "No space left on device. Fix this and rerun." in output
    (out / "metrics.jsonl").unlink()
    resume(out)
    assert saved(out)["state"]["iter"] == 12


def test_metrics_that_another_program_has_open_for_a_while_lose_no_line_and_end_no_run(data, tmp_path, monkeypatch):
    """As on Windows, where Excel or a program that synchronises the folder keeps others from writing."""
    real, refusals = open, iter(range(2))

    def in_use(path, mode="r", *args, **kwargs):
        if str(path).endswith("metrics.jsonl") and mode == "a" and next(refusals, None) is not None:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)
    monkeypatch.setattr(train, "open", in_use, raising=False)
    run_train(data, tmp_path)
    assert next(refusals, None) is None
    assert [row["iter"] for row in metrics(tmp_path)] == [0, 3, 5, 6, 9, 10, 12, 12]


def test_more_than_twenty_epochs_are_warned_of_with_a_number_of_iterations_that_is_not(data, tmp_path):
    output = run_train(data, tmp_path, plan=True, max_iters=100_000)
    enough = re.search(r"Warning: beyond about 20 epochs .* --max-iters (\d+)$", output, re.MULTILINE)[1]
    tokens = int(enough) * SMALL["tokens_per_iter"]
    assert tokens == pytest.approx(20 * len(Corpus(data).train), rel=0.01)
    for iters, warned in ((int(enough) - 10, False), (int(enough) + 10, True)):
        assert ("Warning" in run_train(data, tmp_path, plan=True, max_iters=iters)) == warned


def test_for_a_short_text_smaller_iterations_are_suggested_rather_than_few(data, tmp_path):
    tokens = len(Corpus(data).train)
    output = run_train(data, tmp_path, plan=True, tokens_per_iter=tokens // 4 // 64 * 64, max_iters=120)
    assert f"or stop earlier: --tokens-per-iter 64 --max-iters {20 * tokens // 64}\n" in output


def test_a_cpu_beside_an_nvidia_driver_is_warned_of(data, tmp_path, monkeypatch):
    assert "Warning" not in run_train(data, tmp_path, plan=True)
    monkeypatch.setattr(train, "cuda_hint", lambda: "Get another PyTorch. ")
    assert "Warning: Get another PyTorch. Training continues on the CPU" in run_train(data, tmp_path, plan=True)


def test_a_plan_measures_a_few_iterations_and_writes_nothing(data, tmp_path, monkeypatch):
    seen, clock = [], Clock()
    monkeypatch.setattr(train, "time", clock)
    at_each_step(monkeypatch, lambda optimizer, n: seen.append(n) or setattr(clock, "now", clock.now + 1))
    output = run_train(data, tmp_path / "out", plan=True, max_iters=1_000_000)
    assert len(seen) == 3 and "Measured: 128 tokens/s, so 1,000,000 iterations take 12 days" in output
    assert "2 micro-batches of 2 x 32" in output and "128.00M tokens in total" in output
    line = (f"To compare: rtx3050, 1 CPU threads, torch {torch.__version__}, float32, not compiled, micro-batches of 2 x "
            "32: 128 tokens/s")
    assert output.splitlines()[-1] == line
    monkeypatch.setattr(train, "peak_memory_mib", lambda device: 1234)
    monkeypatch.setattr(train, "compile_model", lambda run, size: lambda *args: run.training_loss(*args))
    output = run_train(data, tmp_path / "out", plan=True)
    assert output.splitlines()[-1] == line.replace("not compiled", "compiled") + ", 1,234 MiB"
    assert not (tmp_path / "out").exists()
    run_train(data, tmp_path / "run", max_iters=5)
    before = files(tmp_path / "run")
    resume(tmp_path / "run", "--plan", "--max-iters", 50)
    run_train(data, tmp_path / "run", plan=True, overwrite=True)
    assert files(tmp_path / "run") == before


# -----------------------------------------------------------------------------
# Memory and compilation

def test_activation_checkpointing_is_on_when_asked_for_and_changes_nothing_that_is_learned(data, tmp_path, monkeypatch):
    calls, real = [], model_file.recompute
    monkeypatch.setattr(model_file, "recompute", lambda *args, **how: calls.append(1) or real(*args, **how))
    run_train(data, tmp_path / "plain")
    assert not calls
    run_train(data, tmp_path / "recomputed", activation_checkpointing=True)
    assert len(calls) == 2 * 12 and same_run(tmp_path / "plain", tmp_path / "recomputed", "activation_checkpointing")


@pytest.mark.parametrize("cuda, triton, compile, max_iters, compiled", [
    (True, True, "auto", 500, True), (True, True, "auto", 499, False), (True, True, "off", 500, False),
    (True, True, "on", 1, True), (True, False, "auto", 500, False), (False, True, "auto", 500, False),
    (False, False, "on", 1, True)])
def test_whether_to_compile_depends_on_the_settings_and_what_is_installed_alone(monkeypatch, cuda, triton, compile,
                                                                                max_iters, compiled):
    monkeypatch.setattr(torch, "compile", lambda function: SimpleNamespace(compiled=function))
    monkeypatch.setattr(train, "try_iteration", lambda *_: 0)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object() if triton else None)
    for it in (0, 1, max_iters):
        run = SimpleNamespace(training_loss=TrainingLoss(GPT(TINY)),
                              config=TrainConfig(compile=compile, max_iters=max_iters),
                              device=torch.device("cuda" if cuda else "cpu"), optimizer=SimpleNamespace(update=None),
                              state=train.TrainState(iter=it))
        loss = train.compile_model(run, 2)
        assert (loss.compiled is run.training_loss and run.optimizer.update.compiled is train.muon_update) if compiled \
            else (loss is run.training_loss and run.optimizer.update is None)


def test_the_compiled_functions_are_those_that_train_and_trying_them_changes_nothing(data, tmp_path, monkeypatch):
    compiled = []
    run_train(data, tmp_path / "eager")

    def compile(function):
        counted = MagicMock(wraps=function)
        compiled.append(counted)
        return counted
    monkeypatch.setattr(torch, "compile", compile)
    run_train(data, tmp_path / "compiled", compile="on")
    assert [counted.call_count for counted in compiled] == [1 + 2 * 12, 3 * (1 + 12)]  # three shapes of matrices
    assert same_run(tmp_path / "eager", tmp_path / "compiled", "compile")


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_where_compiling_fails_training_falls_back_with_one_line(data, tmp_path, monkeypatch, when):
    def no_triton(*args):
        raise RuntimeError("Cannot find a working triton installation\nand more")
    run_train(data, tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", no_triton if when == "compiling" else lambda function: no_triton)
    output = run_train(data, tmp_path / "failed", compile="on")
    lines = [line for line in output.splitlines() if "torch.compile" in line]
    assert len(lines) == 1 and "(Cannot find a working triton installation): training falls back" in lines[0]
    assert "and more" not in output and same_run(tmp_path / "eager", tmp_path / "failed", "compile")


def test_an_error_of_the_disk_or_of_ours_is_not_blamed_on_the_compiler(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    real = TrainLoader.batches

    def batches(loader, *args):
        yield next(real(loader, *args))
        raise OSError(5, "Input/output error", "train_000.bin")
    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "batches", batches)
        output = run_train(data, tmp_path, compile="on", expect=1)
    assert "torch.compile" not in output and "train_000.bin: Input/output error" in output
    at_each_loss(monkeypatch, lambda loss, n: 1 / 0 if n == 3 else loss)
    result = CliRunner().invoke(train.main, arguments(data, tmp_path, compile="on"))
    assert isinstance(result.exception, ZeroDivisionError) and "torch.compile" not in result.output


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("place", ["forward", "step", "estimate_loss", "sample_story"])
def test_running_out_of_memory_keeps_the_checkpoint_and_ends_with_a_command_that_resumes(data, tmp_path, monkeypatch,
                                                                                        place):
    out, before = tmp_path / "my run", {}

    def at_iteration_8(optimizer, n):
        if n == 8:
            before.update(files(out))
            if place == "step":
                out_of_memory()
            elif place != "forward":
                patch.setattr(train, place, out_of_memory)
    with monkeypatch.context() as patch:
        at_each_step(patch, at_iteration_8)
        if place == "forward":
            at_each_loss(patch, lambda loss, n: before.update(files(out)) or out_of_memory() if n == 8 else loss)
        output = run_train(data, out, expect=1)
    assert "out of memory with micro-batches of 2 x 32 tokens. Add --batch-size 1 to the command" in output
    assert {name: (out / name).read_bytes() for name in ("ckpt.pt", "best.pt")}.items() <= before.items()
    words = printed_command(output)
    assert words == ["--resume", "--batch-size", "1", "--out-dir", str(out)]
    command(words)
    assert [row["iter"] for row in metrics(out)] == [0, 3, 5, 6, 9, 10, 12, 12]


@pytest.mark.parametrize("settings, advice", [
    (dict(batch_size=4), "--batch-size 2"), (dict(batch_size=1), "--activation-checkpointing"),
    (dict(batch_size="auto"), "--batch-size 2"), (dict(compile="on"), "--batch-size 1")])
def test_running_out_of_memory_at_the_start_advises_the_next_smaller_batch_or_recomputing(data, tmp_path, monkeypatch,
                                                                                         settings, advice):
    with monkeypatch.context() as patch:
        at_each_step(patch, out_of_memory)
        patch.setattr(torch, "compile", lambda function: out_of_memory)
        output = run_train(data, tmp_path, expect=1, **settings)
    assert f"Add {advice} to the command" in output and "--resume" not in output and "torch.compile" not in output
    command([*arguments(data, tmp_path, **settings), *advice.split(), "--compile", "off"])


class FakeGPU:
    """The figures of torch.cuda for one device out of two, and the memory that a micro-batch needs there."""

    def __init__(self, monkeypatch, free, total=8000, fraction=1.0, reserved=0, fixed=100, per_sequence=100):
        self.tried, self.device = [], torch.device("cuda:1")
        self.fixed, self.per_sequence = fixed, per_sequence
        for name, value in dict(mem_get_info=(free, total), get_per_process_memory_fraction=fraction,
                                memory_reserved=reserved, memory_allocated=fixed).items():
            monkeypatch.setattr(torch.cuda, name, self.figure(value))
        monkeypatch.setattr(train, "try_iteration", self.forward_backward)

    def figure(self, value):
        def of_device(device):
            assert device == self.device, "the figures of another GPU"
            return value
        return of_device

    def forward_backward(self, loss, batch_size, run):
        assert loss is run.training_loss, "that of the model alone leaves out a teacher"
        self.tried.append(batch_size)
        if self.fixed + self.per_sequence * batch_size > 8000:
            out_of_memory()
        return self.fixed + self.per_sequence * batch_size

    def find(self):
        model = SimpleNamespace(config=SimpleNamespace(block_size=32))
        return train.find_batch_size(SimpleNamespace(config=TrainConfig(tokens_per_iter=32 * 96), device=self.device,
                                                     model=model, training_loss=object()))


@pytest.mark.parametrize("figures, size", [
    (dict(free=8000), 48),                  # 4,900 of at most 7,200; 96 would need 9,700
    (dict(free=5000), 32),                  # 48 sequences would need 4,900 of at most 4,500
    (dict(free=3000, reserved=2000), 32),   # what this process has cached is free for it
    (dict(free=8000, fraction=0.5), 32),    # a limit that the user set
    (dict(free=8000, fixed=2400), 48),      # weights and the state of the optimizer: 7,200
    (dict(free=8000, fixed=2500), 32),
    (dict(free=50), 1)])  # nothing fits: the smallest, and advice if it does not
def test_batch_size_auto_is_tried_upwards_and_stays_below_nine_tenths_of_the_memory(monkeypatch, figures, size):
    gpu = FakeGPU(monkeypatch, **figures)
    assert gpu.find() == size
    assert gpu.tried == [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if n <= size]


def test_batch_size_auto_stops_below_the_size_that_ran_out_of_memory_or_needed_more_than_foreseen(monkeypatch):
    gpu = FakeGPU(monkeypatch, free=8000)
    real = gpu.forward_backward
    monkeypatch.setattr(train, "try_iteration", lambda forward, size, run:
                        out_of_memory() if size > 12 else real(forward, size, run))
    assert gpu.find() == 12
    monkeypatch.setattr(train, "try_iteration", lambda forward, size, run:
                        7900 if size > 6 else real(forward, size, run))
    assert gpu.find() == 6


def test_batch_size_auto_is_at_most_32_on_a_cpu():
    model = SimpleNamespace(config=SimpleNamespace(block_size=32))
    for sequences, size in ((96, 32), (100, 25), (12, 12)):
        run = SimpleNamespace(config=TrainConfig(tokens_per_iter=32 * sequences), device=CPU, model=model)
        assert train.find_batch_size(run) == size


def test_batch_size_auto_changes_nothing_that_is_learned(data, tmp_path):
    assert "micro-batches of 4 fit" in run_train(data, tmp_path / "auto", batch_size="auto")
    run_train(data, tmp_path / "given", batch_size=4)
    assert same_run(tmp_path / "auto", tmp_path / "given", "batch_size")


def opened(data, tmp_path, *, preset=None, path=None, resumed=False, **settings):
    given = dict(SMALL, data_dir=str(data), out_dir=str(tmp_path)) | settings
    return train.open_run(preset, path, resumed, {} if resumed else given)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trying_an_iteration_changes_nothing(data, tmp_path, optimizer):
    run = opened(data, tmp_path, optimizer=optimizer, dropout=0.5)
    before = torch.get_rng_state(), [p.detach().clone() for p in run.model.parameters()]
    assert train.try_iteration(run.training_loss, 2, run) == 0
    assert same(before, (torch.get_rng_state(), [p.detach() for p in run.model.parameters()]))
    assert all(p.grad is None for p in run.model.parameters())
    moments = [tensor for state in run.optimizer.state.values() for tensor in state.values()]
    assert sum(tensor.numel() for tensor in moments) >= run.model.count_parameters(), "they are part of the peak"
    assert not any(tensor.any() for tensor in moments)


# -----------------------------------------------------------------------------
# Several processes

def test_dropout_differs_between_processes_and_between_the_parts_of_a_run(data, tmp_path, monkeypatch):
    run_train(data, tmp_path, max_iters=2)
    states, weights = [], []
    for rank in (0, 1, 2):
        monkeypatch.setattr(train, "RANK", rank)
        for resumed in (False, True):
            run = opened(data, tmp_path, path=tmp_path / "ckpt.pt" if resumed else None, resumed=resumed)
            states.append(torch.get_rng_state())
            weights.append(weights_of(run.optimizer))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(states, 2))
    assert torch.equal(states[1], saved(tmp_path)["rng"])
    assert same(weights[0], weights[2]) and same(weights[0], weights[4]), "the weights are the same in all"
    assert same(weights[1], weights[3]) and not same(weights[0], weights_of(opened(data, tmp_path, seed=5).optimizer))


@pytest.mark.parametrize("name, cuda, device, backend", [("auto", True, "cuda:1", "nccl"), ("cpu", True, "cpu", "gloo"),
                                                         ("auto", False, "cpu", "gloo")])
def test_each_process_takes_the_gpu_of_its_number_on_its_own_computer(monkeypatch, name, cuda, device, backend):
    joined = []
    for variable, value in (("RANK", 3), ("LOCAL_RANK", 1), ("WORLD_SIZE", 4)):
        monkeypatch.setattr(train, variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(train, "choose_device", torch.device)
    monkeypatch.setattr(train.dist, "init_process_group", joined.append)
    assert train.init_distributed(name) == device and joined == [backend]


def test_the_first_process_alone_writes_and_prints(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RANK", 1)
    run = opened(data, tmp_path / "out", log_interval=1)
    train.describe(run)
    train.train(run, 2, SimpleNamespace(signal=0))
    assert run.state.iter == 12 and not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def processes_of(script):
    """{rank, None for torchrun itself: process id} of those whose command line names the script."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.fsencode(script) in (folder / "cmdline").read_bytes().split(b"\0"):
                environment = (folder / "environ").read_bytes().split(b"\0")
                rank = next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)
                found[rank] = int(folder.name)
    return found


THREE_RUNS = """
import os, runpy, sys, time, torch
root, folder, *ports = sys.argv[1:6]
rank, out = int(os.environ["RANK"]), f"{folder}/two"
sys.path.insert(0, root)

def run(number, *words):
    # torchrun's own store serves one run; each of ours has a port where they meet once both have ended the last one.
    open(f"{folder}/{number}.{rank}", "w")
    while not os.path.exists(f"{folder}/{number}.{1 - rank}"):
        time.sleep(0.01)
    os.environ.update(MASTER_PORT=ports[number], TORCHELASTIC_USE_AGENT_STORE="False")
    sys.argv = ["train.py", *words]
    try:
        runpy.run_path(f"{root}/train.py", run_name="__main__")
    except SystemExit as end:
        print(f"exit code {end.code}, process group left: {torch.distributed.is_initialized()}", flush=True)

def broken(*args):
    raise ZeroDivisionError("rank 1 is broken")

run(0, *sys.argv[6:], "--max-iters", "1000000")
run(1, "--resume", "--out-dir", out, "--max-iters", "30")
if rank == 1:
    torch.optim.AdamW.step = broken
run(2, "--resume", "--out-dir", out, "--max-iters", "1000000")
"""


@on_linux
def test_two_processes_learn_what_one_learns_stop_at_a_signal_to_any_resume_and_end_together(data, tmp_path, teacher):
    out, one, script, output = (tmp_path / name for name in ("two", "one", "runs.py", "output.txt"))
    settings = dict(tokens_per_iter=256, dropout=0, warmup_iters=0, decay_fraction=0, log_interval=1, sample_tokens=0,
                    eval_interval=8, teacher=teacher)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [str(server.getsockname()[1]) for server in servers]
    script.write_text(THREE_RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, ROOT,
               tmp_path, *ports, *arguments(data, out, **settings, max_iters=None)]
    with open(output, "w") as file:
        parent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: last_iteration(out) >= 10 or parent.poll() is not None, 60, "progress")
        processes = processes_of(script)
        assert {0, 1} <= set(processes), output.read_text()
        os.kill(processes[1], signal.SIGTERM)
        assert parent.wait(90) == 1, "torchrun reports the broken process"
        wait_until(lambda: not processes_of(script), 10, "end of all processes")
    finally:
        for process in [*processes_of(script).values(), parent.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    printed = output.read_text()
    assert printed.count("exit code 143, process group left: False") == 2, printed
    assert printed.count("exit code 0, process group left: False") == 2 and "rank 1 is broken" in printed, printed
    stopped, = map(int, re.findall(r"Stopped and saved at iteration (\d+)\. Resume with", printed))
    assert 10 <= stopped < 30 and saved(out)["state"]["iter"] == 30, "nothing was saved after the error"

    run_train(data, one, max_iters=30, **settings)
    keys = ("iter", "tokens", "train_loss", "val_loss", "val_bpb", "full_val_loss", "lr")
    a, b = ([{key: row[key] for key in keys if key in row} for row in metrics(folder) if row["iter"] <= 30]
            for folder in (one, out))
    assert a == [pytest.approx(row, rel=1e-6) for row in b] and len(a) == 35
    resume(out, "--max-iters", 33)
    assert last_iteration(out) == 33, "one process continues where two stopped"


# -----------------------------------------------------------------------------
# On a GPU

@on_gpu
def test_on_cuda_a_float16_run_scales_its_loss_learns_and_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    settings = dict(device="cuda", max_iters=60, compile="off")
    output = run_train(data, tmp_path / "whole", **settings)
    assert "float16 with a GradScaler" in output
    rows = training_lines(tmp_path / "whole")
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert rows[-1]["loss_scale"] > 1 and rows[-1]["peak_memory_mib"] > 0
    stop_at(monkeypatch, 31)
    run_train(data, tmp_path / "parts", expect=130, **settings)
    resume(tmp_path / "parts")
    assert saved(tmp_path / "parts")["cuda_rng"] is not None and saved(tmp_path / "parts")["scaler"]["scale"] > 1
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@on_gpu
def test_on_cuda_the_random_state_of_dropout_is_saved_and_restored(data, tmp_path, monkeypatch):
    run_train(data, tmp_path, device="cuda", dropout=0.5, compile="off", max_iters=3)
    run = opened(data, tmp_path, path=tmp_path / "ckpt.pt", resumed=True)
    assert torch.equal(torch.cuda.get_rng_state(run.device), saved(tmp_path)["cuda_rng"])
    torch.cuda.manual_seed(run.config.seed)
    assert not torch.equal(torch.cuda.get_rng_state(run.device), saved(tmp_path)["cuda_rng"])


@on_gpu
def test_on_cuda_a_loss_scale_that_overflows_is_halved_until_it_fits_and_the_skipped_updates_are_counted(data, tmp_path,
                                                                                                        monkeypatch):
    weights = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: GradScaler("cuda", init_scale=2.0**30))
    at_each_step(monkeypatch, lambda optimizer, n: weights.append(weights_of(optimizer)))
    run_train(data, tmp_path, device="cuda", compile="off", log_interval=1, max_iters=25)
    rows = training_lines(tmp_path)
    skips = [b - a for a, b in itertools.pairwise([0, *(row["skipped"] for row in rows)])]
    assert skips[0] == 1 and sum(skips) < 20 and [row["grad_norm"] is None for row in rows] == [n == 1 for n in skips]
    assert rows[-1]["loss_scale"] == 2.0 ** (30 - sum(skips))
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [n == 1 for n in skips[:-1]]


@on_gpu
@pytest.mark.parametrize("scale", [1e-7, 1e6])  # float16 would hold neither
def test_on_cuda_muon_takes_gradients_of_any_size(scale):
    changes = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        optimizer = configure_optimizer(GPT(TINY).to(device), TrainConfig())
        optimizer.found_inf, before = torch.zeros((), device=device), weights_of(optimizer)
        generator = torch.Generator().manual_seed(1)
        for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(device)
        optimizer.step()
        changes.append([(b - a).cpu() for a, b in zip(before, weights_of(optimizer), strict=True)])
    assert all((a - b).norm() < 0.05 * a.norm() for a, b in zip(*changes, strict=True))


@on_gpu
def test_on_cuda_the_memory_in_the_log_is_that_of_the_run_alone(data, tmp_path):
    torch.empty(2**30, dtype=torch.uint8, device="cuda")  # free again at once
    run_train(data, tmp_path, device="cuda", compile="off", max_iters=3)
    assert 0 < training_lines(tmp_path)[-1]["peak_memory_mib"] < 1024


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_cuda_what_is_compiled_learns_what_is_not(data, tmp_path, dtype):
    pytest.importorskip("triton")
    settings = dict(device="cuda", dtype=dtype, dropout=0, max_iters=10, log_interval=1)
    assert "does not work" not in run_train(data, tmp_path / "compiled", compile="on", **settings)
    run_train(data, tmp_path / "eager", compile="off", **settings)
    one, two = ([row["train_loss"] for row in training_lines(tmp_path / name)] for name in ("compiled", "eager"))
    assert one == pytest.approx(two, rel=2e-3)


@on_gpu
def test_on_cuda_trying_an_iteration_counts_its_peak_and_keeps_the_random_state(data, tmp_path):
    run = opened(data, tmp_path, device="cuda", dropout=0.5)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(run.device)
    larger, smaller = (train.try_iteration(run.training_loss, size, run) for size in (64, 16))  # no peak remains
    peaks = [smaller, larger]
    assert same(before, (torch.get_rng_state(), torch.cuda.get_rng_state(run.device)))
    logits = 32 * 512 * 4  # bytes per sequence
    assert peaks[1] - peaks[0] > 48 * logits and peaks[0] > torch.cuda.memory_allocated(run.device) + 16 * logits
    assert torch.cuda.memory_allocated(run.device) > 8 * run.model.count_parameters()  # with the optimizer's state
    assert all(p.grad is None for p in run.model.parameters())


@on_gpu
def test_on_cuda_batch_size_auto_takes_what_a_limit_on_the_memory_allows(data, tmp_path):
    run = opened(data, tmp_path, device="cuda", tokens_per_iter=2**20)
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
        small = train.find_batch_size(run)
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert 1 <= small < train.find_batch_size(run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
