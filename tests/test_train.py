import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import preprocess
import train
from config import GPTConfig, TrainConfig, UserError
from model import GPT, IGNORE, build_model, read_checkpoint
from train import (LossNotFinite, Muon, RecordedPasses, TokenLoader, Validation, accumulation_steps, evaluate,
                   learning_rate_share, make_optimizer, make_scaler, orthogonalize, run_passes, train_step)

CPU = torch.device("cpu")
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--intermediate-size", "32", "--block-size", "32",
         "--tokens-per-iter", "128", "--batch-size", "2", "--max-iters", "12", "--eval-interval", "5", "--eval-tokens",
         "400", "--final-eval-tokens", "400", "--log-interval", "3", "--sample-tokens", "5", "--dropout", "0.2",
         "--device", "cpu"]
TINY = GPTConfig(block_size=8, vocab_size=260, n_layer=1, n_head=2, n_embd=16, intermediate_size=32)
LONGER = [*SMALL, "--max-iters", "200", "--log-interval", "20", "--eval-interval", "20"]
TRAIN = [sys.executable, str(ROOT / "train.py")]
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1")
TIMING = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def corpus(data):
    return preprocess.open_corpus(data)


def run_train(data, out, *flags, expect=0):
    result = CliRunner().invoke(train.main, [*SMALL, "--data-dir", str(data), "--out-dir", str(out), *map(str, flags)])
    assert result.exit_code == expect, result.output
    return result


def resume(data, out, *flags, expect=0):
    result = CliRunner().invoke(train.main, ["--resume", "--data-dir", str(data), "--out-dir", str(out), *flags])
    assert result.exit_code == expect, result.output
    return result


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training_lines(out):
    return [row for row in metrics(out) if "train_loss" in row]


def same(a, b):
    """Equal to the last bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Are two finished runs equal but for timing: weights, optimizer, random state, log?"""
    logs = [[{key: value for key, value in row.items() if key not in TIMING} for row in metrics(out)] for out in (a, b)]
    one, two = (read_checkpoint(out / "ckpt.pt") for out in (a, b))
    for contents in (one, two):
        contents["train_config"].pop("out_dir")
    return same(one, two) and logs[0] == logs[1]


# The optimizer

def test_orthogonalized_matrices_have_singular_values_near_one():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalize(x).flatten(1), (u @ v).flatten(1)).min() > 0.97


def muon_by_hand(weight, gradient, momentum, lr, decay):
    """One Muon step for one plain matrix, straight from its definition; returns the new weight and momentum."""
    momentum = 0.95 * momentum + 0.05 * gradient
    update = 0.05 * gradient + 0.95 * momentum
    tall = update.shape[0] > update.shape[1]
    update = orthogonalize((update.T if tall else update)[None])[0]
    scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
    return weight * (1 - lr * decay) - lr * scale * (update.T if tall else update), momentum


