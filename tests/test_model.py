import math
import os
import pickle
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model
from config import PRESETS, GPTConfig, SampleConfig, UserError, pick
from model import (EMBEDDING_STD, GPT, MLP, KVCache, RMSNorm, autocast, build_model, choose_device, choose_dtype,
                   cuda_hint, read_checkpoint, rotary_tables, rotate, save_checkpoint)

TINY = GPTConfig(block_size=12, vocab_size=260, n_layer=2, n_head=2, n_embd=16, intermediate_size=24)
KINDS = [dict(position=position, qk_norm=qk_norm) for position in ("learned", "rotary") for qk_norm in (False, True)]
both_positions = pytest.mark.parametrize("position", ["learned", "rotary"])
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def awake(config, seed=0):
    """A GPT with every weight random, in evaluation mode.

    A fresh one writes nothing into the residual stream (its projections are zero), so that attention, positions,
    cache and masks could be anything and no test would see it.
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


# Size and first loss

@pytest.fixture(scope="module")
def rtx3050():
    torch.manual_seed(0)
    return GPT(GPTConfig())


def test_rtx3050_has_12_29_million_parameters_and_46_9_megabytes(rtx3050):
    assert rtx3050.count_parameters() == 12_292_992
    stored = sum(weight.numel() * weight.element_size() for weight in rtx3050.state_dict().values())
    assert round(stored / 2**20, 1) == 46.9


def test_llama_has_the_same_parameters_but_the_positions():
    llama = GPT(GPTConfig(**pick(GPTConfig, PRESETS["llama"])))
    assert llama.count_parameters() == 12_292_992 - 256 * 384
    assert not any("wpe" in name or "norm" in name for name in llama.state_dict())


def test_demo_has_about_0_6_million_parameters():
    config = GPTConfig(**pick(GPTConfig, PRESETS["demo"] | dict(vocab_size=512)))
    assert 0.5e6 < GPT(config).count_parameters() < 0.65e6


def test_untrained_loss_is_that_of_a_uniform_guess(rtx3050):
    idx, targets = tokens(2, 256, vocab_size=4096), tokens(2, 256, vocab_size=4096, seed=2)
    with torch.no_grad():
        assert abs(rtx3050(idx, targets).item() - math.log(4096)) < 0.1


# Initial weights

def test_a_fresh_block_writes_nothing_into_the_residual_stream(rtx3050):
    zero = {name for name, weight in rtx3050.named_parameters() if not weight.any()}
    assert zero == {f"blocks.{i}.{part}.c_proj.weight" for i in range(6) for part in ("attn", "mlp")}


def test_every_other_matrix_starts_normal_and_every_norm_at_one(rtx3050):
    for name, weight in rtx3050.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        elif "c_proj" not in name:
            std = EMBEDDING_STD if name in ("wte.weight", "wpe.weight") else 0.02
            assert abs(weight.std().item() / std - 1) < 0.02 and abs(weight.mean().item()) < std / 100, name


def test_biases_exist_only_when_asked_for_and_start_at_zero(rtx3050):
    assert not any(name.endswith("bias") for name in rtx3050.state_dict())
    biases = {name: weight for name, weight in GPT(replace(TINY, bias=True)).named_parameters() if name.endswith("bias")}
    assert len(biases) == 4 * TINY.n_layer and not any(weight.any() for weight in biases.values())


def test_the_embedding_is_the_output_matrix():
    net = awake(TINY)
    assert {name for name, weight in net.state_dict().items() if weight.shape[0] == TINY.vocab_size} == {"wte.weight"}
    x = torch.randn(3, TINY.n_embd)
    assert close(net.logits(x), x @ net.wte.weight.T)


def test_the_embedding_learns_from_both_of_its_uses():
    net = awake(TINY)
    net(torch.full((1, 4), 7), torch.full((1, 4), 9)).backward()
    assert (net.wte.weight.grad.abs().amax(1) > 0).all(), "every row, also of tokens that were not read: by the softmax"
    net.wte.weight.grad = None
    net.hidden(torch.full((1, 4), 7)).sum().backward()
    assert net.wte.weight.grad.abs().amax(1).nonzero().tolist() == [[7]]


@both_positions
def test_every_parameter_learns(position):
    net = awake(replace(TINY, position=position, bias=True, qk_norm=True))
    net(tokens(2, 12), tokens(2, 12, seed=2)).backward()
    assert all(weight.grad.abs().max() > 0 for weight in net.parameters())


# What the network computes

def reference_logits(net, idx):
    """The logits of one sequence (T,), in float64 numpy, a position and a head at a time, rotary by complex numbers."""
    c, w = net.config, {name: weight.double().numpy() for name, weight in net.state_dict().items()}
    T, D, out = len(idx), c.n_embd // c.n_head, {}

    def norm(x, name):
        return x / np.sqrt((x * x).mean() + 1e-5) * w[name] if name in w else x

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def turned(x, t):
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
                q = turned(norm(part(t, 0), f"{block}.attn.q_norm.weight"), t)
                keys = [turned(norm(part(s, 1), f"{block}.attn.k_norm.weight"), s) for s in range(t + 1)]
                scores = np.exp([q @ k / math.sqrt(D) for k in keys])
                heads.append(sum(score * part(s, 2) for s, score in enumerate(scores)) / scores.sum())
            x[t] = x[t] + linear(np.concatenate(heads), f"{block}.attn.c_proj")
        for t in range(T):
            gate, up = np.split(linear(norm(x[t], f"{block}.ln_2.weight"), f"{block}.mlp.c_fc"), 2)
            x[t] = x[t] + linear(gate / (1 + np.exp(-gate)) * up, f"{block}.mlp.c_proj")
    return torch.tensor(np.array([w["wte.weight"] @ norm(x[t], "ln_f.weight") for t in range(T)]))


@every_kind
@pytest.mark.parametrize("bias", [False, True])
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
            after = net(changed)
            assert close(after[:, :t], before[:, :t], 1e-6) if t else True
            assert all(not close(after[:, s], before[:, s], 1e-4) for s in range(t, 12)), "or the past is not seen"


def order_effect(net):
    """How much the last position's logits change when two tokens before it change places."""
    with torch.no_grad():
        return (net(torch.tensor([[3, 5, 7, 9]])) - net(torch.tensor([[5, 3, 7, 9]])))[:, -1].abs().max().item()


