import math
import os
import pickle
import re
import shutil
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import model
from config import IGNORE_INDEX, PRESETS, GPTConfig, SampleConfig, UserError, only_fields
from model import (GPT, DecodeStep, KVCache, RMSNorm, TrainingLoss, apply_dry, autocast, choose_device, choose_dtype,
                   cuda_hint, filter_logits, find_checkpoint, keep_min_p, keep_top_k, keep_top_p, load_checkpoint,
                   penalize_repetition, prepare_for_inference, sample_next_token, save_checkpoint)

TINY = GPTConfig(block_size=12, vocab_size=260, n_layer=2, n_head=2, n_embd=16, intermediate_size=24)
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
EOS = 2
KINDS = [dict(position=position, qk_norm=qk_norm) for position in ("learned", "rotary") for qk_norm in (False, True)]
both_positions = pytest.mark.parametrize("position", ["learned", "rotary"])
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
with_and_without_bias = pytest.mark.parametrize("bias", [False, True])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def awake(config, seed=0):
    """A GPT with every weight random, in evaluation mode.

    A fresh one writes nothing into the residual stream (its projections are zero), so attention, positions, cache and
    masks could be anything and no test would see it.
    """
    net, generator = GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith("w"):
                weight.normal_(0, 1, generator=generator)
            elif weight.dim() == 2:
                weight.normal_(0, 1.5 / math.sqrt(weight.shape[1]), generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    return net


def tokens(*shape, vocab_size=TINY.vocab_size, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max().item() < tolerance


# -----------------------------------------------------------------------------
# Size, first loss, initial weights

@pytest.fixture(scope="module")
def rtx3050():
    torch.manual_seed(0)
    return GPT(GPTConfig())


def test_the_presets_have_the_sizes_that_the_readme_states(rtx3050):
    assert rtx3050.count_parameters() == 12_292_992
    stored = sum(weight.numel() * weight.element_size() for weight in rtx3050.state_dict().values())
    assert round(stored / 2**20, 1) == 46.9
    llama, demo = (GPTConfig(**only_fields(GPTConfig, PRESETS[name])) for name in ("llama", "demo"))
    llama, demo = GPT(llama), GPT(replace(demo, vocab_size=512))
    assert llama.count_parameters() == 12_292_992 - 256 * 384
    assert not any("wpe" in name or "_norm" in name for name in llama.state_dict())
    assert 0.5e6 < demo.count_parameters() < 0.65e6
    # Odd matrix sizes are slow on tensor cores, and quantised formats need rows of whole blocks of 32.
    sizes = {size for net in (rtx3050, llama, demo) for weight in net.parameters() for size in weight.shape}
    assert not any(size % 32 for size in sizes)


def test_untrained_loss_is_that_of_a_uniform_guess(rtx3050):
    idx, targets = tokens(2, 256, vocab_size=4096), tokens(2, 256, vocab_size=4096, seed=2)
    with torch.no_grad():
        assert abs(rtx3050(idx, targets).item() - math.log(4096)) < 0.1


def test_a_fresh_block_writes_nothing_into_the_residual_stream(rtx3050):
    zero = {name for name, weight in rtx3050.named_parameters() if not weight.any()}
    assert zero == {f"blocks.{i}.{part}.c_proj.weight" for i in range(6) for part in ("attn", "mlp")}


def test_every_other_matrix_starts_normal_and_every_norm_at_one(rtx3050):
    for name, weight in rtx3050.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        elif "c_proj" not in name:
            std = 0.01 if name in ("wte.weight", "wpe.weight") else 0.02
            assert abs(weight.std().item() / std - 1) < 0.02 and abs(weight.mean().item()) < std / 100, name


def test_biases_exist_only_when_asked_for_and_start_at_zero(rtx3050):
    assert not any(name.endswith("bias") for name in rtx3050.state_dict())
    biases = {name: w for name, w in GPT(replace(TINY, bias=True)).named_parameters() if name.endswith("bias")}
    assert len(biases) == 4 * TINY.n_layer and not any(weight.any() for weight in biases.values())


def test_the_embedding_is_the_output_matrix_and_learns_from_both_uses():
    net = awake(TINY)
    assert {name for name, weight in net.state_dict().items() if weight.shape[0] == TINY.vocab_size} == {"wte.weight"}
    net(torch.full((1, 4), 7), torch.full((1, 4), 9)).backward()
    assert (net.wte.weight.grad.abs().amax(1) > 0).all(), "every row, also of tokens that were not read: by the softmax"
    net.wte.weight.grad = None
    net.forward_hidden(torch.full((1, 4), 7)).sum().backward()
    assert net.wte.weight.grad.abs().amax(1).nonzero().tolist() == [[7]]


@both_positions
def test_every_parameter_learns(position):
    net = awake(replace(TINY, position=position, bias=True, qk_norm=True))
    net(tokens(2, 12), tokens(2, 12, seed=2)).backward()
    assert all(weight.grad.abs().max() > 0 for weight in net.parameters())


# -----------------------------------------------------------------------------
# What the network computes

def reference_logits(net, idx):
    """The logits of one sequence (T,), in float64 numpy, a position and a head at a time, rotary by complex numbers.

    Dimension i of a head is the real part and i + D / 2 the imaginary part of a number, as in Llama on Hugging Face.
    """
    c, w = net.config, {name: weight.double().numpy() for name, weight in net.state_dict().items()}
    T, D = len(idx), c.n_embd // c.n_head

    def norm(x, name):
        return x / np.sqrt((x * x).mean() + 1e-5) * w[name] if name in w else x

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def rotated(x, t):
        if c.position == "learned":
            return x
        z = (x[:D // 2] + 1j * x[D // 2:]) * np.exp(1j * t * 10000.0 ** (-2 * np.arange(D // 2) / D))
        return np.concatenate([z.real, z.imag])

    x = [w["wte.weight"][token] + (w["wpe.weight"][t] if "wpe.weight" in w else 0) for t, token in enumerate(idx)]
    for i in range(c.n_layer):
        block = f"blocks.{i}"
        qkv = [linear(norm(x[t], f"{block}.ln_1.weight"), f"{block}.attn.c_attn") for t in range(T)]
        for t in range(T):
            heads = []
            for h in range(c.n_head):
                def part(s, which):
                    return qkv[s][which * c.n_embd + h * D:which * c.n_embd + (h + 1) * D]
                q = rotated(norm(part(t, 0), f"{block}.attn.q_norm.weight"), t)
                keys = [rotated(norm(part(s, 1), f"{block}.attn.k_norm.weight"), s) for s in range(t + 1)]
                scores = np.exp([q @ k / math.sqrt(D) for k in keys])
                heads.append(sum(score * part(s, 2) for s, score in enumerate(scores)) / scores.sum())
            x[t] = x[t] + linear(np.concatenate(heads), f"{block}.attn.c_proj")
        for t in range(T):
            gate, up = np.split(linear(norm(x[t], f"{block}.ln_2.weight"), f"{block}.mlp.c_fc"), 2)
            x[t] = x[t] + linear(gate / (1 + np.exp(-gate)) * up, f"{block}.mlp.c_proj")
    return torch.tensor(np.array([w["wte.weight"] @ norm(x[t], "ln_f.weight") for t in range(T)]))


@every_kind
@with_and_without_bias
def test_logits_equal_a_reference_written_a_position_and_a_head_at_a_time(kind, bias):
    net, idx = awake(replace(TINY, bias=bias, **kind)), tokens(12)
    with torch.no_grad():
        assert close(net(idx[None])[0], reference_logits(net, idx.tolist()))


@every_kind
def test_no_position_sees_its_future(kind):
    net, idx = awake(replace(TINY, **kind)), tokens(1, 12)
    with torch.no_grad():
        before = net(idx)
        for t in range(12):
            changed = idx.clone()
            changed[0, t] = (idx[0, t] + 1) % TINY.vocab_size
            difference = (net(changed) - before).abs().amax(-1)[0]
            assert (difference[:t] < 1e-6).all() and (difference[t:] > 1e-4).all(), "or the past is not seen"


def order_effect(net):
    """How much the last position's logits change when two tokens before it change places."""
    with torch.no_grad():
        return (net(torch.tensor([[3, 5, 7, 9]])) - net(torch.tensor([[5, 3, 7, 9]])))[:, -1].abs().max().item()


@every_kind
def test_order_of_tokens_matters_in_one_layer(kind):
    # Two layers know the order from the causal mask alone: only one layer shows that positions work.
    net = awake(replace(TINY, n_layer=1, **kind))
    assert order_effect(net) > 0.01
    if net.wpe is not None:
        net.wpe.weight.data.zero_()
        assert order_effect(net) < 1e-5


def test_rms_norm_is_its_formula_with_an_eps_of_1e_5_and_its_mean_in_float32():
    norm, x = RMSNorm(8), torch.randn(5, 8) * 1e-3  # so small that another eps would show
    norm.weight.data.uniform_(0.5, 1.5)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=0)
    half = RMSNorm(64)(torch.full((1, 64), 300.0, dtype=torch.float16))  # whose square is infinite in float16
    assert half.dtype is torch.float16 and close(half, torch.ones(1, 64), 1e-3)


def test_loss_is_the_mean_over_the_positions_that_are_predicted():
    net, window = awake(TINY), tokens(3, 13)
    idx, targets = window[:, :-1], window[:, 1:].clone()
    with torch.no_grad():
        log_p = net(idx).double().log_softmax(-1)
        mean = -log_p.gather(2, targets[..., None]).mean().item()
        assert net(idx, window[:, 1:]).item() == pytest.approx(mean, rel=1e-6)
        targets[0, 5:] = targets[2, :] = targets[1, 0] = IGNORE_INDEX
        expected = [-log_p[b, t, targets[b, t]].item() for b in range(3) for t in range(12) if targets[b, t] >= 0]
        assert len(expected) == 16 and net(idx, targets).item() == pytest.approx(sum(expected) / 16, rel=1e-6)


def student_and_teacher():
    return awake(replace(TINY, dropout=0.5)), awake(replace(TINY, n_layer=1, dropout=0.5), seed=1)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_with_a_teacher_the_loss_is_a_mixture_of_two_cross_entropies_and_that_of_the_text_is_told(weight):
    student, teacher = student_and_teacher()
    idx, targets = tokens(2, 3, TINY.block_size)
    loss, text_loss = TrainingLoss(student, teacher, weight)(idx, targets)
    logp, p = student(idx).log_softmax(-1), teacher(idx).softmax(-1)
    of_text = -logp.gather(2, targets.unsqueeze(2)).mean()
    expected = (1 - weight) * of_text - weight * (p * logp).sum(-1).mean()
    torch.testing.assert_close((loss, text_loss), (expected, of_text.detach()))


def test_a_student_that_predicts_what_its_teacher_does_has_nothing_to_learn_from_it():
    student, teacher, idx = awake(TINY), awake(TINY), tokens(3, TINY.block_size)
    TrainingLoss(student, teacher, 1.0)(idx, idx)[0].backward()
    assert max(weight.grad.abs().max() for weight in student.parameters()) < 1e-6


def test_a_teacher_predicts_without_dropout_and_does_not_learn():
    student, teacher = student_and_teacher()
    idx = tokens(3, TINY.block_size)
    loss = TrainingLoss(student.train(), teacher, 1.0)
    loss(idx, idx)[0].backward()
    assert not teacher.training and all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in student.parameters())


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_in_half_precision_the_logits_are_rounded_and_the_loss_is_taken_in_float32(half):
    net, idx, targets = awake(TINY), tokens(2, 12), tokens(2, 12, seed=2)
    if half == "weights":
        net.bfloat16()
    with torch.no_grad(), autocast(CPU, torch.bfloat16 if half == "autocast" else torch.float32):
        assert net.forward_hidden(idx).dtype is net(idx).dtype is torch.bfloat16
        exact, loss = nn.functional.cross_entropy(net(idx).double().flatten(0, 1), targets.flatten()), net(idx, targets)
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_autocast_to_float32_changes_nothing():
    net, idx = awake(TINY), tokens(2, 12)
    with torch.no_grad(), autocast(CPU, torch.float32):
        assert net(idx).dtype is torch.float32 and torch.equal(net(idx), awake(TINY)(idx))


# -----------------------------------------------------------------------------
# Dropout and recomputation

def only(net, site, p):
    """`net` with dropout at one site alone: embedding, attn or mlp."""
    net.drop.p = p if site == "embedding" else 0.0
    for block in net.blocks:
        block.attn.resid_dropout.p = p if site == "attn" else 0.0
        block.mlp.resid_dropout.p = p if site == "mlp" else 0.0
    return net


def test_the_dropout_setting_reaches_every_site():
    net = GPT(replace(TINY, dropout=0.25))
    modules = {name: module.p for name, module in net.named_modules() if isinstance(module, nn.Dropout)}
    blocks = {f"blocks.{i}.{part}.resid_dropout": 0.25 for i in range(2) for part in ("attn", "mlp")}
    assert modules == blocks | {"drop": 0.25}


@pytest.mark.parametrize("site, removed", [("embedding", ["wte", "wpe"]), ("attn", ["attn.c_proj"]),
                                           ("mlp", ["mlp.c_proj"])])
def test_each_dropout_site_drops_its_part_in_training_and_nothing_in_evaluation(site, removed):
    net, without, idx = only(awake(replace(TINY, dropout=0.5)), site, 0.5), awake(TINY), tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(net(idx), without(idx))
        assert not close(net.train()(idx), net(idx), 1e-2)
        output = without.wte.weight.clone()
        for name, weight in without.named_parameters():
            if any(part in name for part in removed):
                weight.zero_()
        assert close(only(net, site, 1.0).forward_hidden(idx) @ output.T, without.forward_hidden(idx) @ output.T)


def test_recomputing_activations_gives_the_same_gradients_dropout_included():
    gradients, calls = [], []
    for recompute in (False, True):
        net = awake(replace(TINY, dropout=0.3, position="rotary")).train()
        net.activation_checkpointing = recompute
        net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(recompute))
        torch.manual_seed(5)
        net(tokens(2, 12), tokens(2, 12, seed=2)).backward()
        gradients.append([weight.grad for weight in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert calls == [False, True, True], "or nothing was recomputed"


# -----------------------------------------------------------------------------
# Generation

class PretendedCUDA(torch.Tensor):
    """A tensor of the CPU for which DecodeStep takes the way of CUDA."""

    is_cuda = True


def pretended_capture(run):
    """What a CUDA graph does, without one: the same work at each replay, on the tensors and Python values of now."""
    for _ in range(3):
        run()
    step = run.__self__
    captured, weights = dict(vars(step)), list(step.model.parameters())
    captured_data = [weight.data for weight in weights]

    def replay():
        given, length, data = dict(vars(step)), step.cache.length, [weight.data for weight in weights]
        vars(step).update(captured)
        step.cache.length = 0
        for weight, now in zip(weights, captured_data, strict=True):
            weight.data = now
        run()
        vars(step).update(given | dict(logits=step.logits))
        step.cache.length = length
        for weight, now in zip(weights, data, strict=True):
            weight.data = now
    return SimpleNamespace(replay=replay)


@pytest.fixture(params=["cpu", "pretended cuda", pytest.param("cuda", marks=on_gpu)])
def place(request, monkeypatch):
    """A function that moves a network to where the test is to run; `.device` is for its inputs."""
    def move(net):
        if request.param == "pretended cuda":
            monkeypatch.setattr(model, "capture_graph", pretended_capture)
            net.wte.weight = nn.Parameter(net.wte.weight.detach().as_subclass(PretendedCUDA))
        return net.to(move.device)
    move.device = CUDA if request.param == "cuda" else CPU
    move.captures = request.param != "cpu"
    return move


def greedy(n):
    return SampleConfig(temperature=0.0, repetition_penalty=1.0, max_new_tokens=n)


def generated(net, idx, sampling, eos_id=-5, seed=1):
    """Token ids (B, steps) of a whole generation, as lists."""
    generator = torch.Generator(idx.device).manual_seed(seed)
    return torch.stack(list(net.generate(idx, sampling, eos_id, generator)), dim=1).tolist()


@torch.no_grad()
def slowly_generated(net, idx, sampling, eos_id=-5, seed=1):
    """What generate's docstring says, with the whole window read again for each token."""
    generator, prompt = torch.Generator(idx.device).manual_seed(seed), idx.shape[1]
    block_size, start = net.config.block_size, max(0, prompt - net.config.block_size)
    for _ in range(sampling.max_new_tokens):
        if idx.shape[1] - start > block_size:
            start = idx.shape[1] - block_size // 2
        token = sample_next_token(net(idx[:, start:])[:, -1], idx, sampling, eos_id, generator)
        assert not (token == eos_id).any(), "choose another eos_id for this test"
        idx = torch.cat([idx, token[:, None]], dim=1)
    return idx[:, prompt:].tolist()


@torch.no_grad()
def step_logits(step, idx, prompt):
    """Logits (B, T, V) by way of the cache: the first `prompt` tokens at once, the others one by one."""
    step.cache.length = 0
    pieces = [step.model.lm_head(step.model.forward_hidden(idx[:, :prompt], step.cache))] if prompt else []
    return torch.cat([*pieces, *(step(idx[:, t])[:, None].clone() for t in range(prompt, idx.shape[1]))], dim=1)


@every_kind
@with_and_without_bias
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_step_equals_the_plain_forward_at_every_position(place, kind, bias, batch_size):
    net, idx = place(awake(replace(TINY, bias=bias, **kind))), tokens(batch_size, 12).to(place.device)
    with torch.no_grad():
        step, expected = DecodeStep(net, batch_size), net(idx)
    for prompt in (5, 0, 11, 1):  # each time in the same cache
        assert close(step_logits(step, idx, prompt), expected, 1e-3 if place.device is CUDA else 1e-4)
        assert step.cache.length == 12
    assert (step.graph is not None) == place.captures


@every_kind
def test_generated_tokens_are_those_of_the_slow_way_also_past_block_size(place, kind):
    net = place(awake(replace(TINY, **kind), seed=3))
    for prompt in (1, 11, 12, 30):
        idx = tokens(2, prompt).to(place.device)
        assert generated(net, idx, greedy(30)) == slowly_generated(net, idx, greedy(30))


@pytest.mark.parametrize("block_size", [3, 4, 7])
def test_the_smallest_windows_slide_rightly(place, block_size):
    net, idx = place(awake(replace(TINY, block_size=block_size))), tokens(2, 4).to(place.device)
    assert generated(net, idx, greedy(20)) == slowly_generated(net, idx, greedy(20))


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=1.5, top_k=0), dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.02),
    dict(temperature=1.5, top_k=3, repetition_penalty=5.0, repetition_window=5),
    dict(temperature=1.5, top_k=0, repetition_penalty=1.3, dry_multiplier=0.8, dry_allowed_length=1)], ids=str)