def test_batched_muon_equals_one_plain_matrix_after_the_other():
    generator = torch.Generator().manual_seed(3)
    shapes = [((24, 8), 3), ((8, 8), 1), ((24, 8), 2), ((8, 12), 1)]  # as c_attn, c_proj, c_fc, c_proj
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in shapes]
    pieces = [list(w.detach().clone().chunk(parts)) for w, (_, parts) in zip(weights, shapes, strict=True)]
    momenta = [[torch.zeros_like(piece) for piece in group] for group in pieces]
    optimizer = Muon([(w, parts) for w, (_, parts) in zip(weights, shapes, strict=True)], lr=0.1, weight_decay=0.3)
    for _ in range(3):
        for weight, group, past in zip(weights, pieces, momenta, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            for i, gradient in enumerate(weight.grad.chunk(len(group))):
                group[i], past[i] = muon_by_hand(group[i], gradient, past[i], 0.1, 0.3)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        for weight, group in zip(weights, pieces, strict=True):
            assert torch.allclose(weight, torch.cat(group), atol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    model = GPT(TINY)
    muon, adamw = make_optimizer(model, TrainConfig(optimizer="muon")).members
    held = {id(weight) for group in muon.param_groups for weight in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in held}
    assert names == {f"blocks.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    rest = {id(weight) for group in adamw.param_groups for weight in group["params"]}
    assert held | rest == {id(weight) for weight in model.parameters()} and not held & rest


def test_adamw_alone_decays_matrices_and_nothing_else():
    model = GPT(TINY)
    (adamw,) = make_optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.3)).members
    decay = {id(weight): group["weight_decay"] for group in adamw.param_groups for weight in group["params"]}
    assert all(decay[id(weight)] == (0.3 if weight.dim() == 2 else 0.0) for weight in model.parameters())


def test_the_learning_rate_warms_up_holds_and_decays_to_its_share():
    wsd = TrainConfig(max_iters=1000, warmup_iters=50, schedule="wsd", decay_share=0.4, min_lr_share=0.1)
    shares = [learning_rate_share(it, wsd) for it in range(1101)]
    assert shares[0] == pytest.approx(1 / 51) and shares[49] == pytest.approx(50 / 51)
    assert set(shares[50:601]) == {1.0} and shares[800] == pytest.approx(0.55)
    assert shares[1000:] == pytest.approx([0.1] * 101)
    cosine = replace(wsd, schedule="cosine", min_lr_share=0.0)
    assert learning_rate_share(50, cosine) == 1.0
    assert learning_rate_share(525, cosine) == pytest.approx(0.5)
    assert learning_rate_share(1000, cosine) == pytest.approx(0.0)


def test_a_short_run_warms_up_for_a_tenth_of_it():
    assert [learning_rate_share(it, TrainConfig(max_iters=20, warmup_iters=100)) for it in range(3)] \
        == pytest.approx([1 / 3, 2 / 3, 1.0])


# The data order

def stream_of(tokens, stories=(0,)):
    """A TokenStream over an array, story starts given."""
    tokens = np.asarray(tokens, dtype=np.uint16)

    class Stream:
        def __len__(self):
            return len(tokens)

        def read(self, start, stop):
            return tokens[start:stop]

        def windows(self, starts, length):
            return tokens[starts[:, None] + np.arange(length)]

        def story_starts(self):
            return np.array(stories)

    return Stream()


def test_an_epoch_predicts_every_token_once_from_the_one_before_it():
    loader = TokenLoader(stream_of(range(400)), 8, seed=1, align_stories=False)
    for epoch in range(3):
        rows = loader.windows(epoch * 50, 50)
        assert sorted(rows[:, 1:].flatten()) == list(range(400))
        assert np.array_equal(rows[:, 1:], (rows[:, :-1] + 1) % 400)


def test_each_epoch_has_a_phase_and_an_order_of_its_own_and_both_repeat():
    loaders = [TokenLoader(stream_of(range(400)), 8, seed=1, align_stories=False) for _ in range(2)]
    first, second = loaders[0].windows(0, 50), loaders[0].windows(50, 50)
    assert set(first[:, 0] % 8) != set(second[:, 0] % 8) and not np.array_equal(first, second)
    assert np.array_equal(second, loaders[1].windows(50, 50)), "without having read the first epoch"
    assert not np.array_equal(first, TokenLoader(stream_of(range(400)), 8, 2, False).windows(0, 50))


def test_the_batches_depend_only_on_how_many_windows_came_before():
    loader = TokenLoader(stream_of(range(1000)), 8, seed=1, align_stories=False)
    whole = loader.windows(0, 300)
    pieces = np.concatenate([loader.windows(at, 7) for at in range(0, 294, 7)])
    assert np.array_equal(whole[:294], pieces)
    fresh = TokenLoader(stream_of(range(1000)), 8, seed=1, align_stories=False)
    assert np.array_equal(fresh.windows(131, 9), whole[131:140])


def test_micro_batches_are_the_same_tokens_at_every_batch_size():
    loader = TokenLoader(stream_of(range(1000)), 8, seed=1, align_stories=False)
    whole = torch.cat([x for it in range(3) for x, _ in loader.micro_batches(it, 8, 1, CPU)])
    parts = torch.cat([x for it in range(3) for x, _ in loader.micro_batches(it, 2, 4, CPU)])
    assert torch.equal(whole, parts)
    x, y = next(loader.micro_batches(5, 4, 2, CPU))
    assert torch.equal((x + 1) % 1000, y) and x.shape == y.shape == (4, 8)


def test_aligned_windows_start_at_stories_and_go_on_through_long_ones():
    stories = [0, 5, 30]  # lengths 5, 25 and 10: the second needs three windows of 8 targets
    loader = TokenLoader(stream_of(range(40), stories), 8, seed=1, align_stories=True)
    assert sorted(loader.windows(0, loader.windows_per_epoch)[:, 0]) == [0, 5, 13, 21, 30, 38]


def test_a_corpus_shorter_than_a_window_says_what_to_do():
    with pytest.raises(UserError, match="8 training tokens, fewer than one window of 9.*--block-size"):
        TokenLoader(stream_of(range(8)), 8, seed=1, align_stories=False)


# Evaluation

@pytest.mark.parametrize("aligned", [False, True])
def test_validation_loss_is_the_plain_mean_at_any_batch_size(corpus, aligned):
    torch.manual_seed(0)
    model = GPT(replace(TINY, vocab_size=512, block_size=32, dropout=0.5)).train()
    validation = Validation(corpus, 32, 1000, aligned)
    results = [evaluate(model, validation, size, CPU, torch.float32) for size in (1, 7)]
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], rel=1e-6)
    assert model.training
    total, count, model = 0.0, 0, model.eval()
    for x, y in validation.batches(1):
        here = int((y != IGNORE).sum())
        logits = model(torch.from_numpy(x[:, :here])).double()[0]
        total += -logits.log_softmax(-1)[range(here), y[0, :here]].sum().item()
        count += here
    assert count == validation.predicted and results[0]["val_loss"] == pytest.approx(total / count, rel=1e-6)
    assert results[0]["val_bpb"] == pytest.approx(total / math.log(2) / validation.text_bytes, rel=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_validation_covers_whole_stories_from_the_start_each_token_once(corpus, aligned):
    validation = Validation(corpus, 32, 1000, aligned)
    stories = corpus.val.story_starts()
    end = stories[stories <= 1000][-1]
    text = corpus.val.read(0, end).tolist()
    predicted = [int(token) for _, y in validation.batches(3) for token in y[y != IGNORE]]
    expected = [token for token in text if token != corpus.tokenizer.bos_id] if aligned else text[1:]
    assert predicted == expected
    assert validation.text_bytes == sum(len(corpus.tokenizer.decode(text[a:b]).encode())
                                        for a, b in zip(stories, stories[1:], strict=False) if b <= end)


def test_the_floor_is_that_of_the_very_stories_evaluated(corpus):
    validation = Validation(corpus, 32, 1000, True)
    ids, stories = corpus.val.read(0, len(corpus.val)).tolist(), corpus.val.story_starts()
    stories = stories[stories <= 1000]
    nats = [preprocess.story_nats(corpus.tokenizer.decode(ids[a:b])) for a, b in zip(stories, stories[1:], strict=False)]
    assert validation.floor == pytest.approx(sum(nats) / (stories[-1] - len(nats)))
    whole = Validation(corpus, 32, 0, True)
    assert whole.floor == pytest.approx(corpus.meta["floor"]["nats_per_token"])


# One iteration

def gradients_after(batches, dtype=torch.float32, passes=run_passes, iterations=1):
    torch.manual_seed(0)
    model = GPT(TINY)
    caught = SimpleNamespace(param_groups=[dict(params=list(model.parameters()))], zero_grad=lambda: None,
                             step=lambda found_inf: None)
    for _ in range(iterations):
        model.zero_grad()
        losses, norm, skipped = train_step(model, model, iter(batches), len(batches), caught, make_scaler(CPU, dtype),
                                           TrainConfig(grad_clip=0.0), CPU, dtype, passes)()
    return [weight.grad for weight in model.parameters()], losses


def test_four_micro_batches_of_one_give_the_gradients_of_one_of_four():
    rows = torch.randint(260, (4, 9), generator=torch.Generator().manual_seed(0))
    whole, loss = gradients_after([(rows[:, :-1], rows[:, 1:])])
    parts, mean = gradients_after([(row[None, :-1], row[None, 1:]) for row in rows])
    assert loss == pytest.approx(mean, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


class Conversions(TorchDispatchMode):
    """Counts how often a weight matrix, by its shape, is made half-precision."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype is torch.bfloat16 and made.shape == self.shape:
            self.count += 1
        return made


def test_micro_batches_share_the_half_precision_weights_and_their_gradients_stay_the_same():
    rows = torch.randint(260, (4, 9), generator=torch.Generator().manual_seed(0))
    batches = [(row[None, :-1], row[None, 1:]) for row in rows]
    with Conversions(torch.Size([260, 16])) as embedding:
        shared, loss = gradients_after(batches, torch.bfloat16)
    assert embedding.count == 1
    apart = [gradients_after([batch], torch.bfloat16) for batch in batches]
    assert loss == pytest.approx(sum(one for _, one in apart) / 4, rel=1e-6)
    for at, gradient in enumerate(shared):
        assert torch.allclose(gradient, sum(one[at] for one, _ in apart) / 4, rtol=1e-2, atol=1e-4)


@pytest.fixture
def pretended_recording(monkeypatch):
    """What a CUDA graph does, without one: the same work at each replay, on the tensors that it was recorded with."""
    def pretend(device, run, before):
        with torch.random.fork_rng(devices=[]):
            for _ in range(3):
                before()
                run()
        weights = inspect.getclosurevars(run).nonlocals["self"].weights
        gradients = [weight.grad for weight in weights]

        def replay():
            there = [weight.grad for weight in weights]
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            run()
            for weight, gradient in zip(weights, there, strict=True):
                weight.grad = gradient
        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(train, "record_graph", pretend)
    monkeypatch.setattr(train, "card_memory", lambda device: 2000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_passes_give_the_gradients_of_plain_ones_at_every_iteration(pretended_recording, dtype):
    rows = torch.randint(260, (4, 9), generator=torch.Generator().manual_seed(0))
    batches = [(row[None, :-1], row[None, 1:]) for row in rows]
    plain, loss = gradients_after(batches, dtype)
    for iterations in (1, 3):
        recorded, same_loss = gradients_after(batches, dtype, RecordedPasses(), iterations)
        assert loss == same_loss and all(map(torch.equal, plain, recorded))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scaler_is_on_exactly_for_float16_on_cuda(monkeypatch, device, dtype):
    asked = {}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: asked.update(enabled=enabled))
    make_scaler(torch.device(device), dtype)
    assert asked["enabled"] == (device == "cuda" and dtype is torch.float16)


def test_gradients_are_unscaled_before_they_are_clipped():
    rows = torch.randint(260, (4, 9), generator=torch.Generator().manual_seed(0))
    norms = []
    for scaler in (make_scaler(CPU, torch.float32), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        model = GPT(TINY)
        optimizer = make_optimizer(model, TrainConfig())
        _, norm, skipped = train_step(model, model, iter([(rows[:, :-1], rows[:, 1:])]), 1, optimizer, scaler,
                                      TrainConfig(grad_clip=0.01), CPU, torch.float32)()
        norms.append((norm, skipped, model.wte.weight.detach().clone()))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5) and norms[0][1] == norms[1][1] == False  # noqa: E712
    assert torch.allclose(norms[0][2], norms[1][2], atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_infinite_gradient_leaves_weights_and_moments_as_they_were_and_is_counted(name):
    torch.manual_seed(0)
    model, config = GPT(TINY), TrainConfig(optimizer=name)
    rows = torch.randint(260, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", init_scale=2.0)

    def step():
        return train_step(model, model, iter([(rows[:, :-1], rows[:, 1:])]), 1, optimizer, scaler, config, CPU,
                          torch.float32)()

    def learned():
        moments = [value for member in optimizer.members for entry in member.state.values() for value in entry.values()]
        return [value.detach().clone() for value in (*model.parameters(), *moments)]

    before = learned()
    assert not step()[2] and any(not torch.equal(a, b) for a, b in zip(before, learned()))
    before = learned()
    model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)  # where muon is used, one of AdamW's alone
    _, norm, skipped = step()
    assert skipped and not math.isfinite(norm) and scaler.get_scale() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, learned(), strict=True))
    model.ln_f.weight._backward_hooks.clear()
    assert not step()[2] and not torch.equal(before[0], learned()[0])


def test_a_loss_that_is_not_finite_changes_nothing():
    model = GPT(TINY)
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    before = [weight.detach().clone() for weight in model.parameters()]
    rows = torch.full((1, 9), 7)
    with pytest.raises(LossNotFinite):
        train_step(model, model, iter([(rows[:, :-1], rows[:, 1:])]), 1, make_optimizer(model, TrainConfig()),
                   make_scaler(CPU, torch.float32), TrainConfig(), CPU, torch.float32)()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.parameters(), strict=True))


# Settings

def test_accumulation_must_come_out_whole_and_the_error_names_values_that_do():
    config = TrainConfig(tokens_per_iter=65536)
    assert accumulation_steps(config, 256, 32) == 8
    with pytest.raises(UserError, match="24 x 256 = 6144 tokens: use --batch-size 16 or 32, or --tokens-per-iter 61440 or 67584"):
        accumulation_steps(config, 256, 24)
    with pytest.raises(UserError, match="--tokens-per-iter 5120"):
        accumulation_steps(replace(config, tokens_per_iter=5000), 160, 32)


def test_the_vocabulary_comes_from_the_corpus_and_a_flag_that_contradicts_it_is_refused(data, tmp_path):
    run_train(data, tmp_path, "--max-iters", 1)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["vocab_size"] == 512
    result = run_train(data, tmp_path / "other", "--vocab-size", 4096, expect=1)
    assert "--vocab-size 4096 contradicts the prepared corpus" in result.output


def test_nothing_prepared_names_the_command_to_type(tmp_path):
    result = CliRunner().invoke(train.main, ["--data-dir", str(tmp_path / "none")])
    assert result.exit_code == 1 and "python preprocess.py prepare-dataset" in result.output
    assert "Traceback" not in result.output


def test_a_folder_that_holds_a_run_is_left_alone_unless_told(data, tmp_path):
    run_train(data, tmp_path, "--max-iters", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "--resume" in run_train(data, tmp_path, expect=1).output
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run_train(data, tmp_path, "--max-iters", 3, "--overwrite")
    assert metrics(tmp_path)[-1]["iter"] == 3


# A run

def test_a_run_makes_exactly_max_iters_updates_and_logs_true_counts(data, tmp_path, monkeypatch):
    steps = []
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or real(*args))
    run_train(data, tmp_path, "--max-iters", 11)
    rows = metrics(tmp_path)
    assert len(steps) == 11 and all(row["tokens"] == row["iter"] * 128 for row in rows)
    assert [row["iter"] for row in rows if "train_loss" in row] == [3, 6, 9, 11]
    assert [row["iter"] for row in rows if "val_loss" in row] == [0, 5, 10, 11]


def test_the_logged_loss_is_the_mean_of_all_micro_batches_since_the_last_line(data, tmp_path, monkeypatch):
    losses = []
    real = train.train_step

    def remember(*args):
        result = real(*args)()
        losses.append(result[0])
        return lambda: result

    monkeypatch.setattr(train, "train_step", remember)
    run_train(data, tmp_path, "--max-iters", 4, "--log-interval", 7, "--batch-size", 2, "--block-size", 32)
    resume(data, tmp_path, "--max-iters", "9")
    rows = training_lines(tmp_path)
    assert [row["iter"] for row in rows] == [4, 7, 9]
    for row, (a, b) in zip(rows, [(0, 4), (4, 7), (7, 9)], strict=True):
        assert row["train_loss"] == pytest.approx(sum(losses[a:b]) / (b - a), rel=1e-6)


def test_the_loss_falls_and_stays_above_the_floor(data, tmp_path):
    run_train(data, tmp_path, "--max-iters", 150, "--eval-interval", 50, "--dropout", 0, "--tokens-per-iter", 512,
              "--batch-size", 16, "--n-embd", 32, "--eval-tokens", 3000)
    rows = [row for row in metrics(tmp_path) if "val_loss" in row]
    assert rows[0]["val_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert rows[-1]["val_loss"] < 0.4 * rows[0]["val_loss"]
    assert all(row["val_loss"] > row["floor"] for row in rows)


def test_evaluating_and_printing_samples_never_change_the_training(data, tmp_path):
    run_train(data, tmp_path / "often", "--eval-interval", 1)
    run_train(data, tmp_path / "seldom", "--eval-interval", 100, "--sample-tokens", 0)
    one, two = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("often", "seldom"))
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(data, tmp_path, monkeypatch, optimizer):
    run_train(data, tmp_path / "whole", "--optimizer", optimizer)
    real, done = train.train_step, []

    def interrupt(*args):
        done.append(1)
        if len(done) == 7:  # between two lines of the log and two evaluations
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "train_step", interrupt)
    result = run_train(data, tmp_path / "halves", "--optimizer", optimizer, expect=130)
    assert "iteration 7. Go on with: python train.py --resume" in result.output
    monkeypatch.setattr(train, "train_step", real)
    resume(data, tmp_path / "halves")
    assert same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_signal_after_the_question_whether_to_stop_is_answered_one_iteration_later_with_a_save(data, tmp_path,
                                                                                              monkeypatch):
    real = train.Log.training

    def interrupt(log, progress, *rest):
        if progress.iter == 6:
            signal.raise_signal(signal.SIGINT)
        return real(log, progress, *rest)

    monkeypatch.setattr(train.Log, "training", interrupt)
    assert "saved at iteration 7" in run_train(data, tmp_path, expect=130).output
    assert read_checkpoint(tmp_path / "ckpt.pt")["progress"]["iter"] == 7


def wait_for_line(process, text, seconds=90):
    """Read the process's output until a line has `text`."""
    deadline, seen = time.monotonic() + seconds, []
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        seen.append(line)
        if text in line:
            return
        if not line:
            break
    pytest.fail(f"no {text!r} in {''.join(seen)}")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run([*TRAIN, *LONGER, "--data-dir", str(data), "--out-dir", str(out)], check=True, env=ONE_THREAD,
                   capture_output=True)
    return out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_process_that_is_stopped_goes_on_where_it_was(data, undisturbed, tmp_path, how):
    where = ["--data-dir", str(data), "--out-dir", str(tmp_path)]
    with subprocess.Popen([*TRAIN, *LONGER, *where], stdout=subprocess.PIPE, text=True, encoding="utf-8",
                          env=ONE_THREAD) as process:
        wait_for_line(process, "iter 40: validation")
        process.send_signal(how)
        output = process.stdout.read()
    assert process.returncode == (128 + how if how == signal.SIGTERM else -how)
    assert ("--resume" in output) == (how == signal.SIGTERM)
    subprocess.run([*TRAIN, "--resume", *where], check=True, env=ONE_THREAD, capture_output=True)
    assert same_run(undisturbed, tmp_path)


# Several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
FOUR = [*SMALL, "--tokens-per-iter", "256", "--dropout", "0"]  # two micro-batches for each of two processes


def test_two_processes_learn_the_same_as_one(data, tmp_path):
    run_train(data, tmp_path / "one", *FOUR, "--max-iters", 20)
    subprocess.run([*TORCHRUN, *FOUR, "--max-iters", "20", "--data-dir", str(data), "--out-dir", str(tmp_path / "two")],
                   check=True, env=ONE_THREAD, capture_output=True)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert (a["iter"], a["tokens"]) == (b["iter"], b["tokens"])
        assert all(a[key] == pytest.approx(b[key], abs=1e-4) for key in ("train_loss", "val_loss") if key in a)
    resume(data, tmp_path / "two", "--max-iters", "24")
    assert metrics(tmp_path / "two")[-1]["iter"] == 24, "one process goes on where two stopped"


def test_best_is_the_checkpoint_of_the_lowest_validation_loss_and_never_an_untrained_one(data, tmp_path, corpus):
    run_train(data, tmp_path, "--max-iters", 1, "--eval-interval", 100)
    assert read_checkpoint(tmp_path / "best.pt")["progress"]["iter"] == 1
    run_train(data, tmp_path, "--overwrite", "--max-iters", 30, "--muon-learning-rate", 0.5, "--eval-interval", 3)
    rows = [row for row in metrics(tmp_path) if "val_loss" in row and row["iter"]]
    lowest = min(rows, key=lambda row: row["val_loss"])
    best = read_checkpoint(tmp_path / "best.pt")
    assert best["progress"]["iter"] == lowest["iter"] and "optimizer" not in best
    again = evaluate(build_model(best, "best"), Validation(corpus, 32, 400, False), 2, CPU, torch.float32)
    assert again["val_loss"] == pytest.approx(lowest["val_loss"], rel=1e-6)


@pytest.mark.parametrize("share, saves", [(1e-2, 2), (1e9, 12)])
def test_saving_at_evaluations_takes_its_share_of_the_time_and_the_end_is_always_saved(data, tmp_path, monkeypatch,
                                                                                       share, saves):
    real, at = train.Run.save, []

    def slow_disk(run):
        at.append(run.progress.iter)
        time.sleep(0.3)
        real(run)

    monkeypatch.setattr(train.Run, "save", slow_disk)
    monkeypatch.setattr(train, "SAVE_SHARE", share)
    run_train(data, tmp_path, "--eval-interval", 1, "--sample-tokens", 0)
    assert (len(at), at[0], at[-1]) == (saves, 1, 12)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(data, tmp_path):
    run_train(data, tmp_path)
    kept = metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(iter=13, train_loss=9.0)) + '\n{"iter": 14, "train_lo')
    resume(data, tmp_path, "--max-iters", "15")
    assert metrics(tmp_path)[:len(kept)] == kept and training_lines(tmp_path)[-1]["iter"] == 15
    assert all(row.get("train_loss") != 9.0 for row in metrics(tmp_path))


