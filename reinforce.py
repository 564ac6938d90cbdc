"""Reinforcement learning with a reward that can be checked: a story that uses the words of its prompt.

    python reinforce.py --init-from out/words/best.pt --data-dir data/words --out-dir out/rl

For each prompt, "Words: fox, umbrella, rain.", the model writes a group of stories. One whose reward is above the mean
of its group becomes more likely, the others less (REINFORCE with a leave-one-out baseline, Ahmadian et al. 2024). All
are written by the present model and used once, so no ratio needs clipping.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that importing torch takes: no traceback

import copy
import itertools
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import click
import numpy as np
import torch
import torch.nn.functional as F

from config import (CONTEXT_SETTINGS, Command, ReinforceConfig, SampleConfig, UserError, folder_lock, only_fields,
                    quoted, setting_options)
from data import WORDS, Corpus, Validation, inflections, prepare_command, word_prompt, words_used, write_json
from model import (autocast, choose_device, choose_dtype, load_checkpoint, out_of_memory_advice, prepare_for_inference,
                   save_checkpoint)
from train import (MetricsFile, StopRequest, clip_grad_norm, estimate_loss, format_seconds, print0,
                   refuse_other_tokenizer)

# A model that unlearned more than this to please the reward is not kept.
MAX_VAL_LOSS_RISE = 0.03  # nats, of text without word prompts
ENOUGH_ENDED = 0.98       # fraction of stories, and
FEW_REPEATED = 0.002      # of 4-grams: what is worse than before, but better than these, is chance


# -----------------------------------------------------------------------------
# Prompts

@dataclass
class Prompt:
    words: list
    ids: list


def word_prompts(stream, tokenizer, story_numbers, sources, rng):
    """Yield a Prompt for each of these stories that has enough content words: `sources` is [(words, how many)]."""
    for i in story_numbers:
        in_text = set(WORDS.findall(tokenizer.decode(stream.story(i))))
        found = [(sorted(in_text & words), count) for words, count in sources]
        if all(len(candidates) >= count for candidates, count in found):
            chosen = [str(word) for candidates, count in found for word in rng.choice(candidates, count, replace=False)]
            rng.shuffle(chosen)
            yield Prompt(chosen, [tokenizer.bos_id, *tokenizer.encode(word_prompt(chosen))])


def training_prompts(corpus, known_words, count, rng):
    """Yield lists of `count` prompts with equally many tokens, which generation needs, from the training stories."""
    numbers = iter(lambda: int(rng.integers(len(corpus.train.story_starts))), None)
    by_length = {}
    for prompt in word_prompts(corpus.train, corpus.tokenizer, numbers, [(known_words, 3)], rng):
        group = by_length.setdefault(len(prompt.ids), [])
        group.append(prompt)
        if len(group) == count:
            yield by_length.pop(len(prompt.ids))


def held_out_prompts(corpus, known_words, held_out_words, count, rng):
    """Up to `count` prompts of two held-out words and another, each three from one validation story."""
    numbers, sources = rng.permutation(len(corpus.val.story_starts)), [(held_out_words, 2), (known_words, 1)]
    prompts = [*itertools.islice(word_prompts(corpus.val, corpus.tokenizer, numbers, sources, rng), count)]
    if not prompts:
        raise UserError("no validation story has three content words to ask for: prepare more text.")
    return prompts


def equally_long(prompts):
    """The prompts in groups of equally many tokens."""
    by_length = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.ids), []).append(prompt)
    return by_length.values()


# -----------------------------------------------------------------------------
# Stories

@dataclass
class Stories:
    """Stories that the model wrote, one per row."""

    words: list          # those that each prompt asked for
    texts: list
    ended: np.ndarray    # bool: not cut off by the context
    lengths: np.ndarray  # tokens, without eos
    ids: torch.Tensor    # (B, S) on the device: prompt, story, eos
    written: torch.Tensor  # (B, S) bool: the tokens that the model chose


@torch.no_grad()
def write_stories(model, prompts, tokenizer, sampling, generator):
    """Stories for prompts with equally many tokens, up to the end of the context."""
    device, prompt_tokens = model.wte.weight.device, len(prompts[0].ids)
    idx = torch.tensor([prompt.ids for prompt in prompts], device=device)
    room = model.config.block_size - prompt_tokens
    steps = model.generate(idx, replace(sampling, max_new_tokens=room), tokenizer.eos_id, generator)
    ids = torch.stack([*steps, torch.full((len(idx),), -1)], dim=1)  # (B, T), -1 after the end of a story
    lengths = (ids >= 0).sum(dim=1)
    ended = lengths < room
    written = torch.arange(ids.shape[1]) < (lengths + ended)[:, None]
    texts = [tokenizer.decode(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
    ids = torch.cat([idx, ids.masked_fill(ids < 0, tokenizer.eos_id).to(device)], dim=1)
    return Stories([prompt.words for prompt in prompts], texts, ended.numpy(), lengths.numpy(), ids,
                   F.pad(written, (prompt_tokens, 0)).to(device))


# -----------------------------------------------------------------------------
# The reward: what can be counted, and what each way to cheat costs

def repeated_4grams(text):
    """Fraction of the sequences of four words that occurred in the text before."""
    words = WORDS.findall(text.lower())
    grams = list(zip(words, words[1:], words[2:], words[3:]))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def word_reward(words, text):
    """The fraction of the words that the text uses, and half a point for all of them."""
    used = len(words_used(words, text))
    return used / len(words) + 0.5 * (used == len(words))


def repetition_penalty(text, usual):
    """For repeating more than the corpus does."""
    return 5 * max(0.0, repeated_4grams(text) - usual)


def stuffing_penalty(words, text):
    """For each use of a word beyond the fourth."""
    in_text = WORDS.findall(text.lower())
    uses = (sum(other in inflections(word) for other in in_text) for word in words)
    return 0.1 * sum(max(0, count - 4) for count in uses)


def shortness_penalty(length, usual):
    """For less than a third of the usual length: a bare list of the words must not pay."""
    return 2 * max(0.0, 1 - length / (usual / 3))


def ending_penalty(ended):
    return 0.0 if ended else 0.7


@dataclass
class Usual:
    """What the stories of the corpus are like: the reward asks for no more."""

    length: float
    repeated_4grams: float

    @classmethod
    def of(cls, stream, tokenizer, count=500):
        stories = [stream.story(i) for i in range(min(count, len(stream.story_starts)))]
        return cls(fmean(len(story) - 2 for story in stories),
                   fmean(repeated_4grams(tokenizer.decode(story)) for story in stories))


def rewards(stories, usual):
    """(B,) float32"""
    return np.array([word_reward(words, text) - repetition_penalty(text, usual.repeated_4grams)
                     - stuffing_penalty(words, text) - shortness_penalty(length, usual.length) - ending_penalty(ended)
                     for words, text, length, ended in
                     zip(stories.words, stories.texts, stories.lengths, stories.ended)], dtype=np.float32)


def advantages(rewards, group_size):
    """Each reward minus the mean of the others of its group, (B,)."""
    groups = rewards.reshape(-1, group_size)
    return ((groups - groups.mean(axis=1, keepdims=True)) * group_size / (group_size - 1)).reshape(-1)


# -----------------------------------------------------------------------------
# One update

def log_probs(model, ids):
    """Log-probability (B, S - 1) of each token of ids (B, S) after those before it."""
    logits = model(ids[:, :-1]).float()
    return -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def policy_loss(log_p, start_log_p, advantage, written, kl_weight, scale):
    """(loss, summed KL) over the tokens that the model wrote: (B, T) each, advantage (B,).

    Every token counts the same, whatever the length of its story: the sum is divided by a constant, `scale`. KL is to
    the model at the start, by the estimator k3 (Schulman 2020).
    """
    log_ratio = start_log_p - log_p
    kl = log_ratio.exp() - log_ratio - 1
    loss = (-advantage[:, None] * log_p + kl_weight * kl) * written
    return loss.sum() / scale, (kl.detach() * written).sum()


def update(model, start_model, optimizer, scaler, stories, advantage, scale, config, dtype):
    """One step of the optimizer on these stories; returns (KL per token, gradient norm)."""
    device, kl_sum = stories.ids.device, 0.0
    advantage = torch.from_numpy(advantage).to(device)
    for i in range(0, len(advantage), config.batch_size):
        rows = slice(i, i + config.batch_size)
        ids, written = stories.ids[rows], stories.written[rows, 1:]
        with autocast(device, dtype):
            with torch.no_grad():
                start_log_p = log_probs(start_model, ids)
            log_p = log_probs(model, ids)
            loss, kl = policy_loss(log_p, start_log_p, advantage[rows], written, config.kl_weight, scale)
        scaler.scale(loss).backward()
        kl_sum += kl
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(model, config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return (kl_sum / stories.written.sum()).item(), norm.item()


# -----------------------------------------------------------------------------
# Evaluation

def describe_stories(stories):
    """Means over stories: what the reward and the gates are about."""
    used = [len(words_used(words, text)) / len(words) for words, text in zip(stories.words, stories.texts)]
    return dict(words_used=fmean(used), all_used=fmean(share == 1 for share in used), ended=float(stories.ended.mean()),
                story_tokens=float(stories.lengths.mean()), repeated_4grams=fmean(map(repeated_4grams, stories.texts)))


def evaluate(model, prompts, tokenizer, sampling, seed):
    """describe_stories of one story per prompt, always with the same random numbers."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    parts = [(len(group), describe_stories(write_stories(model, group, tokenizer, sampling, generator)))
             for group in equally_long(prompts)]
    return {name: sum(count * part[name] for count, part in parts) / len(prompts) for name in parts[0][1]}