def test_sampled_tokens_are_those_of_the_slow_way_with_the_same_seed(place, settings):
    net, idx = place(awake(TINY)), tokens(3, 4).to(place.device)
    sampling = SampleConfig(max_new_tokens=40, **settings)
    assert generated(net, idx, sampling) == slowly_generated(net, idx, sampling)


def test_a_token_is_read_once_and_only_a_full_window_is_read_again(monkeypatch):
    net, read = awake(TINY), []
    forward, call = GPT.forward_hidden, DecodeStep.__call__
    monkeypatch.setattr(GPT, "forward_hidden", lambda *args: (read.append(args[1].shape[1]), forward(*args))[1])
    monkeypatch.setattr(DecodeStep, "__call__", lambda *args: (read.append("step"), call(*args))[1])
    generated(net, tokens(1, 9), greedy(12))
    assert read == [9, "step", "step", "step", 6, *["step"] * 6, 6]


def test_a_row_ends_at_eos_which_is_not_yielded_and_the_others_continue(monkeypatch):
    """After the end of a row comes -1, an id that must reach neither the network nor the penalties."""
    script, contexts = iter(torch.tensor([[5, 6], [EOS, 7], [8, 9], [EOS, EOS], [4, 4]])), []

    def scripted(logits, context, *rest):
        contexts.append(context)
        return next(script)

    monkeypatch.setattr(model, "sample_next_token", scripted)
    assert generated(awake(TINY), tokens(2, 3), greedy(50), eos_id=EOS) == [[5, -1, -1], [6, 7, 9]]
    assert all((context >= 0).all() for context in contexts)


