"""What reinforce.py changed: a model before and after it, asked for stories with held-out words.

    python tests/benchmarks/reinforce_words.py --data-dir data/words --before out/words/best.pt --after out/rl/best.pt \
        --plain out/plain/best.pt

Prompts name three content words of one validation story, two of them held out, or none, or three held-out words at random.
Beside both models stands what costs no training: the best of 8 stories of the model before, by the same reward. Standard
errors are over prompts.
"""

import itertools
import math
import sys
import time

import click
import common
import numpy as np
import torch
from text_quality import distinct, grammatical, split_words

import reinforce
from config import SampleConfig
from data import Corpus, Validation, word_prompt, words_used
from model import choose_device, choose_dtype, load_checkpoint, prepare_for_inference
from train import estimate_loss

WIDTHS = (34, 13, 13, 13, 9, 15, 11, 15, 13)
TITLES = ("stories", "words used", "all three", "ended", "tokens", "repeated 4-gr.", "3-grams", "bits per byte",
          "grammatical")
FREE = SampleConfig(temperature=1.0, top_k=0, repetition_penalty=1.0)
SAMPLINGS = {"temperature 1": FREE, "chat's defaults": SampleConfig()}


def write(model, prompts, tokenizer, sampling, samples, seed, rows=512):
    """For each prompt `samples` stories (words, text, length, ended)."""
    generator, found = torch.Generator(model.wte.weight.device).manual_seed(seed), []
    for group in reinforce.equally_long(prompts):
        for i in range(0, len(group), rows // samples):
            part = [prompt for prompt in group[i:i + rows // samples] for _ in range(samples)]
            stories = reinforce.write_stories(model, part, tokenizer, sampling, generator)
            records = list(zip(stories.words, stories.texts, stories.lengths, stories.ended))
            found += [records[j:j + samples] for j in range(0, len(records), samples)]
    return found


@torch.no_grad()
def bits_per_byte(plain, text, ended, tokenizer, device):
    """Of one story under a model that was trained without headers."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text), *([tokenizer.eos_id] if ended else [])][:plain.config.block_size + 1]
    if len(ids) < 2:
        return math.nan
    nats = -reinforce.log_probs(plain, torch.tensor([ids], device=device)).sum().item()
    return nats / math.log(2) / max(1, len(tokenizer.decode(ids).encode()))


def mean_and_error(values):
    return float(np.mean(values)), float(np.std(values) / len(values) ** 0.5)


def figures(stories, plain, tokenizer, device, built_in):
    """{title: (mean, standard error)} of one story (words, text, length, ended) per prompt."""
    used = [len(words_used(words, text)) / len(words) for words, text, _, _ in stories]
    columns = [used, [share == 1 for share in used], [ended for *_, ended in stories],
               [length for _, _, length, _ in stories], [reinforce.repeated_4grams(text) for _, text, _, _ in stories]]
    result = {title: mean_and_error(column) for title, column in zip(TITLES[1:], columns)}
    if built_in:
        result["grammatical"] = mean_and_error([grammatical(text) for _, text, _, _ in stories])
    result["3-grams"] = (distinct([split_words(text) for _, text, _, _ in stories], 3, 50 * len(stories)), None)
    if plain:
        bits = np.array([bits_per_byte(plain, text, ended, tokenizer, device) for _, text, _, ended in stories])
        result["bits per byte"] = mean_and_error(bits[np.isfinite(bits)])
    return result


def show(name, row):
    cells = [name]
    for title in TITLES[1:]:
        mean, error = row.get(title, (None, None))
        digits = 1 if title == "tokens" else 4 if title == "repeated 4-gr." else 3
        cells.append(mean if mean is None else f"{mean:.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}"))
    common.print_row(cells, WIDTHS)


@click.command()
@common.data_dir_option
@click.option("--before", required=True, type=click.Path(exists=True), help="checkpoint that reinforce.py started from")
@click.option("--after", required=True, type=click.Path(exists=True), help="checkpoint that it wrote")
@click.option("--plain", type=click.Path(exists=True), help="checkpoint trained without headers, same tokenizer: judges")
@click.option("--prompts", "count", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--device", default="auto", show_default=True)
@common.memory_option
@common.json_option
def main(data_dir, before, after, plain, count, seed, device, memory_gib, json_path):
    """Words used, and what they cost, before and after reinforce.py."""
    common.limit_memory(memory_gib)
    started, corpus, device = time.monotonic(), Corpus(data_dir), choose_device(device)
    tokenizer, usual, dtype = corpus.tokenizer, reinforce.Usual.of(corpus.val, corpus.tokenizer), choose_dtype("auto", device)
    known, held_out = set(corpus.meta["words"]), set(corpus.meta["held_out_words"])
    rng = np.random.default_rng(seed)
    of_story = reinforce.held_out_prompts(corpus, known, held_out, count, rng)
    at_random = []
    for _ in of_story:
        words = [str(word) for word in rng.choice(sorted(held_out), 3, replace=False)]
        at_random.append(reinforce.Prompt(words, [tokenizer.bos_id, *tokenizer.encode(word_prompt(words))]))
    built_in = corpus.meta["arguments"]["dataset"] == "sample"
    order = rng.permutation(len(corpus.val.story_starts))
    of_known = [*itertools.islice(reinforce.word_prompts(corpus.val, tokenizer, order, [(known, 3)], rng), count)]
    judge = load_checkpoint(plain)[0].to(device) if plain else None
    rows, examples = [], {}

    def add(name, stories):
        rows.append(dict(name=name, **figures(stories, judge, tokenizer, device, built_in)))
        show(name, rows[-1])
        common.write_json(json_path, rows=rows, losses=losses, prompts=len(of_story), seconds=round(time.monotonic() - started),
                          **common.today())

    common.print_row(TITLES, WIDTHS)
    losses = {}
    for when, path in (("before", before), ("after", after)):
        model, checkpoint = load_checkpoint(path)
        aligned = checkpoint.get("train_config", {}).get("align_stories", False)
        validation = Validation(corpus, model.to(device).config.block_size, 0, aligned)
        losses[when] = estimate_loss(model, validation, 64, device, dtype)
        model.eval()
        prepare_for_inference(model, device, dtype if device.type == "cuda" else torch.float32)
        for setting, sampling in SAMPLINGS.items():
            for kind, prompts in (("of a story", of_story), ("known words", of_known), ("at random", at_random)):
                stories = [first for first, *_ in write(model, prompts, tokenizer, sampling, 1, seed)]
                add(f"{when}, {setting}, {kind}", stories)
                examples.setdefault(when, stories[:3])
        if when == "before":
            def reward(story):
                words, text, length, ended = story
                return reinforce.rewards(reinforce.Stories([words], [text], [ended], [length], None, None), usual)[0]
            best = [max(stories, key=reward) for stories in write(model, of_story, tokenizer, FREE, 8, seed)]
            add("before, best of 8, of a story", best)
    print("\nvalidation loss without headers:", ", ".join(f"{when} {loss['val_loss']:.4f}" for when, loss in losses.items()))
    for when, stories in examples.items():
        for words, text, _, _ in stories:
            print(f"\n--- {when}: {', '.join(words)} (used: {', '.join(words_used(words, text)) or 'none'})\n{text}")


if __name__ == "__main__":
    sys.exit(main())
