"""The fast steps of generation give the tokens of the plain path.

DecodeStep, which CUDA records, by its logic on the CPU and by the recording on a GPU; CPUStep in every precision.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_model import TINY, awake, every_kind, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import model
from config import PRESETS, GPTConfig, SampleConfig, pick
from model import CPUStep, DecodeStep

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a step needs a CUDA device")
SAMPLES = {
    "greedy": dict(temperature=0.0), "defaults": {}, "all tokens": dict(temperature=1.5, top_k=0),
    "truncated": dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.02),
    "repetition": dict(temperature=1.5, top_k=0, repetition_penalty=3.0, repetition_window=5),
    "repetition in a window beyond the text": dict(temperature=1.0, repetition_penalty=3.0, repetition_window=10**6),
    "greedy repetition": dict(temperature=0.0, repetition_penalty=3.0, repetition_window=1),
    "penalties": dict(temperature=1.5, top_k=0, repetition_penalty=1.3, repetition_window=5, dry_multiplier=0.8,
                      dry_allowed_length=1),
}
every_sample = pytest.mark.parametrize(
    "sample", [SampleConfig(max_new_tokens=60, **values) for values in SAMPLES.values()], ids=SAMPLES)


def generated(net, idx, sample, eos_id=-5, seed=1):
    generator = torch.Generator(idx.device).manual_seed(seed)
    steps = list(net.generate(idx, sample, eos_id, generator))
    return torch.stack(steps, dim=1).tolist(), generator.get_state().tolist()


def both(monkeypatch, net, *args, kind=DecodeStep, **kwargs):
    """What the plain path and a step generate, with the generator's state afterwards."""
    step = net.decode_step
    monkeypatch.setattr(model, "step_kind", lambda *_: None)
    plain = generated(net, *args, **kwargs)
    net.decode_step = step  # the plain path drops it
    monkeypatch.setattr(model, "step_kind", lambda *_: kind)
    stepped = generated(net, *args, **kwargs)
    assert isinstance(net.decode_step, kind)
    return plain, stepped


# DecodeStep

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


@pytest.mark.parametrize("prompt", [1, 3, 5, 6, 20])
@pytest.mark.parametrize("window", [1, 2, 5, 12, 50])
def test_the_step_penalizes_the_tokens_of_the_window_alone(window, prompt, monkeypatch):
    sample = SampleConfig(max_new_tokens=40, temperature=1.0, top_k=3, repetition_penalty=5.0, repetition_window=window)
    idx = tokens(3, prompt)
    idx[1] = idx[1, 0]  # a prompt that repeats itself
    net = awake(TINY)
    net.wte.weight.data *= 0.3  # so that the penalty decides
    plain, stepped = both(monkeypatch, net, idx, sample)
    assert plain == stepped
    assert plain != generated(net, idx, replace(sample, repetition_penalty=1.0))


def test_the_step_never_penalizes_the_end_of_the_story(monkeypatch):
    sample = SampleConfig(max_new_tokens=30, temperature=1.0, top_k=0, repetition_penalty=5.0)
    net, idx = awake(TINY), tokens(8, 9)
    for eos_id in idx[0, -3:].tolist():  # a prompt may hold the end of an earlier story
        plain, stepped = both(monkeypatch, net, idx, sample, eos_id=eos_id)
        assert plain == stepped and net.decode_step.penalizes
        assert (net.decode_step.last_use[:, eos_id] == model.NEVER).all()


WAITS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "index_put")


@every_sample
@every_kind
def test_nothing_that_is_recorded_looks_at_a_tensors_value(kind, sample, monkeypatch):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            operations.add(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    operations = set()
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    net = awake(replace(TINY, **kind))
    generated(net, tokens(2, 4), replace(sample, max_new_tokens=3))
    with torch.inference_mode(), Seen():
        net.decode_step.advance()
    assert "embedding" in operations and not operations & set(WAITS)
    assert net.decode_step.chooses == (sample.dry_multiplier == 0)


def test_rows_of_the_step_end_at_different_times(monkeypatch):
    net, sample = awake(TINY), SampleConfig(max_new_tokens=60, temperature=1.5)
    (free, _), _ = both(monkeypatch, net, tokens(8, 4), sample)
    eos_id = free[0][9]
    (rows, state), stepped = both(monkeypatch, net, tokens(8, 4), sample, eos_id=eos_id)
    assert ((rows, state)) == stepped
    assert len({row.index(-1) if -1 in row else None for row in rows}) > 1


def test_a_second_generation_takes_the_step_of_the_first_and_forgets_its_text(monkeypatch):
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20)
    first = generated(net, tokens(2, 4), sample)
    step = net.decode_step
    generated(net, tokens(2, 9, seed=8), replace(sample, seed=3, max_new_tokens=5))
    assert net.decode_step is step
    assert generated(net, tokens(2, 4), sample) == first