@pytest.mark.parametrize("eos_id", [0, 1, 2, 77])
def test_the_end_of_a_story_is_the_id_given(monkeypatch, eos_id):
    monkeypatch.setattr(model, "sample_next_token", lambda logits, *_: torch.full((len(logits),), eos_id))
    assert list(awake(TINY).generate(tokens(3, 3), greedy(50), eos_id)) == []
    assert len(list(awake(TINY).generate(tokens(3, 3), greedy(50), eos_id + 1))) == 50


def test_rows_do_not_disturb_each_other(place):
    net, idx = place(awake(TINY)), tokens(3, 4).to(place.device)
    sampling = replace(greedy(20), repetition_penalty=1.5, dry_multiplier=1.0, dry_allowed_length=1)
    rows = generated(net, idx, sampling)
    assert rows == [generated(net, row[None], sampling)[0] for row in idx] and len(set(map(tuple, rows))) == 3


def test_a_seed_repeats_its_tokens_another_one_does_not_and_rows_of_one_prompt_differ():
    net, idx, sampling = awake(TINY), tokens(1, 4).expand(4, -1), SampleConfig(temperature=2.0, max_new_tokens=20)
    a, b, c = (generated(net, idx, sampling, seed=seed) for seed in (1, 1, 2))
    assert a == b != c and len(set(map(tuple, a))) == 4