@every_kind
def test_order_of_tokens_matters_in_one_layer(kind):
    # Two layers know the order without positions, from the causal mask alone: only one layer shows that they work.
    assert order_effect(awake(replace(TINY, n_layer=1, **kind))) > 0.01


def test_one_layer_without_positions_would_be_blind_to_order():
    net = awake(replace(TINY, n_layer=1))
    net.wpe.weight.data.zero_()
    assert order_effect(net) < 1e-5


def test_rotary_scores_depend_on_distance_alone():
    table, (q, k) = rotary_tables(64, 8), torch.randn(2, 1, 1, 1, 8)
    at = [table[:, t:t + 1] for t in range(64)]
    scores = {(t, s): (rotate(q, at[t]) * rotate(k, at[s])).sum().item() for t, s in [(5, 2), (8, 5), (63, 60), (9, 5)]}
    assert scores[5, 2] == pytest.approx(scores[8, 5], abs=1e-5) == pytest.approx(scores[63, 60], abs=1e-5)
    assert abs(scores[9, 5] - scores[8, 5]) > 1e-3


def test_rotary_pairs_are_half_a_head_apart_as_in_llama_on_hugging_face():
    table, x = rotary_tables(2, 4), torch.tensor([1.0, 0, 0, 0])
    assert close(rotate(x, table[:, 0]), x, 1e-7)
    assert close(rotate(x, table[:, 1]), torch.tensor([math.cos(1), 0, math.sin(1), 0]), 1e-6)
    slow = torch.tensor([0, math.cos(0.01), 0, math.sin(0.01)])
    assert close(rotate(x.roll(1), table[:, 1]), slow, 1e-6)


def test_rms_norm_is_its_formula_with_an_eps_of_1e_5():
    norm, x = RMSNorm(8), torch.randn(5, 8) * 1e-3  # so small that another eps would show
    norm.weight.data.uniform_(0.5, 1.5)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=0)


def test_rms_norm_keeps_the_dtype_and_takes_the_mean_in_float32():
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square is infinite in float16
    assert RMSNorm(64)(x).dtype == torch.float16 and close(RMSNorm(64)(x), torch.ones(1, 64), 1e-3)


