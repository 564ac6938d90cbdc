"""The numbers of tests/benchmarks/text_quality.py on texts small enough to count by hand."""

import importlib
import math
import sys

import pytest
import torch
from conftest import ROOT
from test_model import TINY, awake, tokens

from config import SampleConfig
from model import IGNORE

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
quality = importlib.import_module("text_quality")


def test_words_are_lower_case_and_keep_their_apostrophes():
    assert quality.split_words("Tom's dog, 3 cats... Él can’t!") == ["tom's", "dog", "3", "cats", "él", "can’t"]


def test_repeated_share_counts_what_came_before():
    assert quality.repeated_share("a b c d e".split()) == 0
    assert quality.repeated_share("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert quality.repeated_share("a b c".split()) == 0


@pytest.mark.parametrize("times, looping", [(1, False), (2, False), (3, True)])
def test_a_story_loops_when_eight_words_come_three_times(times, looping):
    assert quality.loops(("one two three four five six seven eight and then " * times).split()) is looping


def test_distinct_looks_at_equally_many_words_of_every_column():
    assert quality.distinct(["a b a b".split(), "a b".split()], 1, limit=100) == 2 / 6
    assert quality.distinct(["a b a b".split(), "c d".split()], 1, limit=3) == 2 / 3
    assert quality.distinct(["a b c".split()], 2, limit=100) == 1


def test_words_and_phrases_of_the_training_text_are_found():
    columns = [[["the", "cat", "sat", "down"]], [["a", "cat", "sat"]]]
    known, copied = quality.scan_training(["Now the cat sat.", "A dog!"], columns, n=3)
    assert known == {"the", "cat", "sat", "a"} and copied == {("the", "cat", "sat")}
    assert quality.share_of(["cat", "cat", "down"], known) == pytest.approx(2 / 3)


@pytest.mark.parametrize("length", [2, 11, 12, 13, 19, 40])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_windows_score_each_token_once_with_half_a_window_before_it(length, first):
    ids, scored = list(range(100, 100 + length)), []
    for x, y in quality.windows(ids, first, 12):
        assert len(x) == len(y) == 12
        for i, target in enumerate(y):
            if target != IGNORE:
                assert x[i] == target - 1
                assert i >= 5 or x[0] == 100
                scored.append(target)
    assert scored == ids[max(first, 1):]


@torch.inference_mode()
def test_perplexity_is_that_of_the_whole_story_where_one_window_holds_it():
    net, ids = awake(TINY), tokens(1, 9)[0].tolist()
    nats = torch.nn.functional.cross_entropy(net(torch.tensor([[1, *ids]]))[0], torch.tensor([*ids, 2]))
    story = quality.Story(ids, True, "")
    assert quality.perplexity(net, [story], 1, 2, 1, 4) == pytest.approx(math.exp(nats), rel=1e-4)


def test_stories_end_at_the_end_or_at_the_limit():
    class Writer:
        device = torch.device("cpu")
        model = awake(TINY)

        class tokenizer:
            eos_id = 7
            decode = staticmethod(str)

    prompts = torch.tensor([[1, 40, 41]] * 30)
    sample = SampleConfig(max_new_tokens=30, temperature=3.0, top_k=0)
    stories = quality.write_stories(Writer, prompts, sample, batch_size=8, seed=1)
    assert len(stories) == 30 and all(story.ids[:2] == [40, 41] for story in stories)
    assert all(7 not in story.ids[2:] and story.ended == (len(story.ids) < 32) for story in stories)
    assert len({tuple(story.ids) for story in stories}) == 30