def test_generating_with_its_own_generator_leaves_training_as_it_was():
    net, prompt = awake(TINY), tokens(1, 4)
    state, weights, before = torch.get_rng_state(), [weight.clone() for weight in net.parameters()], prompt.clone()
    names = list(net.state_dict())
    generated(net, prompt, SampleConfig(max_new_tokens=20))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(prompt, before) and list(net.state_dict()) == names
    assert all(torch.equal(a, b) and a.requires_grad and a.grad is None for a, b in zip(net.parameters(), weights))
    net(tokens(1, 4), tokens(1, 4)).backward()


def test_a_second_generation_takes_the_step_of_the_first_and_forgets_its_text(place):
    net, idx = place(awake(TINY)), tokens(2, 4).to(place.device)
    first, step = generated(net, idx, greedy(20)), net.decode_step
    generated(net, tokens(2, 9, seed=8).to(place.device), SampleConfig(max_new_tokens=5))
    assert generated(net, idx, greedy(20)) == first and net.decode_step is step
    generated(net, idx[:1], greedy(2))
    assert net.decode_step is not step, "another number of rows needs another cache"


@pytest.mark.parametrize("place", ["pretended cuda", pytest.param("cuda", marks=on_gpu)], indirect=True)
def test_a_captured_step_is_replayed_and_not_run(place, monkeypatch):
    net, idx = place(awake(TINY)), tokens(2, 4).to(place.device)
    first = generated(net, idx, greedy(20))
    monkeypatch.setattr(DecodeStep, "forward", None)
    assert generated(net, idx, greedy(20)) == first


