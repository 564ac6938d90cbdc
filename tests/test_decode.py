"""The step of generation that CUDA records gives the tokens of the plain path: its logic on the CPU, the recording on a GPU."""

from dataclasses import replace

import pytest
import torch
from test_model import TINY, awake, every_kind, tokens

import model
from config import PRESETS, GPTConfig, SampleConfig, pick
from model import DecodeStep

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a step needs a CUDA device")
SAMPLES = {
    "greedy": dict(temperature=0.0), "defaults": {}, "all tokens": dict(temperature=1.5, top_k=0),
    "truncated": dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.02),
    "penalties": dict(temperature=1.5, top_k=0, repetition_penalty=1.3, repetition_window=5, dry_multiplier=0.8,
                      dry_allowed_length=1),
}
every_sample = pytest.mark.parametrize("sample", [SampleConfig(max_new_tokens=60, **values) for values in SAMPLES.values()],
                                       ids=SAMPLES)


def generated(net, idx, sample, eos_id=-5, seed=1):
    generator = torch.Generator(idx.device).manual_seed(seed)
    steps = list(net.generate(idx, sample, eos_id, generator))
    return torch.stack(steps, dim=1).tolist(), generator.get_state().tolist()


def both(monkeypatch, net, *args, **kwargs):
    """What the plain path and the fixed-shape step generate, with the generator's state afterwards."""
    monkeypatch.setattr(model, "can_record", lambda net: False)
    plain = generated(net, *args, **kwargs)
    monkeypatch.setattr(model, "can_record", lambda net: True)
    stepped = generated(net, *args, **kwargs)
    assert net.decode_step is not None
    return plain, stepped


@every_kind
@pytest.mark.parametrize("prompt", [1, 11, 12, 30])
def test_the_step_gives_the_tokens_of_the_plain_path_also_past_block_size(kind, prompt, monkeypatch):
    net = awake(replace(TINY, **kind), seed=3)
    plain, stepped = both(monkeypatch, net, tokens(3, prompt), SampleConfig(max_new_tokens=40, temperature=1.0))
    assert plain == stepped


@every_sample
def test_the_step_samples_as_the_plain_path_does(sample, monkeypatch):
    plain, stepped = both(monkeypatch, awake(TINY), tokens(3, 4), sample)
    assert plain == stepped


@pytest.mark.parametrize("block_size", [2, 3, 5])
def test_the_step_works_in_the_smallest_windows(block_size, monkeypatch):
    plain, stepped = both(monkeypatch, awake(replace(TINY, block_size=block_size)), tokens(2, 4), SampleConfig())
    assert plain == stepped


def test_rows_of_the_step_end_at_different_times(monkeypatch):
    net, sample = awake(TINY), SampleConfig(max_new_tokens=60, temperature=1.5)
    (free, _), _ = both(monkeypatch, net, tokens(8, 4), sample)
    eos_id = free[0][9]
    (rows, state), stepped = both(monkeypatch, net, tokens(8, 4), sample, eos_id=eos_id)
    assert ((rows, state)) == stepped
    assert len({row.index(-1) if -1 in row else None for row in rows}) > 1


def test_a_second_generation_takes_the_step_of_the_first_and_forgets_its_text(monkeypatch):
    monkeypatch.setattr(model, "can_record", lambda net: True)
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20)
    first = generated(net, tokens(2, 4), sample)
    step = net.decode_step
    generated(net, tokens(2, 9, seed=8), replace(sample, seed=3, max_new_tokens=5))
    assert net.decode_step is step
    assert generated(net, tokens(2, 4), sample) == first


@pytest.mark.parametrize("change", ["batch", "settings", "weights"])
def test_a_step_is_made_anew_where_something_recorded_has_changed(change, monkeypatch):
    monkeypatch.setattr(model, "can_record", lambda net: True)
    net, idx, sample = awake(TINY), tokens(2, 4), SampleConfig(max_new_tokens=20, temperature=1.5)
    generated(net, idx, sample)
    step = net.decode_step
    if change == "batch":
        idx = tokens(3, 4)
    elif change == "settings":
        sample = replace(sample, temperature=0.7)
    else:
        for weight in net.parameters():
            weight.data = -weight.data
    plain, stepped = both(monkeypatch, net, idx, sample)
    assert plain == stepped and net.decode_step is not step


def test_two_generations_at_once_do_not_share_a_cache(monkeypatch):
    monkeypatch.setattr(model, "can_record", lambda net: True)
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20, temperature=0.0)
    prompts = [tokens(1, 4, seed=seed) for seed in (1, 2)]
    alone = [[int(token) for token in net.generate(idx, sample, -5)] for idx in prompts]
    together = zip(*(net.generate(idx, sample, -5) for idx in prompts))
    assert [list(map(int, row)) for row in zip(*together)] == alone


def test_an_abandoned_generation_gives_its_step_back(monkeypatch):
    monkeypatch.setattr(model, "can_record", lambda net: True)
    net = awake(TINY)
    story = net.generate(tokens(1, 4), SampleConfig(), -5)
    next(story)
    assert net.decode_step is None
    story.close()
    assert isinstance(net.decode_step, DecodeStep)
    assert "decode_step" not in net.state_dict()


def test_nothing_is_recorded_on_the_cpu_or_while_training():
    assert not model.can_record(awake(TINY)) and not model.can_record(awake(TINY).train())


@every_kind
def test_matrices_stored_by_columns_give_the_same_tokens(kind):
    net = awake(replace(TINY, **kind))
    before = generated(net, tokens(3, 4), SampleConfig(max_new_tokens=40))
    model.store_by_columns(net)
    assert not net.blocks[0].attn.c_attn.weight.is_contiguous()
    assert generated(net, tokens(3, 4), SampleConfig(max_new_tokens=40)) == before


# On a GPU.

@gpu
@every_sample
@every_kind
def test_the_recorded_step_gives_the_tokens_of_the_plain_path(kind, sample, monkeypatch):
    net = awake(replace(TINY, **kind), seed=3).cuda()
    plain, recorded = both(monkeypatch, net, tokens(3, 9).cuda(), sample)
    assert plain == recorded and net.decode_step.graph is not None


@gpu
@pytest.mark.parametrize("preset", ["rtx3050", "llama"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_recorded_step_gives_the_tokens_of_the_plain_path_at_full_size(preset, batch_size, monkeypatch):
    net = awake(GPTConfig(**pick(GPTConfig, PRESETS[preset]))).cuda()
    net.wte.weight.data *= 0.1  # scores so large that rounding chooses between tokens would prove nothing
    idx = tokens(1, 20, vocab_size=4096).expand(batch_size, -1).cuda()
    plain, recorded = both(monkeypatch, net, idx, SampleConfig(max_new_tokens=400, temperature=1.0))
    assert plain == recorded


@gpu
@every_sample
def test_recording_changes_no_bit_in_half_precision(sample, monkeypatch):
    net = awake(GPTConfig(**PRESETS["rtx3050"])).cuda()
    for weight in net.parameters():
        weight.data = weight.data.half()
    monkeypatch.setattr(model, "can_record", lambda net: True)
    idx = tokens(4, 20, vocab_size=4096).cuda()
    recorded = generated(net, idx, replace(sample, max_new_tokens=300))
    assert net.decode_step.graph is not None
    net.decode_step.graph = None  # the same step, its kernels launched one by one
    assert generated(net, idx, replace(sample, max_new_tokens=300)) == recorded
