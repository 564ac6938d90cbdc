"""Each step of choosing a token against its definition, written out slowly, on random scores."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from config import GPTConfig, SampleConfig
from model import (GPT, choose_token, filter_logits, keep_min_p, keep_top_k, keep_top_p, penalize_phrases,
                   penalize_repetition)

EOS = 2
PLAIN = SampleConfig(temperature=1.0, top_k=0)
CASES = settings(max_examples=60, deadline=None, derandomize=True)
scores = st.builds(lambda seed, spread: random_logits(seed, spread), st.integers(0, 10**6),
                   st.sampled_from([0.01, 1.0, 5.0]))
histories = st.lists(st.integers(0, 5), min_size=1, max_size=40)


def random_logits(seed, spread=3.0, rows=3, vocab_size=23):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def probabilities(row):
    """Softmax of a list of scores, in Python's own double precision."""
    top = max(row)
    weights = [math.exp(score - top) for score in row]
    return [weight / sum(weights) for weight in weights]


def kept(logits):
    """For each row the set of tokens that may still be drawn."""
    return [{i for i, score in enumerate(row) if score > -math.inf} for row in logits.tolist()]


def slow_repetition_penalty(row, seen, penalty):
    return [score if i == EOS or i not in set(seen) else score / penalty if score > 0 else score * penalty
            for i, score in enumerate(row)]


def slow_dry(row, seen, multiplier, base, allowed_length):
    """DRY as its author wrote it: for each earlier place, count backwards how far it agrees with the end."""
    longest = {}
    for place in range(len(seen) - 1):
        n = 0
        while n <= place and seen[place - n] == seen[len(seen) - 1 - n]:
            n += 1
        token = seen[place + 1]
        longest[token] = max(longest.get(token, 0), n)
    lowered = list(row)
    for token, n in longest.items():
        if n >= allowed_length:
            lowered[token] -= multiplier * base ** min(n - allowed_length, 50)
    return lowered


def slow_top_p(row, p):
    """Tokens, likeliest first, until their probabilities reach p."""
    chances, together, chosen = probabilities(row), 0.0, set()
    for token in sorted(range(len(row)), key=lambda i: -chances[i]):
        chosen.add(token)
        together += chances[token]
        if together >= p:
            break
    return chosen


def slow_min_p(row, min_p):
    chances = probabilities(row)
    return {i for i, chance in enumerate(chances) if chance >= min_p * max(chances)}


# The penalties.

@CASES
@given(scores, histories, st.floats(1.01, 5))
def test_repetition_penalty_moves_each_seen_token_once_and_never_the_end_of_story(logits, seen, penalty):
    result = penalize_repetition(logits, torch.tensor([seen] * 3), penalty, EOS)
    for row, before in zip(result.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(slow_repetition_penalty(before, seen, penalty), rel=1e-5)


def test_repetition_penalty_lowers_a_token_whatever_the_sign_of_its_score():
    result = penalize_repetition(torch.tensor([[4.0, -4.0, 4.0, 4.0]]), torch.tensor([[0, 1, 0, 2]]), 2.0, EOS)
    assert result.tolist() == [[2.0, -8.0, 4.0, 4.0]]


def test_repetition_penalty_looks_back_over_its_window_only():
    logits, seen = torch.ones(1, 6), torch.tensor([[0, 1, 3, 4, 5]])
    result = filter_logits(logits, seen, replace(PLAIN, repetition_penalty=2.0, repetition_window=2), EOS)
    assert result.tolist() == [[1, 1, 1, 1, 0.5, 0.5]]


@CASES
@given(scores, histories, st.integers(1, 4), st.floats(0.1, 2), st.floats(1, 3))
def test_dry_equals_its_definition_in_plain_loops(logits, seen, allowed_length, multiplier, base):
    result = penalize_phrases(logits, torch.tensor([seen] * 3), multiplier, base, allowed_length)
    for row, before in zip(result.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(slow_dry(before, seen, multiplier, base, allowed_length), rel=1e-4, abs=1e-4)


def test_dry_lowers_only_the_token_that_would_prolong_a_phrase():
    seen = torch.tensor([[5, 6, 7, 8, 0, 5, 6, 7]])  # after 5 6 7 came 8
    lowered = penalize_phrases(torch.zeros(1, 10), seen, 1.5, 2.0, 2)
    assert lowered.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, -3.0, 0]]
    assert not penalize_phrases(torch.zeros(1, 10), seen, 1.5, 2.0, 4).any()