def test_a_fresh_cache_is_zero_since_a_captured_step_reads_all_of_it_and_nan_passes_a_mask():
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with nan
    try:
        cache = KVCache(TINY, 2, CPU, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cache.keys.any() and not cache.values.any()


@pytest.mark.parametrize("change", ["in place", "by others"])
def test_a_step_reads_the_weights_as_they_are_now(place, change):
    net, idx = place(awake(TINY)), tokens(2, 4).to(place.device)
    before = generated(net, idx, greedy(20))
    with torch.no_grad():
        for weight in net.parameters():
            if change == "in place":  # as an optimizer does
                weight.neg_()
            else:
                weight.data = -weight.data
    assert before != generated(net, idx, greedy(20)) == slowly_generated(net, idx, greedy(20))


def test_two_generations_at_once_do_not_share_a_cache(place):
    net = place(awake(TINY))
    prompts = [tokens(1, 4, seed=seed).to(place.device) for seed in (1, 2)]
    single = [generated(net, idx, greedy(20))[0] for idx in prompts]
    at_once = zip(*(net.generate(idx, greedy(20), -5) for idx in prompts))
    assert [list(map(int, row)) for row in zip(*at_once)] == single and single[0] != single[1]


def test_an_abandoned_generation_gives_its_step_back():
    net = awake(TINY)
    story = net.generate(tokens(1, 4), SampleConfig(), -5)
    next(story)
    assert net.decode_step is None
    story.close()
    assert isinstance(net.decode_step, DecodeStep)


GOLDEN = {
    "learned": [74, 74, 74, 243, 178, 258, 178, 216, 178, 147, 189, 163, 47, 6, 47, 178, 211, 178, 6, 178, 6, 6, 6, 6],
    "rotary": [197, 197, 100, 100, 197, 197, 197, 197, 100, 100, 7, 7, 7, 7, 7, 7, 7, 189, 227, 189, 253, 35, 114, 242],
}


@both_positions
def test_greedy_tokens_of_a_fixed_model_stay_what_they_were(place, position):
    # The weights are a formula, so no version of torch's random numbers matters; the most likely token leads by 0.01 at
    # least, so no rounding does.
    net = GPT(replace(TINY, position=position)).eval()
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            noise = (torch.sin(torch.arange(weight.numel(), dtype=torch.float64) + 1000 * i) * 43758.5453).frac()
            weight.copy_(2 * noise.view_as(weight) if weight.dim() == 2 else 1 + noise / 2)
    prompt = torch.tensor([[1, 40, 80]], device=place.device)
    assert generated(place(net), prompt, greedy(24)) == [GOLDEN[position]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_for_inference_on_a_cpu_the_weights_are_rounded_and_only_single_rows_are_multiplied_in_half_precision(dtype):
    config = replace(TINY, n_embd=64, bias=True, qk_norm=True, position="rotary")
    net, rounded, idx = awake(config), awake(config), tokens(1, 12)
    prepare_for_inference(net, CPU, dtype)
    with torch.no_grad():
        for weight, given in zip(net.parameters(), rounded.parameters(), strict=True):
            assert weight.dtype is torch.float32 and torch.equal(weight, given.copy_(given.to(dtype)))
        exact = rounded(idx)
        assert close(net(idx), exact), "a prompt is read in float32"
        assert close(step_logits(DecodeStep(net, 3), idx.expand(3, -1), 5), exact), "and so are several rows"
        scores = step_logits(DecodeStep(net, 1), idx, 0)
    error = ((scores - exact).norm() / exact.norm()).item()
    eps = torch.finfo(dtype).eps
    assert error < 1e-6 if dtype is torch.float32 else eps / 8 < error < 8 * eps
    assert generated(net, idx, greedy(30)) == generated(net, idx, greedy(30))


@on_gpu
@pytest.mark.parametrize("preset", ["rtx3050", "llama"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_on_cuda_a_captured_step_generates_the_tokens_of_the_plain_path_at_full_size(preset, batch_size):
    torch.set_float32_matmul_precision("highest")  # train.main lowers it for the whole process
    net = awake(GPTConfig(**PRESETS[preset])).cuda()
    net.wte.weight.data *= 0.1  # so that logits are not so large that rounding chooses between tokens
    idx, sampling = tokens(1, 20, vocab_size=4096).expand(batch_size, -1).cuda(), SampleConfig(max_new_tokens=300)
    assert generated(net, idx, sampling) == slowly_generated(net, idx, sampling)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_positions
def test_on_cuda_in_half_precision_capturing_changes_no_bit_and_rounding_little(dtype, position):
    net, idx = awake(GPTConfig(position=position, qk_norm=True)), tokens(4, 60, vocab_size=4096).cuda()
    net.wte.weight.data *= 0.1
    with torch.no_grad():
        exact = net.cuda()(idx)
    prepare_for_inference(net, CUDA, dtype)
    assert net.rope is None or net.rope.dtype is torch.float32
    with torch.no_grad():
        step = DecodeStep(net, 4)
    captured = step_logits(step, idx, 20)
    assert step.graph is not None
    step.graph = None  # the same step, its kernels launched one by one
    assert torch.equal(step_logits(step, idx, 20), captured)
    assert 0 < (captured - exact).norm() / exact.norm() < 16 * torch.finfo(dtype).eps


# -----------------------------------------------------------------------------
# Sampling: each step against its definition, written out slowly

PLAIN = SampleConfig(temperature=1.0, top_k=0, repetition_penalty=1.0)


def random_logits(seed=0, rows=30, vocab_size=23):
    """Logits (3 * rows, V), flat, ordinary and steep ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(rows, vocab_size, generator=generator) * spread for spread in (0.01, 1.0, 5.0)])


def random_contexts(count, vocab_size=6):
    """`count` lists of 1 to 40 tokens that repeat themselves."""
    rng = np.random.default_rng(0)
    return [rng.integers(vocab_size, size=rng.integers(1, 41)).tolist() for _ in range(count)]


def survivors(logits):
    """For each row the set of tokens that may still be drawn."""
    return [{i for i, logit in enumerate(row) if logit > -math.inf} for row in logits.tolist()]


def probabilities(row):
    """Softmax of a list of logits, in Python's own double precision."""
    weights = [math.exp(logit - max(row)) for logit in row]
    return [weight / sum(weights) for weight in weights]


def slow_dry(row, context, multiplier, base, allowed_length):
    """DRY as its author wrote it: from each earlier place, count backwards how far it agrees with the end."""
    longest = {}
    for place in range(len(context) - 1):
        n = 0
        while n <= place and context[place - n] == context[len(context) - 1 - n]:
            n += 1
        token = context[place + 1]
        longest[token] = max(longest.get(token, 0), n)
    return [logit - (multiplier * base ** (longest[i] - allowed_length) if longest.get(i, 0) >= allowed_length else 0)
            for i, logit in enumerate(row)]


def slow_top_p(row, p):
    """Tokens, most likely first, until their probabilities reach p."""
    chances, total, chosen = probabilities(row), 0.0, set()
    for token in sorted(range(len(row)), key=lambda i: -chances[i]):
        chosen.add(token)
        total += chances[token]
        if total >= p:
            break
    return chosen


def test_repetition_penalty_moves_each_used_token_once_and_never_the_end_of_story():
    logits = random_logits(rows=2)
    for context in random_contexts(20):
        result = penalize_repetition(logits, torch.tensor([context] * 6), 1.7, EOS)
        for row, before in zip(result.tolist(), logits.tolist(), strict=True):
            assert row == pytest.approx([x if i == EOS or i not in context else x / 1.7 if x > 0 else x * 1.7
                                         for i, x in enumerate(before)], rel=1e-5)


def test_repetition_penalty_looks_back_over_its_window_only():
    context, settings = torch.tensor([[0, 1, 3, 4, 5]]), replace(PLAIN, repetition_penalty=2.0, repetition_window=2)
    assert filter_logits(torch.ones(1, 6), context, settings, EOS).tolist() == [[1, 1, 1, 1, 0.5, 0.5]]
    wide = replace(settings, repetition_window=10**6)
    assert filter_logits(torch.ones(1, 6), context, wide, EOS).tolist() == [[0.5, 0.5, 1, 0.5, 0.5, 0.5]]


def test_dry_equals_its_definition_in_plain_loops():
    logits, rng = random_logits(rows=1), np.random.default_rng(1)
    for context in random_contexts(60, vocab_size=3):
        allowed_length, multiplier, base = int(rng.integers(1, 5)), rng.uniform(0.1, 2), rng.uniform(1, 3)
        result = apply_dry(logits, torch.tensor([context] * 3), multiplier, base, allowed_length)
        for row, before in zip(result.tolist(), logits.tolist(), strict=True):
            assert row == pytest.approx(slow_dry(before, context, multiplier, base, allowed_length), rel=1e-4, abs=1e-4)


def test_dry_lowers_only_the_token_that_would_extend_a_phrase_and_each_row_by_itself():
    context = torch.tensor([[5, 6, 7, 8, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]])  # in the first row, 8 came after 5 6 7
    assert apply_dry(torch.zeros(2, 10), context, 1.5, 2.0, 2).tolist() == [[0] * 8 + [-3.0, 0], [0] * 10]
    assert not apply_dry(torch.zeros(2, 10), context, 1.5, 2.0, 4).any()


def test_dry_stays_finite_in_a_loop_of_a_thousand_tokens_and_leaves_a_choice_where_it_hits_every_token():
    lowered = apply_dry(torch.zeros(1, 9), torch.full((1, 1000), 4), 1.0, 1.75, 3)
    assert lowered[0, 4] == pytest.approx(-(1.75**50), rel=1e-4) and lowered.isfinite().all()
    context = torch.tensor([[0] * 25 + [1] + [0] * 25 + [2] + [0] * 25])  # each token would extend the row of zeros
    for multiplier in (100.0, 1e-60):
        settings = replace(PLAIN, dry_multiplier=multiplier, dry_base=100.0, dry_allowed_length=1, temperature=0.0001)
        assert filter_logits(torch.tensor([[1.0, 2.0, 3.0]]), context, settings, EOS).softmax(-1).isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 7, 22, 23, 30])
def test_top_k_keeps_exactly_the_k_highest(k):
    logits = random_logits()
    result = keep_top_k(logits, k)
    for before, chosen in zip(logits.tolist(), survivors(result), strict=True):
        assert chosen == set(sorted(range(23), key=lambda i: -before[i])[:k])
    assert torch.equal(result, torch.where(result > -math.inf, logits, -math.inf))
    (chosen,) = survivors(keep_top_k(torch.tensor([[1.0, 5.0] + [1.0] * 21]), k))
    assert len(chosen) == min(k, 23) and 1 in chosen, "k also where logits are equal"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.6, 0.9, 0.99])