@pytest.mark.parametrize("change", ["batch", "settings", "weights", "end of the story"])
def test_a_step_is_made_anew_where_something_recorded_has_changed(change, monkeypatch):
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    net, idx, sample = awake(TINY), tokens(2, 4), SampleConfig(max_new_tokens=20, temperature=1.5)
    generated(net, idx, sample)
    step = net.decode_step
    if change == "batch":
        idx = tokens(3, 4)
    elif change == "settings":
        sample = replace(sample, temperature=0.7)
    elif change == "end of the story":
        plain, stepped = both(monkeypatch, net, idx, sample, eos_id=7)
        assert plain == stepped and net.decode_step is not step
        return
    else:
        for weight in net.parameters():
            weight.data = -weight.data
    plain, stepped = both(monkeypatch, net, idx, sample)
    assert plain == stepped and net.decode_step is not step


def test_two_generations_at_once_do_not_share_a_cache(monkeypatch):
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20, temperature=0.0)
    prompts = [tokens(1, 4, seed=seed) for seed in (1, 2)]
    alone = [[int(token) for token in net.generate(idx, sample, -5)] for idx in prompts]
    together = zip(*(net.generate(idx, sample, -5) for idx in prompts))
    assert [list(map(int, row)) for row in zip(*together)] == alone


def test_an_abandoned_generation_gives_its_step_back(monkeypatch):
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    net = awake(TINY)
    story = net.generate(tokens(1, 4), SampleConfig(), -5)
    next(story)
    assert net.decode_step is None
    story.close()
    assert isinstance(net.decode_step, DecodeStep)
    assert "decode_step" not in net.state_dict()


# CPUStep

def test_which_step_is_taken(monkeypatch):
    net = awake(TINY)
    assert model.step_kind(net, 1) is CPUStep and model.step_kind(net, 2) is None
    assert model.step_kind(awake(TINY).train(), 1) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert model.step_kind(net, 1) is None


CPU_KINDS = [dict(position=position, qk_norm=qk_norm, bias=bias)
             for position in ("learned", "rotary") for qk_norm in (False, True) for bias in (False, True)]
