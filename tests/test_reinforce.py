import json
import math
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import chat
import plot_loss
import preprocess
import reinforce
import train
from config import GPTConfig, ReinforceConfig, SampleConfig
from data import WORDS, Corpus, word_prompt
from model import GPT, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("signals")
FREE = SampleConfig(temperature=1.0, top_k=0, repetition_penalty=1.0)
USUAL = reinforce.Usual(length=60, repeated_4grams=0.01)
FEW = ["--prompts-per-iter", 2, "--group-size", 3, "--eval-prompts", 4, "--eval-tokens", 400, "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a corpus with word prompts, the out folder of a model that was trained on it for a moment)."""
    data, out = (tmp_path_factory.mktemp("words") / name for name in ("data", "out"))
    commands = [(preprocess.main, ["prepare-dataset", "--dataset", "sample", "--word-prompts", 0.8, "--copies", 2,
                                   "--data-dir", data]),
                (train.main, ["--data-dir", data, "--out-dir", out, "--n-layer", 1, "--n-head", 2, "--n-embd", 16,
                              "--intermediate-size", 32, "--block-size", 96, "--position", "rotary", "--dropout", 0.5,
                              "--tokens-per-iter", 768, "--batch-size", 8, "--max-iters", 12, "--eval-interval", 12,
                              "--eval-tokens", 400, "--final-eval-tokens", 400, "--sample-tokens", 0, "--device",
                              "cpu"])]
    with mock.patch.multiple(preprocess, TRAIN_STORIES=600, VAL_STORIES=300):
        for main, words in commands:
            result = CliRunner().invoke(main, list(map(str, words)))
            assert result.exit_code == 0, result.output
    return data, out


@pytest.fixture(scope="module")
def corpus(folders):
    return Corpus(folders[0])


@pytest.fixture
def model(folders):
    return load_checkpoint(folders[1] / "best.pt")[0]


def run(folders, out, *words, expect=0):
    data, start = folders
    words = ["--init-from", start / "best.pt", "--data-dir", data, "--out-dir", out, *FEW, *words]
    result = CliRunner().invoke(reinforce.main, list(map(str, words)))
    assert result.exit_code == expect, result.output
    return result.output


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# -----------------------------------------------------------------------------
# The reward

STORY = ("One day Tim saw a fox in the garden. It had a red umbrella because of the clouds. Soon they were friends, "
         "and all of them went home to eat soup.")


def reward(text, words=("fox", "umbrella", "rain"), length=60, ended=True):
    stories = SimpleNamespace(words=[list(words)], texts=[text], lengths=[length], ended=[ended])
    return reinforce.rewards(stories, USUAL)[0]


def test_each_word_that_is_used_pays_and_all_of_them_pay_more():
    texts = ["A dog sat.", "A fox sat.", "Two foxes had umbrellas.", "The fox had an umbrella. It was raining."]
    assert [reinforce.word_reward(["fox", "umbrella", "rain"], text) for text in texts] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1.5])


@pytest.mark.parametrize("cheat", [
    dict(text="fox umbrella rain", length=5),
    dict(text="Fox, umbrella, rain. " * 12),
    dict(text=STORY + " It rained." + " The fox and the fox and the fox saw a fox, a fox, a fox and a fox." * 2),
    dict(text=STORY + " It rained and it rained and it rained and", ended=False),
    dict(text="A foxglove stood under umbrellalike trees until the train came. " + STORY.replace("fox", "cat")),
], ids=["a list of the words", "the list again and again", "one word many times", "no end", "longer words around them"])
def test_a_story_that_games_the_reward_is_paid_less_than_an_honest_one_that_misses_a_word(cheat):
    assert reward(**cheat) < reward(STORY) == pytest.approx(2 / 3)


def test_each_penalty_is_what_it_says_and_an_ordinary_story_pays_none():
    words, line = ["fox", "umbrella"], "one two three four five "
    assert reinforce.repeated_4grams(line * 2) == pytest.approx(2 / 7) and reinforce.repeated_4grams("a b c") == 0
    assert reinforce.repetition_penalty(line * 2, 2 / 7) == 0
    assert reinforce.repetition_penalty(line * 2, 1 / 7) == pytest.approx(5 / 7)
    assert reinforce.stuffing_penalty(words, "fox foxes " * 2 + "umbrella") == 0
    assert reinforce.stuffing_penalty(words, "fox foxes " * 3 + "umbrella " * 5) == pytest.approx(0.3)
    assert [reinforce.shortness_penalty(n, 60) for n in (60, 20, 15)] == pytest.approx([0, 0, 0.5])
    assert (reinforce.ending_penalty(True), reinforce.ending_penalty(False)) == (0, 0.7)