def test_mlp_is_down_of_silu_gate_times_up():
    mlp, x = MLP(TINY), torch.randn(3, TINY.n_embd)
    mlp.c_proj.weight.data.normal_()
    gate, up = mlp.c_fc.weight[:24], mlp.c_fc.weight[24:]
    assert close(mlp(x), (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.c_proj.weight.T)


def test_loss_is_the_mean_over_the_positions_that_are_predicted():
    net, idx, targets = awake(TINY), tokens(3, 12), tokens(3, 12, seed=2)
    targets[0, 5:] = targets[2, :] = targets[1, 0] = -1
    with torch.no_grad():
        p = net(idx).double().softmax(-1)
        expected = [-math.log(p[b, t, targets[b, t]]) for b in range(3) for t in range(12) if targets[b, t] >= 0]
        assert len(expected) == 16
        assert net(idx, targets).item() == pytest.approx(sum(expected) / 16, rel=1e-6)


def test_targets_cut_out_of_a_longer_batch_are_accepted():
    window = tokens(3, 13)
    assert awake(TINY)(window[:, :-1], window[:, 1:]).isfinite()


@both_positions
def test_an_input_that_is_too_long_names_both_lengths(position):
    net = awake(replace(TINY, position=position))
    with pytest.raises(ValueError, match="cannot read 13 tokens: block_size is 12"):
        net(tokens(1, 13))
    cache = KVCache(net.config, 1, "cpu", torch.float32)
    cache.length = 10
    with pytest.raises(ValueError, match="cannot read 14 tokens: block_size is 12"):
        net.hidden(tokens(1, 4), cache)


# Dropout

def only(net, site, p):
    """Leave dropout on at one site alone: embedding, attention residual or mlp residual."""
    net.drop.p = p if site == "embedding" else 0.0
    for block in net.blocks:
        block.attn.resid_dropout.p = p if site == "attention residual" else 0.0
        block.mlp.resid_dropout.p = p if site == "mlp residual" else 0.0
    return net


SITES = ["embedding", "attention residual", "mlp residual"]


def test_the_dropout_setting_reaches_every_site():
    net = GPT(replace(TINY, dropout=0.25))
    modules = {name: module.p for name, module in net.named_modules() if isinstance(module, nn.Dropout)}
    assert modules == {"drop": 0.25} | {f"blocks.{i}.{part}.resid_dropout": 0.25 for i in range(2) for part in ("attn", "mlp")}


@pytest.mark.parametrize("site", SITES)
def test_every_dropout_site_is_active_in_training_and_off_in_evaluation(site):
    net, idx = only(awake(replace(TINY, dropout=0.5)), site, 0.5), tokens(1, 12)
    with torch.no_grad():
        torch.manual_seed(0)
        net.train()
        assert not close(net(idx), net(idx), 1e-2)
        net.eval()
        assert torch.equal(net(idx), net(idx)) and torch.equal(net(idx), awake(TINY)(idx))


@pytest.mark.parametrize("site, removed", [("embedding", ["wte", "wpe"]), ("attention residual", ["attn.c_proj"]),
                                           ("mlp residual", ["mlp.c_proj"])])
def test_dropping_everything_at_one_site_removes_that_part_alone(site, removed):
    net, without, idx = only(awake(replace(TINY, dropout=0.5)), site, 1.0).train(), awake(TINY), tokens(1, 12)
    with torch.no_grad():
        output = without.wte.weight.clone()
        for name, weight in without.named_parameters():
            if any(part in name for part in removed):
                weight.zero_()
        assert close(net.hidden(idx) @ output.T, without.hidden(idx) @ output.T)


def test_recomputing_activations_gives_the_same_gradients_dropout_included():
    gradients, calls = [], []
    for recompute in (False, True):
        net = awake(replace(TINY, dropout=0.3, position="rotary")).train()
        net.checkpoint_activations = recompute
        net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(recompute))
        torch.manual_seed(5)
        net(tokens(2, 12), tokens(2, 12, seed=2)).backward()
        gradients.append([weight.grad for weight in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert calls == [False, True, True], "or nothing was recomputed"


# The cache

@every_kind
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [3, 1, 4, 1], [1, 8], [8, 1], [2, 10]], ids=str)
def test_cached_logits_equal_full_logits(kind, chunks):
    net, idx = awake(replace(TINY, **kind)), tokens(2, sum(chunks))
    cache, parts = KVCache(net.config, 2, "cpu", torch.float32), idx.split(chunks, dim=1)
    with torch.no_grad():
        pieces = [net.logits(net.hidden(part, cache)) for part in parts]
        assert close(torch.cat(pieces, dim=1), net(idx))
    assert cache.length == sum(chunks)