@pytest.mark.parametrize("flags, message", [
    (["--n-layer", "2"], "--n-layer 2 contradicts"),
    (["--dropout", "0.3"], "--dropout 0.3 contradicts .* trained with 0.2"),
    (["--seed", "1"], "--seed 1 contradicts .* trained with 1337"),
    (["--preset", "demo"], "--preset demo contradicts .* trained with rtx3050"),
])
def test_a_resume_refuses_flags_that_contradict_the_checkpoint_with_both_values(data, tmp_path, flags, message):
    run_train(data, tmp_path, "--max-iters", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert re.search(message, resume(data, tmp_path, *flags, expect=1).output)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_resume_accepts_the_same_flags_again_and_another_batch_size(data, tmp_path):
    run_train(data, tmp_path, "--max-iters", 4)
    run_train(data, tmp_path, "--resume", "--max-iters", 8, "--batch-size", 4)
    assert metrics(tmp_path)[-1]["iter"] == 8


def test_a_resume_on_another_corpus_is_refused(data, tmp_path):
    run_train(data, tmp_path / "out", "--max-iters", 2)
    other = tmp_path / "data"
    result = CliRunner().invoke(preprocess.main, ["prepare-dataset", "--dataset", "sample", "--num-files", "1",
                                                  "--sample-rate", "0.4", "--data-dir", str(other)])
    assert result.exit_code == 0, result.output
    assert "was trained on another corpus" in resume(other, tmp_path / "out", expect=1).output


def test_a_finished_run_and_a_missing_one_say_what_to_type(data, tmp_path):
    assert "python train.py" in resume(data, tmp_path / "none", expect=1).output
    run_train(data, tmp_path, "--max-iters", 2)
    assert "--max-iters" in resume(data, tmp_path, expect=1).output


def test_a_run_whose_loss_explodes_stops_keeps_the_last_good_checkpoint_and_advises(data, tmp_path, monkeypatch):
    real, count = train.train_step, []

    def explode(forward, model, *rest):
        count.append(1)
        if len(count) == 8:
            with torch.no_grad():
                model.ln_f.weight.fill_(math.nan)
        return real(forward, model, *rest)

    monkeypatch.setattr(train, "train_step", explode)
    result = run_train(data, tmp_path, expect=1)
    assert "no longer finite at iteration 8" in result.output and "--muon-learning-rate 0.01" in result.output
    assert "Traceback" not in result.output
    assert read_checkpoint(tmp_path / "ckpt.pt")["progress"]["iter"] == 5


def failing_once(error, monkeypatch):
    """Let the third iteration raise `error`."""
    real, count = train.train_step, []

    def step(*args):
        count.append(1)
        if len(count) == 3:
            next(iter(args[2]))
            raise error
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)