def test_dry_looks_at_each_row_by_itself():
    seen = torch.tensor([[1, 3, 1, 3, 1], [4, 5, 6, 7, 8]])
    lowered = penalize_phrases(torch.zeros(2, 9), seen, 1.0, 1.75, 1)
    assert lowered[0, 3] < 0
    assert not lowered[1].any()


def test_dry_stays_finite_on_a_loop_of_a_thousand_tokens():
    lowered = penalize_phrases(torch.zeros(1, 9), torch.full((1, 1000), 4), 1.0, 1.75, 3)
    assert lowered[0, 4] == pytest.approx(-(1.75**50), rel=1e-4)
    assert lowered.isfinite().all()


# The filters.

@CASES
@given(scores, st.integers(1, 30))
def test_top_k_keeps_exactly_the_k_highest_and_their_scores(logits, k):
    result = keep_top_k(logits, k)
    for row, before, chosen in zip(result.tolist(), logits.tolist(), kept(result), strict=True):
        assert chosen == set(sorted(range(len(before)), key=lambda i: -before[i])[:k])
        assert all(row[i] == before[i] for i in chosen)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_keeps_k_where_scores_are_equal(k):
    chosen, = kept(keep_top_k(torch.tensor([[1.0, 5.0, 1.0, 1.0]]), k))
    assert len(chosen) == k
    assert 1 in chosen


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.99])
@CASES
@given(logits=scores)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p(p, logits):
    result = keep_top_p(logits, p)
    for row, before, chosen in zip(result.tolist(), logits.tolist(), kept(result), strict=True):
        # float32 and double may disagree about a sum that hits p within rounding.
        assert chosen in (slow_top_p(before, p), slow_top_p(before, p - 1e-6), slow_top_p(before, p + 1e-6))
        assert all(row[i] == before[i] for i in chosen)


@pytest.mark.parametrize(("p", "count"), [(0.5, 1), (0.6, 2), (0.8, 2), (0.99, 4), (1e-9, 1)])
def test_top_p_of_a_known_distribution(p, count):
    """0.52, 0.3, 0.1, 0.08: the ancestors kept one token whatever p was."""
    chosen, = kept(keep_top_p(torch.tensor([[0.1, 0.3, 0.52, 0.08]]).log(), p))
    assert chosen == set([2, 1, 0, 3][:count])


def test_top_p_counts_a_sum_that_equals_p_as_reached():
    chosen, = kept(keep_top_p(torch.zeros(1, 4), 0.5))
    assert chosen == {0, 1}


@CASES
@given(scores, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, min_p):
    result = keep_min_p(logits, min_p)
    for before, chosen in zip(logits.tolist(), kept(result), strict=True):
        assert slow_min_p(before, min_p * (1 + 1e-5)) <= chosen <= slow_min_p(before, min_p * (1 - 1e-5))
        assert before.index(max(before)) in chosen


@CASES
@given(scores, histories, st.floats(0.2, 2), st.integers(1, 25), st.floats(0.3, 0.99), st.floats(0.01, 0.5))
def test_the_steps_come_in_the_stated_order(logits, seen, temperature, k, p, min_p):
    sample = SampleConfig(temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=1.3,
                          repetition_window=10, dry_multiplier=0.8, dry_allowed_length=2)
    history = torch.tensor([seen] * 3)
    step = penalize_repetition(logits, history[:, -10:], 1.3, EOS)
    step = penalize_phrases(step, history, 0.8, sample.dry_base, 2) / temperature
    step = keep_min_p(keep_top_p(keep_top_k(step, k), p), min_p)
    assert torch.equal(filter_logits(logits, history, sample, EOS), step)


anything = st.builds(
    SampleConfig, temperature=st.floats(0, 100), top_k=st.integers(0, 30), top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1), repetition_penalty=st.floats(1, 100), repetition_window=st.integers(1, 50),
    dry_multiplier=st.floats(0, 100), dry_base=st.floats(1, 100), dry_allowed_length=st.integers(1, 5))


@settings(parent=CASES, max_examples=200)
@given(scores, st.sampled_from([1.0, 1000.0]), histories, st.integers(1, 5), anything)
def test_whatever_the_settings_the_likeliest_stays_and_chances_are_finite(logits, scale, seen, times, sample):
    logits, history = logits * scale, torch.tensor([seen * times] * 3)
    result = filter_logits(logits, history, sample, EOS)
    penalized = filter_logits(logits, history, replace(sample, top_k=0, top_p=1.0, min_p=0.0), EOS)
    assert torch.equal(result.amax(-1), penalized.amax(-1))
    chances = result.softmax(-1)
    assert chances.isfinite().all() and chances.sum(-1).tolist() == pytest.approx([1] * 3, rel=1e-5)
    assert ((result == penalized) | (result == -math.inf)).all()
    if sample.top_k:
        assert ((result > -math.inf).sum(-1) <= sample.top_k).all()
    token = choose_token(logits, history, sample, EOS, torch.Generator().manual_seed(1))
    assert (result.gather(1, token[:, None]) > -math.inf).all()