def test_a_cache_set_back_to_length_0_has_forgotten_everything():
    net, idx = awake(TINY), tokens(1, 6)
    cache = KVCache(net.config, 1, "cpu", torch.float32)
    with torch.no_grad():
        net.hidden(tokens(1, 12, seed=7), cache)
        cache.length = 0
        pieces = [net.logits(net.hidden(part, cache)) for part in idx.split([4, 2], dim=1)]
        assert close(torch.cat(pieces, dim=1), net(idx))


@both_positions
def test_cached_logits_equal_full_logits_in_half_precision(position):
    net, idx = awake(replace(TINY, position=position)), tokens(2, 9)
    cache = KVCache(net.config, 2, "cpu", torch.float32)
    with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
        full = net(idx)
        pieces = [net.logits(net.hidden(part, cache)) for part in idx.split([4, 1, 4], dim=1)]
    assert full.dtype == torch.bfloat16
    assert close(torch.cat(pieces, dim=1).float(), full.float(), full.abs().max().item() * 0.05)


# Generation

def greedy(n):
    return SampleConfig(temperature=0.0, repetition_penalty=1.0, max_new_tokens=n)


def generated(net, idx, sample, eos_id=0, generator=None):
    """Token ids (B, steps) of a whole generation."""
    return torch.stack(list(net.generate(idx, sample, eos_id, generator)), dim=1)


def slow_greedy(net, idx, n, eos_id):
    """What generate's docstring says, with the whole window read anew for each token."""
    block_size, start = net.config.block_size, max(0, idx.shape[1] - net.config.block_size)
    prompt = idx.shape[1]
    with torch.no_grad():
        for _ in range(n):
            if idx.shape[1] - start > block_size:
                start = idx.shape[1] - block_size // 2
            token = net(idx[:, start:])[:, -1].argmax(-1)
            assert not (token == eos_id).any(), "choose another eos_id for this test"
            idx = torch.cat([idx, token[:, None]], dim=1)
    return idx[:, prompt:]


@every_kind
@pytest.mark.parametrize("prompt", [1, 11, 12, 30])
@pytest.mark.parametrize("block_size", [12, 7])
def test_greedy_tokens_are_those_of_the_slow_way_also_past_block_size(kind, prompt, block_size):
    net = awake(replace(TINY, block_size=block_size, **kind), seed=3)
    idx = tokens(2, prompt)
    eos_id = 259
    with torch.no_grad():
        net.wte.weight[eos_id].zero_()  # never the likeliest
    assert generated(net, idx, greedy(30), eos_id).tolist() == slow_greedy(net, idx, 30, eos_id).tolist()


def test_the_model_is_never_shown_more_than_block_size_nor_less_than_half(monkeypatch):
    net, seen, hidden = awake(TINY), [], GPT.hidden
    monkeypatch.setattr(model, "step_kind", lambda *_: None)  # the steps give the tokens of this path: test_decode.py
    monkeypatch.setattr(net, "hidden", lambda idx, cache: (hidden(net, idx, cache), seen.append(cache.length))[0])
    generated(net, tokens(1, 9), greedy(50), eos_id=-5)
    assert seen[:6] == [9, 10, 11, 12, 6, 7] and set(seen) == set(range(6, 13))


def test_a_row_ends_at_eos_which_is_not_yielded(monkeypatch):
    script = iter(torch.tensor([[5, 6], [2, 7], [8, 9], [2, 2], [4, 4]]))
    monkeypatch.setattr(model, "choose_token", lambda *_: next(script))
    assert generated(awake(TINY), tokens(2, 3), greedy(50), eos_id=2).tolist() == [[5, -1, -1], [6, 7, 9]]