def test_out_of_memory_names_the_flag_and_its_value(data, tmp_path, monkeypatch):
    failing_once(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    assert "use --batch-size 1 " in run_train(data, tmp_path, expect=1).output


def test_with_batch_size_auto_out_of_memory_halves_it_and_learning_stays_the_same(data, tmp_path, monkeypatch):
    run_train(data, tmp_path / "whole", "--batch-size", "auto", "--dropout", 0)
    failing_once(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    result = run_train(data, tmp_path / "halved", "--batch-size", "auto", "--dropout", 0)
    assert "going on with micro-batches of 2 instead of 4" in result.output
    for a, b in zip(training_lines(tmp_path / "whole"), training_lines(tmp_path / "halved"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_where_compiling_fails_at_the_first_step_training_goes_on_without_it(data, tmp_path, monkeypatch):
    def no_triton(*args):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(torch, "compile", lambda function: no_triton)
    result = run_train(data, tmp_path / "failed", "--compile", "on")
    assert result.output.count("going on without it") == 1 and "working triton" in result.output
    run_train(data, tmp_path / "eager")
    one, two = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("failed", "eager"))
    assert same(one["model"], two["model"])


def test_a_run_with_recorded_passes_learns_what_a_plain_one_learns(data, tmp_path, monkeypatch, pretended_recording):
    run_train(data, tmp_path / "plain")
    monkeypatch.setattr(train, "can_record", lambda device, config: True)
    run_train(data, tmp_path / "recorded")
    assert same_run(tmp_path / "plain", tmp_path / "recorded")


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_where_recording_fails_training_goes_on_without_it(data, tmp_path, monkeypatch, error):
    def no_graphs(device, run, before):
        run()
        raise error

    monkeypatch.setattr(train, "record_graph", no_graphs)
    monkeypatch.setattr(train, "can_record", lambda device, config: True)
    result = run_train(data, tmp_path / "failed", "--dropout", 0)
    assert result.output.count("going on without one") == 1 and "micro-batches of 1" not in result.output
    monkeypatch.setattr(train, "can_record", lambda device, config: False)
    run_train(data, tmp_path / "plain", "--dropout", 0)
    assert same_run(tmp_path / "failed", tmp_path / "plain")


def test_passes_that_take_more_than_half_of_the_memory_are_not_recorded(data, tmp_path, monkeypatch,
                                                                        pretended_recording):
    monkeypatch.setattr(train, "can_record", lambda device, config: True)
    monkeypatch.setattr(train, "card_memory", lambda device: 1999)
    output = run_train(data, tmp_path).output
    assert output.count("it may take more memory than there is): going on without one") == 1
    assert metrics(tmp_path)[-1]["iter"] == 12


def test_a_defect_of_ours_is_not_mistaken_for_a_failing_compiler(data, tmp_path, monkeypatch):
    failing_once(RuntimeError("a bug"), monkeypatch)
    result = CliRunner().invoke(train.main, [*SMALL, "--data-dir", str(data), "--out-dir", str(tmp_path)])
    assert isinstance(result.exception, RuntimeError)


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    log = train.Log(tmp_path / "metrics.jsonl", TrainConfig(), train.Progress())
    log.write(train.Progress(iter=1), grad_norm=math.inf, train_loss=math.nan, lr=0.5)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))
    assert row["grad_norm"] is None and row["train_loss"] is None and row["lr"] == 0.5


def test_more_than_twenty_epochs_are_warned_of_with_the_iterations_that_make_twenty(data, tmp_path):
    result = run_train(data, tmp_path, "--max-iters", 100000, "--plan")
    assert "Warning: past about 20 epochs" in result.output
    tokens = len(preprocess.open_corpus(data).train)
    assert f"--max-iters {round(20 * tokens / 128)}" in result.output


def test_a_plan_trains_nothing_writes_nothing_and_adds_up(data, tmp_path):
    result = run_train(data, tmp_path / "out", "--plan")
    assert not (tmp_path / "out").exists()
    sizes = [int(line.split()[-2].replace(",", "")) for line in result.output.splitlines() if line.endswith("MiB")]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=4) and "4 micro-batches" not in result.output