every_cpu_kind = pytest.mark.parametrize("kind", CPU_KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


@every_cpu_kind
@pytest.mark.parametrize("prompt", [1, 11, 12, 30])
def test_the_cpu_step_gives_the_tokens_of_the_plain_path_also_past_block_size(kind, prompt, monkeypatch):
    net = awake(replace(TINY, **kind), seed=3)
    sample = SampleConfig(max_new_tokens=60, temperature=1.0)
    plain, stepped = both(monkeypatch, net, tokens(1, prompt), sample, kind=CPUStep)
    assert plain == stepped
    model.store_for_cpu(net, torch.float32)
    assert not net.blocks[0].attn.c_attn.weight.is_contiguous()
    assert both(monkeypatch, net, tokens(1, prompt), sample, kind=CPUStep) == (plain, plain)


@every_sample
def test_the_cpu_step_samples_as_the_plain_path_does(sample, monkeypatch):
    plain, stepped = both(monkeypatch, awake(TINY), tokens(1, 4), sample, kind=CPUStep)
    assert plain == stepped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_cpu_kind
def test_the_cpu_step_in_half_precision_rounds_the_products_of_one_row_and_nothing_else(kind, dtype, monkeypatch):
    """The reference is the plain path with F.linear replaced: exactly the same numbers, not only close ones."""
    net, linear = awake(replace(TINY, **kind), seed=3), F.linear
    model.store_for_cpu(net, dtype)

    def rounded(x, weight, bias=None):
        if x.numel() > x.shape[-1]:
            return linear(x, weight, bias)
        y = linear(x.to(dtype), weight.to(dtype).contiguous())
        return y if bias is None else y + bias.to(dtype)

    hooks = [block.attn.c_attn.register_forward_hook(lambda *args: args[2].float()) for block in net.blocks]
    sample = SampleConfig(max_new_tokens=60, temperature=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", rounded)
        patch.setattr(model, "step_kind", lambda *_: None)
        reference = generated(net, tokens(1, 7), sample)
    for hook in hooks:
        hook.remove()
    plain, stepped = both(monkeypatch, net, tokens(1, 7), sample, kind=CPUStep)
    assert stepped == reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_the_scores_by_its_rounding_only(dtype):
    scores = []
    for halved in (torch.float32, dtype):
        net, idx = awake(replace(TINY, n_embd=64, bias=True)), tokens(1, 12)
        model.store_for_cpu(net, halved)
        step = CPUStep(net, SampleConfig(), 2)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "choose_token", lambda logits, *_: logits.float())
            scores.append(torch.cat([step(idx[:, t:t + 1], idx, None) for t in range(idx.shape[1])]))
    error = (scores[0] - scores[1]).norm() / scores[0].norm()
    assert 0 < error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_weights_stay_float32_rounded_beside_their_half_precision_copies(dtype):
    net, given = awake(replace(TINY, bias=True)), awake(replace(TINY, bias=True)).state_dict()
    model.store_for_cpu(net, dtype)
    for name, weight in net.state_dict().items():
        assert weight.dtype is torch.float32 and torch.equal(weight, given[name].to(dtype).float())
    halves = [module for module in net.modules() if hasattr(module, "half_precision")]
    assert len(halves) == (0 if dtype is torch.float32 else 1 + 4 * TINY.n_layer)
    for module in halves:
        assert all(copy.dtype is dtype and torch.equal(copy.float(), weight)
                   for copy, weight in zip(module.half_precision, module.parameters()))


def test_the_cpu_step_reads_the_weights_as_they_are_now():
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20)
    before = generated(net, tokens(1, 4), sample)
    with torch.no_grad():
        for weight in net.parameters():
            weight.neg_()  # in place, as an optimizer does
    after = generated(net, tokens(1, 4), sample)
    net.decode_step = None
    assert before != after == generated(net, tokens(1, 4), sample)


def test_the_cpu_step_chooses_with_all_tokens_so_far_and_the_end_of_the_story(monkeypatch):
    net, asked, choose = awake(TINY), [], model.choose_token
    monkeypatch.setattr(model, "choose_token", lambda *args: (asked.append(args[1:4]), choose(*args))[1])
    sample = SampleConfig(max_new_tokens=5)
    rows, _ = generated(net, tokens(1, 4), sample, eos_id=7)
    text = tokens(1, 4)[0].tolist() + rows[0]
    assert [seen[0].tolist() for seen, *_ in asked] == [text[:n] for n in range(4, 9)]
    assert all(rest == [sample, 7] for _, *rest in asked)


def test_a_model_that_told_a_story_on_the_cpu_can_record_its_step_afterwards(monkeypatch):
    net, sample = awake(TINY), SampleConfig(max_new_tokens=5)
    plain = generated(net, tokens(1, 4), sample)
    assert isinstance(net.decode_step, CPUStep)
    assert both(monkeypatch, net, tokens(1, 4), sample) == (plain, plain)


def test_two_stories_at_once_on_the_cpu_do_not_share_a_cache():
    net, sample = awake(TINY), SampleConfig(max_new_tokens=20, temperature=0.0)
    prompts = [tokens(1, 4, seed=seed) for seed in (1, 2)]
    alone = [[int(token) for token in net.generate(idx, sample, -5)] for idx in prompts]
    together = zip(*(net.generate(idx, sample, -5) for idx in prompts))
    assert [list(map(int, row)) for row in zip(*together)] == alone and alone[0] != alone[1]


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
    monkeypatch.setattr(model, "step_kind", lambda *_: DecodeStep)
    idx = tokens(4, 20, vocab_size=4096).cuda()
    recorded = generated(net, idx, replace(sample, max_new_tokens=300))
    assert net.decode_step.graph is not None
    net.decode_step.graph = None  # the same step, its kernels launched one by one
    assert generated(net, idx, replace(sample, max_new_tokens=300)) == recorded