def test_top_p_keeps_the_fewest_most_likely_tokens_that_reach_p(p):
    logits = random_logits()
    result = keep_top_p(logits, p)
    for before, chosen in zip(logits.tolist(), survivors(result), strict=True):
        # float32 and double may disagree about a sum that hits p within rounding.
        assert chosen in (slow_top_p(before, p), slow_top_p(before, p - 1e-6), slow_top_p(before, p + 1e-6))
    assert torch.equal(result, torch.where(result > -math.inf, logits, -math.inf))


def test_top_p_of_known_distributions():
    for p, count in [(0.5, 1), (0.6, 2), (0.8, 2), (0.99, 4), (1e-9, 1)]:
        (chosen,) = survivors(keep_top_p(torch.tensor([[0.1, 0.3, 0.52, 0.08]]).log(), p))
        assert chosen == set([2, 1, 0, 3][:count])
    assert survivors(keep_top_p(torch.zeros(1, 4), 0.5)) == [{0, 1}], "a sum that equals p has reached it"


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(min_p):
    logits = random_logits()
    for before, chosen in zip(logits.tolist(), survivors(keep_min_p(logits, min_p)), strict=True):
        chances = probabilities(before)
        surely, perhaps = ({i for i, chance in enumerate(chances) if chance >= min_p * edge * max(chances)}
                           for edge in (1 + 1e-5, 1 - 1e-5))
        assert surely <= chosen <= perhaps and before.index(max(before)) in chosen


def test_the_steps_come_in_the_stated_order():
    rng = np.random.default_rng(2)
    for seed, context in enumerate(random_contexts(20)):
        logits, context = random_logits(seed, rows=1), torch.tensor([context] * 3)
        temperature, p, min_p = rng.uniform(0.2, 2), rng.uniform(0.3, 0.99), rng.uniform(0.01, 0.5)
        k = int(rng.integers(1, 25))
        sampling = SampleConfig(temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=1.3,
                                repetition_window=10, dry_multiplier=0.8, dry_allowed_length=2)
        step = penalize_repetition(logits, context[:, -10:], 1.3, EOS)
        step = apply_dry(step, context, 0.8, sampling.dry_base, 2) / temperature
        step = keep_min_p(keep_top_p(keep_top_k(step, k), p), min_p)
        assert torch.equal(filter_logits(logits, context, sampling, EOS), step)