def test_a_story_that_ends_at_once_yields_nothing(monkeypatch):
    monkeypatch.setattr(model, "choose_token", lambda logits, *_: torch.full((len(logits),), 2))
    assert list(awake(TINY).generate(tokens(3, 3), greedy(50), 2)) == []


def test_generation_stops_after_max_new_tokens():
    assert generated(awake(TINY), tokens(3, 3), greedy(5), eos_id=-5).shape == (3, 5)


def test_rows_do_not_disturb_each_other():
    net, idx = awake(TINY), tokens(3, 4)
    together = generated(net, idx, greedy(20), eos_id=-5)
    assert together.tolist() == [generated(net, row[None], greedy(20), eos_id=-5)[0].tolist() for row in idx]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    net, idx, sample = awake(TINY), tokens(2, 4), SampleConfig(temperature=2.0, max_new_tokens=20)
    a, b, c = (generated(net, idx, sample, -5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_many_samples_of_one_prompt_differ():
    sample = SampleConfig(temperature=2.0, max_new_tokens=20)
    rows = generated(awake(TINY), tokens(1, 4).expand(4, -1), sample, -5, torch.Generator().manual_seed(1))
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_generating_with_its_own_generator_leaves_training_as_it_was():
    net = awake(TINY)
    state, weights = torch.get_rng_state(), [weight.clone() for weight in net.parameters()]
    prompt = tokens(1, 4)
    before = prompt.clone()
    generated(net, prompt, SampleConfig(max_new_tokens=20), -5, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(prompt, before)
    assert all(torch.equal(a, b) and a.requires_grad and a.grad is None for a, b in zip(net.parameters(), weights))
    net(tokens(1, 4), tokens(1, 4)).backward()


GOLDEN = {
    "learned": [74, 74, 74, 243, 178, 258, 178, 216, 178, 147, 189, 163, 47, 6, 47, 178, 211, 178, 6, 178, 6, 6, 6, 6],
    "rotary": [197, 197, 100, 100, 197, 197, 197, 197, 100, 100, 7, 7, 7, 7, 7, 7, 7, 189, 227, 189, 253, 35, 114, 242],
}


@both_positions
def test_greedy_tokens_of_a_fixed_model_stay_what_they_were(position):
    # The weights are a formula, so that no version of torch's random numbers matters; the likeliest token leads by
    # 0.01 at least, so that no rounding does.
    net = GPT(replace(TINY, position=position)).eval()
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            noise = (torch.sin(torch.arange(weight.numel(), dtype=torch.float64) + 1000 * i) * 43758.5453).frac()
            weight.copy_(2 * noise.view_as(weight) if weight.dim() == 2 else 1 + noise / 2)
    assert generated(net, torch.tensor([[1, 40, 80]]), greedy(24), eos_id=-5)[0].tolist() == GOLDEN[position]


# The checkpoint file

@pytest.fixture
def saved(tmp_path):
    """A checkpoint with everything that training puts beside the weights; the model that it was made from."""
    net = awake(replace(TINY, position="rotary", qk_norm=True, n_layer=1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(tokens(1, 4), tokens(1, 4)).backward()
    optimizer.step()
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, net, b"the tokenizer\x00\xff", iter=7, best_val=1.5, preset="demo", scaler={}, nothing=None,
                    optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    return path, net


def refusal(path):
    """The one line in which reading `path` and building its model is refused."""
    with pytest.raises(UserError) as caught:
        build_model(read_checkpoint(path), path)
    message = caught.value.message
    assert str(path) in message and "\n" not in message and "python train.py" in message
    return message


def test_a_checkpoint_gives_back_all_that_was_saved(saved):
    path, net = saved
    contents = read_checkpoint(path)
    assert contents["tokenizer"] == b"the tokenizer\x00\xff"
    assert (contents["iter"], contents["best_val"], contents["preset"], contents["nothing"]) == (7, 1.5, "demo", None)
    assert torch.equal(contents["rng"], torch.get_rng_state())
    assert len(contents["optimizer"]["state"]) == len(list(net.parameters()))
    again = build_model(contents, path)
    assert again.config == net.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 12)), net(tokens(1, 12)))


@both_positions
def test_a_model_from_a_checkpoint_can_be_trained_on(tmp_path, position):
    save_checkpoint(tmp_path / "ckpt.pt", awake(replace(TINY, position=position)), b"tokenizer")
    net = build_model(read_checkpoint(tmp_path / "ckpt.pt"), "ckpt.pt").train()
    net(tokens(1, 12), tokens(1, 12)).backward()
    assert all(weight.requires_grad and weight.grad is not None for weight in net.parameters())


def test_a_checkpoint_holds_plain_types_and_tensors_only(saved):
    contents = torch.load(saved[0], weights_only=True)
    assert contents["model_config"] == asdict(saved[1].config)
    assert all(type(weight) is torch.Tensor for weight in contents["model"].values())


def test_a_new_checkpoint_takes_the_place_of_the_old_one_whole(saved):
    path, net = saved
    save_checkpoint(path, net, b"other")
    assert read_checkpoint(path)["tokenizer"] == b"other" and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are POSIX")
@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk_while_saving_leaves_the_old_checkpoint_and_says_so(saved, limit):
    import resource
    path, net = saved
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            save_checkpoint(path, net, b"other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.message.startswith(f"cannot write {path}: File too large. Free some space")
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_a_checkpoint_that_is_missing_says_how_to_make_one(tmp_path):
    assert "python train.py" in refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("contents", [b"", b"\x00", b"text", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), pickle.dumps({})])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, contents):
    (tmp_path / "ckpt.pt").write_bytes(contents)
    refusal(tmp_path / "ckpt.pt")


def test_a_folder_in_place_of_a_checkpoint_is_refused(tmp_path):
    refusal(tmp_path)


def test_a_checkpoint_cut_short_anywhere_is_refused(saved):
    path, data = saved[0], saved[0].read_bytes()
    for length in [*range(1, len(data), len(data) // 60), *range(len(data) - 60, len(data))]:
        path.write_bytes(data[:length])
        refusal(path)


def same(a, b):
    """Equality of checkpoints' contents, tensors included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(saved):
    # torch.load itself does not look at the file's checksums: weights changed on the disk would load silently.
    path, data = saved[0], saved[0].read_bytes()
    whole, noticed, places = read_checkpoint(path), 0, range(0, len(data), len(data) // 400)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:])
        try:
            contents = read_checkpoint(path)
            build_model(contents, path)
        except UserError as error:
            assert str(path) in error.message and "\n" not in error.message
            noticed += 1
        else:
            assert same(contents, whole), f"the flipped byte {place} went unnoticed"
    assert noticed > len(places) / 2


class RunsCode:
    """Unpickling this makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents)),
                                  lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False)],
                         ids=["zip", "pickle", "old"])