def test_a_phrase_penalty_beyond_all_numbers_on_every_token_still_leaves_a_choice():
    seen = torch.tensor([[0] * 25 + [1] + [0] * 25 + [2] + [0] * 25])  # each token would prolong the row of zeros
    for multiplier in (100.0, 1e-60):
        sample = replace(PLAIN, dry_multiplier=multiplier, dry_base=100.0, dry_allowed_length=1, temperature=0.0001)
        assert filter_logits(torch.tensor([[1.0, 2.0, 3.0]]), seen, sample, EOS).softmax(-1).isfinite().all()


def test_settings_that_are_off_change_nothing():
    logits = random_logits(1)
    off = SampleConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, dry_multiplier=0.0)
    assert torch.equal(filter_logits(logits, torch.tensor([[1, 1, 1]] * 3), off, EOS), logits)


@pytest.mark.parametrize("change", [dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=0.0),
                                    dict(temperature=1e-300), dict(top_k=1000, temperature=0.0)])
def test_every_way_to_be_greedy_takes_the_likeliest(change):
    logits = random_logits(2, rows=50)
    token = choose_token(logits, torch.ones(50, 1, dtype=torch.long), replace(PLAIN, **change), EOS)
    assert torch.equal(token, logits.argmax(-1))


@CASES
@given(scores, st.floats(0.05, 3))
def test_something_can_always_be_drawn(logits, temperature):
    sample = SampleConfig(temperature=temperature, top_k=3, top_p=0.01, min_p=1.0, repetition_penalty=100.0,
                          dry_multiplier=100.0, dry_base=100.0, dry_allowed_length=1)
    token = choose_token(logits, torch.zeros(3, 100, dtype=torch.long), sample, EOS)
    assert ((token >= 0) & (token < logits.shape[1])).all()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits, draws = torch.tensor([[0.5, 0.3, 0.2]]).log(), 20000
    token = choose_token(logits.expand(draws, -1), torch.zeros(draws, 1, dtype=torch.long), PLAIN, EOS,
                         torch.Generator().manual_seed(0))
    counts = torch.bincount(token, minlength=3)
    expected = torch.tensor([0.5, 0.3, 0.2]) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.1%


# Generation.

def lively_gpt(vocab_size=270, block_size=32):
    """A small untrained network whose blocks, unlike a fresh one's, do something."""
    torch.manual_seed(5)
    gpt = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16,
                        intermediate_size=32)).eval()
    for weight in gpt.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.4)
    return gpt


def generate(gpt, prompt, sample, seed=0, eos_id=EOS):
    steps = list(gpt.generate(torch.tensor(prompt), sample, eos_id, torch.Generator().manual_seed(seed)))
    return torch.stack(steps, dim=1).tolist()


def test_a_seed_repeats_and_another_differs():
    gpt, sample = lively_gpt(), SampleConfig(max_new_tokens=50, temperature=1.0, top_k=0)
    assert generate(gpt, [[1, 9]], sample, seed=3) == generate(gpt, [[1, 9]], sample, seed=3)
    assert generate(gpt, [[1, 9]], sample, seed=3) != generate(gpt, [[1, 9]], sample, seed=4)


def test_a_row_does_not_see_the_others():
    gpt = lively_gpt()
    sample = SampleConfig(max_new_tokens=40, temperature=0.0, repetition_penalty=1.5, dry_multiplier=1.0,
                          dry_allowed_length=1)
    together = generate(gpt, [[1, 9], [1, 100], [1, 200]], sample)
    assert together == [generate(gpt, [[1, token]], sample)[0] for token in (9, 100, 200)]
    assert len({tuple(row) for row in together}) == 3


def test_a_row_that_ended_gives_no_more_tokens_and_does_not_touch_the_others(monkeypatch):
    """What follows the end of a row is -1, an id that must never reach the network or the penalties."""
    plan = iter([[7, 8], [EOS, 8], [9, 8], [9, EOS]])
    seen_ids = []

    def planned(logits, seen, *rest):
        seen_ids.append(seen.clone())
        return torch.tensor(next(plan))

    monkeypatch.setattr(model, "choose_token", planned)
    rows = generate(lively_gpt(), [[1, 5], [1, 5]], SampleConfig(max_new_tokens=10))
    assert rows == [[7, -1, -1], [8, 8, 8]]
    assert all((seen >= 0).all() for seen in seen_ids)