any_settings = st.builds(
    SampleConfig, temperature=st.floats(0, 100), top_k=st.integers(0, 30), top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1), repetition_penalty=st.floats(1, 100), repetition_window=st.integers(1, 50),
    dry_multiplier=st.floats(0, 100), dry_base=st.floats(1, 100), dry_allowed_length=st.integers(1, 5))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 1000.0]), st.lists(st.integers(0, 5), min_size=1, max_size=40),
       st.integers(1, 5), any_settings)
def test_with_any_settings_the_most_likely_token_stays_and_chances_are_finite(seed, scale, context, times, sampling):
    logits, context = random_logits(seed, rows=1) * scale, torch.tensor([context * times] * 3)
    result = filter_logits(logits, context, sampling, EOS)
    penalized = filter_logits(logits, context, replace(sampling, top_k=0, top_p=1.0, min_p=0.0), EOS)
    assert torch.equal(result.amax(-1), penalized.amax(-1))
    assert result.softmax(-1).isfinite().all() and ((result == penalized) | (result == -math.inf)).all()
    if sampling.top_k:
        assert ((result > -math.inf).sum(-1) <= sampling.top_k).all()
    token = sample_next_token(logits, context, sampling, EOS, torch.Generator().manual_seed(1))
    assert (result.gather(1, token[:, None]) > -math.inf).all()


def test_settings_that_are_off_change_nothing():
    logits = random_logits()
    assert torch.equal(filter_logits(logits, torch.ones(90, 3, dtype=torch.long), PLAIN, EOS), logits)


@pytest.mark.parametrize("change", [dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=0.0),
                                    dict(temperature=1e-300), dict(top_k=1000, temperature=0.0)])
def test_every_way_to_be_greedy_takes_the_most_likely_token(change):
    logits = random_logits()
    token = sample_next_token(logits, torch.ones(90, 1, dtype=torch.long), replace(PLAIN, **change), EOS)
    assert torch.equal(token, logits.argmax(-1))


def test_a_token_is_drawn_in_float32_also_from_logits_in_half_precision():
    logits, context = random_logits().bfloat16(), torch.ones(90, 1, dtype=torch.long)
    drawn = [sample_next_token(given, context, PLAIN, EOS, torch.Generator().manual_seed(0))
             for given in (logits, logits.float())]
    assert torch.equal(*drawn)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    draws, p = 200_000, torch.tensor([0.5, 0.3, 0.2])
    token = sample_next_token(p.log().expand(draws, -1), torch.zeros(draws, 1, dtype=torch.long), PLAIN, EOS,
                              torch.Generator().manual_seed(0))
    counts = torch.bincount(token, minlength=3)
    # Chi-square with 2 degrees of freedom: above 30 for one of three million seeds.
    assert ((counts - p * draws) ** 2 / (p * draws)).sum() < 30


# -----------------------------------------------------------------------------
# The checkpoint file