def test_reading_a_checkpoint_never_runs_code_from_it(saved, tmp_path, save):
    path = saved[0]
    contents = torch.load(path, weights_only=True)
    save(contents | dict(extra=RunsCode(tmp_path / "made")), path)
    refusal(path)
    assert not (tmp_path / "made").exists()


def drop(name):
    return lambda contents: contents.pop(name)


def put(name, value):
    return lambda contents: contents.update({name: value})


def setting(**values):
    return lambda contents: contents["model_config"].update(values)


def weight(name, change):
    return lambda contents: contents["model"].update({name: change(contents["model"]["wte.weight"])})


@pytest.mark.parametrize("damage, says", [
    (drop("model"), "not a checkpoint of this program"),
    (drop("model_config"), "not a checkpoint of this program"),
    (drop("tokenizer"), "not a checkpoint of this program"),
    (drop("format"), "not a checkpoint of this program"),
    (put("format", model.CHECKPOINT_FORMAT + 1), "update the program"),
    (put("format", None), "not a checkpoint of this program"),
    (put("tokenizer", "text"), "not a checkpoint of this program"),
    (put("model", []), "not a checkpoint of this program"),
    (put("model", torch.zeros(3)), "not a checkpoint of this program"),
    (put("model", {}), "is missing, and by its settings should be torch.float32"),
    (put("model", {1: 2, "a": 3}), "is int, and by its settings should be missing"),
    (put("model_config", [1]), "not a checkpoint of this program"),
    (setting(n_layers=3), "unknown settings 'n_layers'"),
    (setting(n_layer="three"), "n_layer is 'three'; it must be a whole number"),
    (setting(n_head=3), "n_embd is 16; it must be a multiple of n_head (3)"),
    (setting(n_layer=2), "blocks.1.attn.c_attn.weight is missing"),
    (setting(vocab_size=300), "wte.weight is torch.float32 (260, 16), and by its settings should be torch.float32 (300, 16)"),
    (setting(position="learned"), "wpe.weight is missing"),
    (weight("wte.weight", lambda w: w[:-1].clone()), "wte.weight is torch.float32 (259, 16)"),
    (weight("wte.weight", lambda w: w.half()), "wte.weight is torch.float16 (260, 16)"),
    (weight("wte.weight", lambda w: w.long()), "wte.weight is torch.int64 (260, 16)"),
    (weight("wte.weight", lambda w: w.tolist()), "wte.weight is list"),
    (weight("wte.weight", lambda w: w * math.nan), "weights that are not finite"),
    (weight("wte.weight", lambda w: w / 0), "weights that are not finite"),
    (weight("lm_head.weight", lambda w: w), "lm_head.weight is torch.float32 (260, 16), and by its settings should be missing"),
])
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line_naming_it(saved, damage, says):
    path = saved[0]
    contents = torch.load(path, weights_only=True)
    damage(contents)
    torch.save(contents, path)
    with pytest.raises(UserError) as caught:
        build_model(read_checkpoint(path), path)
    message = caught.value.message
    assert message.startswith(str(path)) and says in message and "\n" not in message