def test_an_nvidia_card_without_cuda_in_torch_is_noticed(data, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    if torch.cuda.is_available():
        pytest.skip("torch has CUDA here")
    assert "pytorch.org/get-started/locally" in run_train(data, tmp_path / "out", "--max-iters", 1).output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_float16_run_scales_its_loss_and_learns(data, tmp_path):
    flags = [flag if flag != "cpu" else "cuda" for flag in SMALL]
    result = CliRunner().invoke(train.main, [*flags, "--data-dir", str(data), "--out-dir", str(tmp_path),
                                             "--max-iters", "60"])
    assert result.exit_code == 0 and "float16 with a GradScaler" in result.output
    rows = training_lines(tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["loss_scale"] > 1


def cuda_run(data, out, *flags):
    """SMALL on the card, without torch.compile."""
    words = [word if word != "cpu" else "cuda" for word in SMALL]
    result = CliRunner().invoke(train.main, [*words, "--compile", "off", "--data-dir", str(data), "--out-dir", str(out),
                                             *map(str, flags)])
    assert result.exit_code == 0 and "does not work here" not in result.output, result.output
    return [row["train_loss"] for row in training_lines(out)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording passes needs a CUDA device")
@pytest.mark.parametrize("flags", [[], ["--dropout", 0], ["--position", "rotary", "--qk-norm", "--optimizer", "adamw"],
                                   ["--dtype", "float32"], ["--align-stories"]])
def test_on_cuda_recorded_passes_learn_what_plain_ones_learn(data, tmp_path, monkeypatch, flags):
    recorded = cuda_run(data, tmp_path / "recorded", *flags)
    monkeypatch.setattr(train, "can_record", lambda device, config: False)
    assert recorded == pytest.approx(cuda_run(data, tmp_path / "plain", *flags), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording passes needs a CUDA device")
def test_on_cuda_a_recorded_run_goes_on_with_the_same_random_numbers(data, tmp_path):
    constant_rates = ["--dropout", 0.5, "--decay-share", 0, "--warmup-iters", 0]  # whatever max-iters is
    whole = cuda_run(data, tmp_path / "whole", *constant_rates)
    cuda_run(data, tmp_path / "parts", *constant_rates, "--max-iters", 6)
    resume(data, tmp_path / "parts", "--max-iters", "12")
    assert [row["train_loss"] for row in training_lines(tmp_path / "parts")] == pytest.approx(whole, rel=1e-4)