@pytest.fixture
def saved(tmp_path):
    """(path, model) of a checkpoint with everything that training puts beside the weights."""
    net = awake(replace(TINY, position="rotary", qk_norm=True, n_layer=1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(tokens(1, 4), tokens(1, 4)).backward()
    optimizer.step()
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, net, b"the tokenizer\x00\xff", progress=dict(iter=7, best_val=1.5), preset="demo",
                    nothing=None, optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    return path, net


def refusal(path):
    """The one line in which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = caught.value.message
    assert message.startswith(str(path)) and "\n" not in message and "`python train.py`" in message
    return message


def test_a_checkpoint_gives_back_all_that_was_saved(saved):
    path, net = saved
    again, checkpoint = load_checkpoint(path)
    assert checkpoint["tokenizer"] == b"the tokenizer\x00\xff" and checkpoint["nothing"] is None
    assert (checkpoint["progress"], checkpoint["preset"]) == (dict(iter=7, best_val=1.5), "demo")
    assert torch.equal(checkpoint["rng"], torch.get_rng_state()), "and loading draws no random numbers"
    assert len(checkpoint["optimizer"]["state"]) == len(list(net.parameters()))
    assert again.config == net.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 12)), net(tokens(1, 12)))


@both_positions
def test_a_model_from_a_checkpoint_can_be_trained_on(tmp_path, position):
    save_checkpoint(tmp_path / "ckpt.pt", awake(replace(TINY, position=position)), b"tokenizer")
    net = load_checkpoint(tmp_path / "ckpt.pt")[0].train()
    net(tokens(1, 12), tokens(1, 12)).backward()
    assert all(weight.requires_grad and weight.grad is not None for weight in net.parameters())


def test_a_checkpoint_contains_plain_types_and_tensors_only(saved):
    checkpoint = torch.load(saved[0], weights_only=True)
    assert checkpoint["model_config"] == asdict(saved[1].config)
    assert all(type(weight) is torch.Tensor for weight in checkpoint["model"].values())


def test_a_new_checkpoint_replaces_the_old_one(saved):
    path, net = saved
    save_checkpoint(path, net, b"other")
    assert load_checkpoint(path)[1]["tokenizer"] == b"other" and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


@posix
@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk_while_saving_keeps_the_old_checkpoint_and_says_so(saved, limit):
    import resource
    path, net = saved
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            save_checkpoint(path, net, b"other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.message.startswith(f"cannot write {path}: File too large. Free some disk space")
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path):
    assert "does not exist" in refusal(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match='python train.py --out-dir "'):
        find_checkpoint(tmp_path / "my run")


def test_without_a_checkpoint_the_newest_run_in_a_folder_below_is_named(tmp_path):
    for seconds, name in (200, "my demo"), (100, "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
        os.utime(tmp_path / name / "best.pt", (seconds, seconds))
    with pytest.raises(UserError, match=re.escape(f'pass --out-dir "{tmp_path / "my demo"}"')):
        find_checkpoint(tmp_path)


def test_the_checkpoint_of_a_run_is_its_best_else_its_latest(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "ckpt.pt"
    (tmp_path / "best.pt").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "best.pt"


@pytest.mark.parametrize("data", [b"", b"\x00", b"text", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), pickle.dumps({})])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    (tmp_path / "ckpt.pt").write_bytes(data)
    refusal(tmp_path / "ckpt.pt")
    refusal(tmp_path)


@pytest.mark.parametrize("value", [None, 3, [], "text", {}, dict(model={}, model_args=dict(n_layer=2))],
                         ids=str)
def test_a_file_of_torch_with_something_else_is_not_a_checkpoint(tmp_path, value):
    torch.save(value, tmp_path / "ckpt.pt")
    assert "is not a SmolerGPT checkpoint" in refusal(tmp_path / "ckpt.pt")


def test_a_checkpoint_cut_short_anywhere_is_refused(saved):
    path, data = saved[0], saved[0].read_bytes()
    for length in [*range(1, len(data), len(data) // 60), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:length])
        refusal(path)


def same(a, b):
    """Equality all the way down, tensors included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_torn_file_of_two_checkpoints_is_refused_or_equals_one_of_them(saved):
    path, net = saved
    (_, first), before = load_checkpoint(path), path.read_bytes()
    save_checkpoint(path, awake(net.config, seed=9), b"the tokenizer\x00\xff", progress=dict(iter=8, best_val=1.25))
    after, refused = path.read_bytes(), 0
    for place in range(1, len(after), len(after) // 20):
        path.write_bytes(after[:place] + before[place:])
        try:
            assert same(load_checkpoint(path)[1], first)
        except UserError:
            refused += 1
    assert refused > 15


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(saved):
    # torch.load itself ignores the file's checksums: weights changed on the disk would load silently.
    path, data = saved[0], saved[0].read_bytes()
    whole, noticed, places = load_checkpoint(path)[1], 0, range(0, len(data), len(data) // 200)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:])
        try:
            assert same(load_checkpoint(path)[1], whole), f"the flipped byte {place} went unnoticed"
        except UserError as error:
            assert str(path) in error.message and "\n" not in error.message
            noticed += 1
    assert noticed > len(places) / 2


class RunsCode:
    """Unpickling this makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)),
                                  lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)],
                         ids=["zip", "pickle", "old"])
def test_loading_a_checkpoint_never_runs_code_from_it(saved, tmp_path, save):
    path = saved[0]
    save(torch.load(path, weights_only=True) | dict(extra=RunsCode(tmp_path / "made")), path)
    refusal(path)
    assert not (tmp_path / "made").exists()


def without(name):
    return lambda checkpoint: checkpoint.pop(name)


def with_setting(**values):
    return lambda checkpoint: checkpoint["model_config"].update(values)


def with_weight(name, change):
    return lambda checkpoint: checkpoint["model"].update({name: change(checkpoint["model"]["wte.weight"])})


@pytest.mark.parametrize("damage, says", [
    (without("model"), "not a SmolerGPT checkpoint"), (without("model_config"), "not a SmolerGPT checkpoint"),
    (without("tokenizer"), "not a SmolerGPT checkpoint"), (with_setting(n_layers=3), "n_layers"),
    (with_setting(n_layer="three"), "n-layer"), (with_setting(n_head=3), "n_embd is 16"),
    (with_setting(n_layer=2), "is damaged"), (with_setting(vocab_size=300), "is damaged"),
    (with_setting(position="learned"), "is damaged"),
    (with_weight("wte.weight", lambda w: w[:-1].clone()), "is damaged"),
    (with_weight("lm_head.weight", lambda w: w), "is damaged"),
    (with_weight("wte.weight", lambda w: w * math.nan), "weights are not finite"),
    (with_weight("wte.weight", lambda w: torch.where(w == w.max(), math.inf, w)), "weights are not finite")])
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line_naming_it(saved, damage, says):
    path = saved[0]
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    assert says in refusal(path)


# -----------------------------------------------------------------------------
# Device and dtype

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@without_cuda
def test_auto_takes_the_accelerator_that_torch_finds_else_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(
        device=torch.device(device), is_cuda=device == "cuda", item=lambda: 0.0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for found in (CUDA, MPS, torch.device("xpu"), None):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        assert choose_device() == choose_device("auto") == (found or CPU)
    assert choose_device("cpu") == CPU and chosen == [CUDA] * 2, "what is captured lies on the current device"


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:x", "cpu:-3", "meta", pytest.param("cuda", marks=without_cuda),
                                  pytest.param("cuda:7", marks=without_cuda)])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        choose_device(name)
    message = caught.value.message
    assert message.startswith(f"--device {name} ") and message.endswith("Use --device auto.") and "\n" not in message


@posix
@without_cuda
def test_a_torch_without_cuda_beside_an_nvidia_driver_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("nvidia-smi") is None and cuda_hint() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "NVIDIA driver" in cuda_hint() and "pytorch.org/get-started/locally" in cuda_hint()
    with pytest.raises(UserError, match="pytorch.org/get-started/locally"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_hint() == ""


@pytest.mark.parametrize("capability, name, dtype", [
    ((6, 1), "auto", torch.float32), ((7, 0), "auto", torch.float16), ((7, 5), "auto", torch.float16),
    ((8, 6), "auto", torch.float16), ((9, 0), "auto", torch.float16),
    ((6, 1), "float16", torch.float16), ((8, 6), "bfloat16", torch.bfloat16), ((8, 6), "float32", torch.float32)])
def test_cuda_computes_in_float16_from_volta_on_unless_told_otherwise(monkeypatch, capability, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_dtype(name, CUDA) is dtype


def test_bfloat16_that_a_gpu_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UserError, match="--dtype float16"):
        choose_dtype("bfloat16", CUDA)


def test_without_cuda_the_dtype_is_float32_or_bfloat16():
    assert choose_dtype("auto", CPU) is choose_dtype("float32", CPU) is choose_dtype("auto", MPS) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    for device in (CPU, MPS):
        with pytest.raises(UserError, match="--dtype float32"):
            choose_dtype("float16", device)


def test_a_model_that_only_generates_takes_half_precision_on_a_cpu_by_itself():
    assert choose_dtype("auto", CPU, generating=True) is choose_dtype("float16", CPU, generating=True) is torch.float16
    for name in ("float32", "bfloat16"):
        assert choose_dtype(name, CPU, generating=True) is getattr(torch, name)
    assert choose_dtype("auto", MPS, generating=True) is torch.float32
    with pytest.raises(UserError, match="--dtype float32"):
        choose_dtype("float16", MPS, generating=True)