def test_the_advantage_is_the_reward_minus_the_mean_of_the_others_of_its_group():
    found = reinforce.advantages(np.array([1, 2, 6, 5, 5, 5], dtype=np.float32), 3)
    assert found == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])


# -----------------------------------------------------------------------------
# Prompts and stories

def test_training_prompts_name_words_of_one_training_story_none_held_out_and_have_equally_many_tokens(corpus):
    known, held_out = set(corpus.meta["words"]), set(corpus.meta["held_out_words"])
    stories = [set(WORDS.findall(corpus.tokenizer.decode(corpus.train.story(i)).partition("\n\n")[2]))
               for i in range(len(corpus.train.story_starts))]
    batches = reinforce.training_prompts(corpus, known, 5, np.random.default_rng(0))
    for batch, _ in zip(batches, range(20)):
        assert len(batch) == 5 and len({len(prompt.ids) for prompt in batch}) == 1
        for prompt in batch:
            assert len(set(prompt.words)) == 3 and not set(prompt.words) & held_out
            assert any(set(prompt.words) <= story for story in stories)
            assert corpus.tokenizer.decode(prompt.ids) == word_prompt(prompt.words)


def test_evaluation_asks_for_two_held_out_words_and_another_of_one_validation_story(corpus):
    known, held_out = set(corpus.meta["words"]), set(corpus.meta["held_out_words"])
    prompts = reinforce.held_out_prompts(corpus, known, held_out, 30, np.random.default_rng(0))
    stories = [set(WORDS.findall(corpus.tokenizer.decode(corpus.val.story(i)))) for i in range(len(corpus.val.story_starts))]
    assert len(prompts) == 30
    for prompt in prompts:
        assert len(set(prompt.words) & held_out) == 2 and len(set(prompt.words) & known) == 1
        assert any(set(prompt.words) <= story for story in stories)


def test_a_story_is_what_the_model_wrote_after_the_prompt_up_to_its_end(corpus, model, monkeypatch):
    prompts = [reinforce.Prompt(["a"], [1, 40, 41]) for _ in range(3)]
    room = model.config.block_size - 3
    rows = torch.tensor([[50, 51, -1, -1], [60, -1, -1, -1], [70, 71, 72, 73]])
    monkeypatch.setattr(model, "generate", lambda *args: iter(rows.T))
    stories = reinforce.write_stories(model, prompts, corpus.tokenizer, FREE, None)
    assert stories.ids.tolist() == [[1, 40, 41, 50, 51, 2, 2, 2], [1, 40, 41, 60, 2, 2, 2, 2],
                                    [1, 40, 41, 70, 71, 72, 73, 2]]
    assert stories.written.sum(1).tolist() == [3, 2, 5] and not stories.written[:, :3].any()
    assert stories.lengths.tolist() == [2, 1, 4] and stories.ended.all() and room > 4
    assert stories.texts[0] == corpus.tokenizer.decode([50, 51])


def test_a_story_that_fills_the_context_has_not_ended_and_its_last_token_counts(corpus, model, monkeypatch):
    room = model.config.block_size - 3

    def generate(idx, sampling, *args):
        assert sampling.max_new_tokens == room, "later tokens would be read without the prompt"
        return iter(torch.full((room, 2), 50))
    monkeypatch.setattr(model, "generate", generate)
    stories = reinforce.write_stories(model, [reinforce.Prompt(["a"], [1, 40, 41])] * 2, corpus.tokenizer, FREE, None)
    assert stories.lengths.tolist() == [room, room] and not stories.ended.any()
    assert stories.written.sum(1).tolist() == [room, room] and not stories.written[:, -1].any()
    assert stories.ids.shape[1] == model.config.block_size + 1


# -----------------------------------------------------------------------------
# One update

def random_stories(model, rows=6, length=12):
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    written = torch.arange(length)[None] >= torch.tensor([[4], [4], [4], [8], [8], [8]][:rows])
    return SimpleNamespace(ids=ids, written=written)


def updated(model, batch_size, advantage, **settings):
    config = ReinforceConfig(batch_size=batch_size, **dict(grad_clip=0) | settings)
    learner, start = (load(model) for _ in range(2))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    advantage = np.array(advantage, dtype=np.float32)
    reinforce.update(learner, start, optimizer, scaler, random_stories(model), advantage, 10, config, torch.float32)
    return learner