# -----------------------------------------------------------------------------
# The loop

def reinforce(model, checkpoint, corpus, config, stop):
    """Write the best model that passes the gates as best.pt; returns (evaluation at the start, evaluation of that)."""
    device, tokenizer, out_dir = choose_device(config.device), corpus.tokenizer, Path(config.out_dir)
    dtype = choose_dtype(config.dtype, device)
    torch.set_float32_matmul_precision("high")
    model.to(device)  # it stays in evaluation mode: without dropout its probabilities are those it wrote with
    start_model, writer = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    prepare_for_inference(writer, device, dtype if device.type == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    sampling = SampleConfig(temperature=1.0, top_k=0, repetition_penalty=1.0)  # the distribution that is learned
    generator, rng = torch.Generator(device).manual_seed(config.seed), np.random.default_rng(config.seed)

    known, held_out = set(corpus.meta["words"]), set(corpus.meta["held_out_words"])
    eval_prompts = held_out_prompts(corpus, known, held_out, config.eval_prompts, rng)
    prompts = training_prompts(corpus, known, config.prompts_per_iter, rng)
    usual = Usual.of(corpus.val, tokenizer)
    aligned = checkpoint.get("train_config", {}).get("align_stories", False)
    validation = Validation(corpus, model.config.block_size, config.eval_tokens, aligned)
    print0(f"{len(known):,} words to ask for, {len(held_out):,} held out for evaluation. A usual story has "
           f"{usual.length:.0f} tokens; {usual.repeated_4grams:.1%} of its 4-grams are repetitions.")

    metrics = MetricsFile(out_dir / "metrics.jsonl")
    start, best, seconds, tokens = None, None, 0.0, 0
    for it in range(config.max_iters + 1):
        # Evaluate, and keep the best that passes the gates
        if it % config.eval_interval == 0 or it == config.max_iters or stop.signal:
            result = evaluate(writer, eval_prompts, tokenizer, sampling, config.seed)
            result |= estimate_loss(model, validation, config.batch_size, device, dtype)
            model.eval()
            start = start or result
            most_repeated = max(start["repeated_4grams"], usual.repeated_4grams, FEW_REPEATED)
            passed = (result["val_loss"] <= start["val_loss"] + MAX_VAL_LOSS_RISE
                      and result["ended"] >= min(start["ended"], ENOUGH_ENDED)
                      and result["repeated_4grams"] <= most_repeated)
            metrics.write(iter=it, tokens=tokens, seconds=round(seconds, 3), **result)
            print0(f"iter {it}, held-out prompts: words used {result['words_used']:.1%}, all three "
                   f"{result['all_used']:.1%}, ended {result['ended']:.0%}, repeated 4-grams "
                   f"{result['repeated_4grams']:.1%}, validation loss {result['val_loss']:.4f}"
                   f"{'' if passed else ' (not kept: worse than the start)'}")
            if passed and (best is None or result["words_used"] > best["words_used"]):
                best = dict(result, iter=it)
                state = dict(iter=it, best_val=result["val_loss"])
                save_checkpoint(out_dir / "best.pt", model, tokenizer.model_bytes, **checkpoint, state=state)
        if it == config.max_iters or stop.signal:
            return start, best

        # Write stories, judge them, and make those above the mean of their group more likely
        started = time.perf_counter()
        group = [prompt for prompt in next(prompts) for _ in range(config.group_size)]
        stories = write_stories(writer, group, tokenizer, sampling, generator)
        reward = rewards(stories, usual)
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.learning_rate * lr_multiplier(it, config)
        kl, norm = update(model, start_model, optimizer, scaler, stories, advantages(reward, config.group_size),
                          len(reward) * usual.length, config, dtype)
        for weight, learned in zip(writer.parameters(), model.parameters(), strict=True):
            weight.data.copy_(learned.data)
        stop.can_save = True

        # A line of the log
        seconds, tokens = seconds + time.perf_counter() - started, tokens + int(stories.written.sum())
        facts = describe_stories(stories)
        metrics.write(iter=it + 1, tokens=tokens, seconds=round(seconds, 3), reward=float(reward.mean()), kl=kl,
                      lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
                      **{f"train_{name}": value for name, value in facts.items()})
        left = format_seconds(seconds / (it + 1) * (config.max_iters - it - 1))
        print0(f"iter {it + 1}/{config.max_iters}: reward {reward.mean():.3f}, words used {facts['words_used']:.1%}, "
               f"KL {kl:.4f} per token, {facts['story_tokens']:.0f} tokens, gradient {norm:.2f}, {left} left")


def lr_multiplier(it, config):
    """Linear warmup, then linear to 0."""
    return min((it + 1) / (config.warmup_iters + 1), 1 - it / config.max_iters)


# -----------------------------------------------------------------------------
# The command

@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--init-from", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="best.pt of a model that was trained on the corpus in --data-dir")
@click.option("--overwrite", is_flag=True, help="replace the run in --out-dir")
@setting_options(ReinforceConfig)
def main(init_from, overwrite, **given):
    """Teach a model to use the three words of a prompt, by a reward that is counted.

    Prepare the text with preprocess.py --word-prompts 0.8 and train a model on it first. Ctrl-C keeps the best so far.
    """
    config = ReinforceConfig(**only_fields(ReinforceConfig, given))
    model, checkpoint = load_checkpoint(init_from)
    corpus, out_dir = Corpus(config.data_dir), Path(config.out_dir)
    if "words" not in corpus.meta:
        before = corpus.meta["arguments"]
        arguments = before | dict(word_prompts=0.2 if before.get("dataset") == "sample" else 0.8)
        raise UserError(f"the corpus in {config.data_dir} was prepared without word prompts: run "
                        f"{prepare_command(f'{Path(config.data_dir)}-words', arguments)}, and train a model on it.")
    refuse_other_tokenizer(checkpoint, corpus, init_from, config.data_dir)
    if init_from.resolve().parent == out_dir.resolve():
        raise UserError(f"{init_from} would be replaced: pass another --out-dir.")
    with folder_lock(out_dir):
        if (out_dir / "best.pt").exists() and not overwrite:
            raise UserError(f"{out_dir} already contains a run: --overwrite replaces it, another --out-dir keeps both.")
        for name in ("best.pt", "ckpt.pt", "metrics.jsonl"):
            (out_dir / name).unlink(missing_ok=True)
        write_json(out_dir / "config.json",
                   dict(preset=checkpoint.get("preset"), model=asdict(model.config), reinforce=asdict(config)))
        kept = {name: checkpoint[name] for name in ("preset", "train_config", "corpus", "word_prompts")
                if name in checkpoint}
        stop = StopRequest()
        with out_of_memory_advice(lambda: f"out of memory: rerun with --batch-size {max(1, config.batch_size // 2)}, "
                                  "or with fewer --prompts-per-iter."):
            start, best = reinforce(model, kept, corpus, config, stop)
    print0(f"Best: words used in held-out prompts {best['words_used']:.1%} at iteration {best['iter']}, at the start "
           f"{start['words_used']:.1%}. Try it: python chat.py --out-dir {quoted(out_dir)} "
           '--words "fox, garden, hat"')
    if stop.signal:
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