@pytest.mark.parametrize("contents", [None, 3, [], "text", torch.zeros(3), {}])
def test_a_whole_file_of_something_else_is_not_a_checkpoint(tmp_path, contents):
    torch.save(contents, tmp_path / "ckpt.pt")
    assert "is not a checkpoint of this program" in refusal(tmp_path / "ckpt.pt")


class LittleMemory(TorchDispatchMode):
    """Stops at the first tensor that brings all that have memory over a megabyte, before it is filled."""

    bytes = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.bytes += tensor.numel() * tensor.element_size()
        assert self.bytes < 1e6, f"{function} allocates"
        return result


@both_positions
def test_settings_that_ask_for_a_trillion_parameters_allocate_nothing(saved, position):
    path = saved[0]
    contents = read_checkpoint(path)
    contents["model_config"] |= dict(n_layer=256, n_embd=16384, n_head=1, intermediate_size=65536, block_size=65536,
                                     vocab_size=65536, position=position)
    with LittleMemory(), pytest.raises(UserError, match="by its settings should be"):
        build_model(contents, path)


# Device and dtype

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    for cuda, mps, device in [(True, True, CUDA), (True, False, CUDA), (False, True, MPS), (False, False, CPU)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert choose_device() == choose_device("auto") == device
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:x", "cpu:-3", "meta", pytest.param("cuda", marks=without_cuda),
                                  pytest.param("cuda:7", marks=without_cuda)])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert f"device {name} cannot be used here" in caught.value.message and "--device auto" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="a script on PATH is no program there")
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


def test_bfloat16_that_a_card_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UserError, match="--dtype float16"):
        choose_dtype("bfloat16", CUDA)


def test_without_cuda_the_dtype_is_float32_or_bfloat16():
    assert choose_dtype("auto", CPU) is choose_dtype("float32", CPU) is choose_dtype("auto", MPS) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    for device in (CPU, MPS):
        with pytest.raises(UserError, match="float16 needs CUDA"):
            choose_dtype("float16", device)


def test_a_model_that_only_generates_takes_half_precision_on_the_cpu_by_itself():
    assert choose_dtype("auto", CPU, generating=True) is choose_dtype("float16", CPU, generating=True) is torch.float16
    for name in ("float32", "bfloat16"):
        assert choose_dtype(name, CPU, generating=True) is getattr(torch, name)
    assert choose_dtype("auto", MPS, generating=True) is torch.float32
    with pytest.raises(UserError, match="float16 needs CUDA"):
        choose_dtype("float16", MPS, generating=True)


def test_autocast_computes_in_the_chosen_dtype():
    net, idx = awake(TINY), tokens(1, 12)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), autocast(CPU, dtype):
            assert net(idx).dtype is dtype and net.hidden(idx).dtype is dtype
    assert net(idx).dtype is torch.float32
    with autocast(CPU, torch.bfloat16):
        assert net(idx, idx).dtype is torch.float32, "the loss is not rounded"