def load(model):
    twin = GPT(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def story_log_probs(model, stories):
    return (reinforce.log_probs(model, stories.ids) * stories.written[:, 1:]).sum(1)


def test_an_update_makes_stories_above_the_mean_more_likely_and_those_below_less(model):
    advantage = [1, 1, 1, -1, -1, -1]
    stories, learner = random_stories(model), updated(model, 6, advantage)
    change = story_log_probs(learner, stories) - story_log_probs(model, stories)
    assert (change[:3] > 0).all() and (change[3:] < 0).all()


def test_stories_of_equal_reward_teach_nothing(model):
    assert all(torch.equal(a, b) for a, b in zip(updated(model, 6, [0] * 6).parameters(), model.parameters()))


def test_gradients_are_clipped_to_their_norm(model):
    clipped = updated(model, 6, [9, 9, 9, -9, -9, -9], grad_clip=1e-3)
    moved = sum(((a - b) ** 2).sum() for a, b in zip(clipped.parameters(), model.parameters(), strict=True)) ** 0.5
    assert 0 < moved.item() <= 1.01e-5, "at a learning rate of 0.01"


def test_the_micro_batch_changes_nothing_that_is_learned(model):
    one, all_at_once = (updated(model, size, [1, -1, 2, 0, -2, 0]) for size in (1, 6))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(one.parameters(), all_at_once.parameters(), strict=True))


def test_the_loss_counts_the_written_tokens_alone_and_adds_the_divergence_from_the_start():
    log_p, start = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.0, -1.5, -9.0]])
    loss, kl = reinforce.policy_loss(log_p, start, torch.tensor([2.0]), torch.tensor([[True, True, False]]), 0.1, 4)
    k3 = math.exp(0.5) - 0.5 - 1
    assert kl.item() == pytest.approx(k3) and loss.item() == pytest.approx((2 * 3 + 0.1 * k3) / 4)


def test_the_divergence_pulls_back_towards_the_start(model):
    stories = random_stories(model)
    away, start = updated(model, 6, [3, 3, 3, -3, -3, -3]), load(model)
    log_p = reinforce.log_probs(away, stories.ids)
    with torch.no_grad():
        start_log_p = reinforce.log_probs(start, stories.ids)
    loss, before = reinforce.policy_loss(log_p, start_log_p, torch.zeros(6), stories.written[:, 1:], 1.0, 1.0)
    loss.backward()
    with torch.no_grad():
        for weight in away.parameters():
            weight -= 1e-3 * weight.grad
        _, after = reinforce.policy_loss(reinforce.log_probs(away, stories.ids), start_log_p, torch.zeros(6),
                                         stories.written[:, 1:], 1.0, 1.0)
    assert 0 < after < before


# -----------------------------------------------------------------------------
# The whole run

def test_a_model_learns_to_write_what_is_rewarded(folders, tmp_path, monkeypatch):
    def share_of_odd_ids(stories, usual):
        return np.array([(row[written] % 2).float().mean() for row, written in zip(stories.ids, stories.written)])
    monkeypatch.setattr(reinforce, "rewards", share_of_odd_ids)
    run(folders, tmp_path, "--max-iters", 16, "--prompts-per-iter", 4, "--group-size", 8, "--learning-rate", 0.03,
        "--warmup-iters", 0, "--eval-interval", 16)
    rewards = [row["reward"] for row in metrics(tmp_path) if "reward" in row]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    assert [row["lr"] for row in metrics(tmp_path) if "lr" in row] == pytest.approx(
        [0.03 * (1 - it / 16) for it in range(16)])
    divergences = [row["kl"] for row in metrics(tmp_path) if "kl" in row]
    assert abs(divergences[0]) < 1e-6 < 1e-3 < divergences[-1], "from the model that it started from"


def test_the_same_seed_gives_the_same_run_and_another_another_with_other_prompts(folders, tmp_path, monkeypatch):
    outs, asked, real = [tmp_path / name for name in "abc"], [], reinforce.write_stories
    monkeypatch.setattr(reinforce, "write_stories", lambda model, prompts, *args: (
        asked[-1].append([prompt.words for prompt in prompts]) or real(model, prompts, *args)))
    for out, seed in zip(outs, (1, 1, 2)):
        asked.append([])
        run(folders, out, "--max-iters", 3, "--eval-interval", 2, "--seed", seed)
    assert asked[0] == asked[1] and not any(prompts in asked[0] for prompts in asked[2])
    a, b, c = ([{key: value for key, value in row.items() if key != "seconds"} for row in metrics(out)] for out in outs)
    assert a == b != c
    assert [row["iter"] for row in a] == [0, 1, 2, 2, 3, 3]


def test_the_folder_can_be_talked_to_and_drawn_from_the_start_on(folders, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(reinforce, "update", stopped)
        run(folders, tmp_path, expect=130)
    trained, kept = (load_checkpoint(folder / "best.pt") for folder in (folders[1], tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), kept[0].parameters()))
    assert kept[1]["word_prompts"] is True
    assert kept[1]["state"] == dict(iter=0, best_val=metrics(tmp_path)[0]["val_loss"])
    for main, words in ((chat.main, ["--prompt", "Once", "--max-new-tokens", 3]), (plot_loss.main, [])):
        result = CliRunner().invoke(main, list(map(str, [*words, "--out-dir", tmp_path])))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("change, kept", [(dict(), 2), (dict(val_loss=0.031), 0), (dict(val_loss=0.029), 2),
                                          (dict(ended=-0.01), 0), (dict(repeated_4grams=0.001), 0)])
def test_the_best_is_the_one_that_uses_most_words_of_those_that_pass_the_gates(folders, tmp_path, monkeypatch, change,
                                                                               kept):
    count = iter(range(9))
    losses = iter([dict(val_loss=5.0, val_bpb=2.0), *[dict(val_loss=5.0 + change.get("val_loss", 0), val_bpb=2.0)] * 9])

    def evaluate(*args):
        i = next(count)
        worse = {name: change.get(name, 0) * (i > 0) for name in ("ended", "repeated_4grams")}
        return dict(words_used=[0.1, 0.2, 0.3, 0.25][i], all_used=0.0, ended=0.5 + worse["ended"], story_tokens=9.0,
                    repeated_4grams=0.1 + worse["repeated_4grams"])
    monkeypatch.setattr(reinforce, "evaluate", evaluate)
    monkeypatch.setattr(reinforce, "estimate_loss", lambda *args: next(losses))
    output = run(folders, tmp_path, "--max-iters", 3, "--eval-interval", 1)
    assert f"at iteration {kept}, at the start 10.0%" in output
    assert output.count("not kept") == (0 if kept else 3)


def test_ctrl_c_keeps_the_best_so_far_and_ends(folders, tmp_path, monkeypatch):
    real = reinforce.update

    def update(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(reinforce, "update",
                        lambda *args: update(*args) if len(metrics(tmp_path)) == 3 else real(*args))
    output = run(folders, tmp_path, "--max-iters", 9, expect=130)
    assert "Best: words used" in output and metrics(tmp_path)[-1]["iter"] == 3
    assert "words_used" in metrics(tmp_path)[-1] and (tmp_path / "best.pt").exists()


def test_the_benchmark_compares_both_models_and_the_best_of_8_with_standard_errors(folders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import reinforce_words
    best = folders[1] / "best.pt"
    words = ["--data-dir", folders[0], "--before", best, "--after", best, "--plain", best, "--prompts", 6, "--device",
             "cpu", "--json", tmp_path / "rows.json"]
    result = CliRunner().invoke(reinforce_words.main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert len(rows) == 13 and "before, best of 8, of a story" in rows and result.output.count("\n--- ") == 6
    for kind in ("of a story", "known words", "at random"):
        before, after = (rows[f"{when}, temperature 1, {kind}"] for when in ("before", "after"))
        assert {**before, "name": ""} == {**after, "name": ""}, "the same model and the same random numbers"
        assert all(0 <= before[title][0] <= 1 for title in ("words used", "all three", "ended", "3-grams"))
        assert 0 <= before["grammatical"][0] <= 1
    assert figures["losses"]["before"] == figures["losses"]["after"]


def test_what_cannot_work_is_refused_with_what_to_type(folders, tmp_path):
    run(folders, tmp_path / "rl", "--max-iters", 1)
    before = (tmp_path / "rl" / "metrics.jsonl").read_bytes()
    assert "--overwrite replaces it" in run(folders, tmp_path / "rl", expect=1)
    assert (tmp_path / "rl" / "metrics.jsonl").read_bytes() == before
    assert "would be replaced: pass another --out-dir" in run(folders, folders[1], "--overwrite", expect=1)
    plain = shutil.copytree(folders[0], tmp_path / "plain")
    meta = json.loads((plain / "meta.json").read_text(encoding="utf-8"))
    for dataset, share in ("sample", "0.2"), ("tales", "0.8"):
        meta["arguments"]["dataset"] = dataset
        (plain / "meta.json").write_text(json.dumps({name: meta[name] for name in meta if "words" not in name}))
        proposed = run((plain, folders[1]), tmp_path / "new", expect=1)
        assert f"--word-prompts {share}" in proposed and "plain-words" in proposed and "--overwrite" not in proposed
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    model, checkpoint = load_checkpoint(other / "best.pt")
    save_checkpoint(other / "best.pt", GPT(GPTConfig(**{**vars(model.config)})), b"other", preset="demo")
    assert "another tokenizer than the corpus" in run((folders[0], other), tmp_path / "new", expect=1)
    assert not (tmp_path / "new").exists()
