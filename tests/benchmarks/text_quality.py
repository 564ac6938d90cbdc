"""The quality of generated text in numbers, for several sampling settings, beside the same numbers for real stories.

The model continues the first tokens of validation stories, and the real stories are those same ones. All are cut at the
same length. What counts is a column's distance from the real one.
"""

import collections
import re
import sys
import time
from dataclasses import dataclass

import click
import common
import numpy as np
import torch
import torch.nn.functional as F

from chat import LoadedModel
from config import IGNORE_INDEX, SampleConfig, UserError
from data import Corpus

sys.path.insert(0, str(common.ROOT / "tests"))
import grammar  # noqa: E402

UNPENALIZED = dict(repetition_penalty=1.0)
SETTINGS = {
    "greedy": dict(temperature=0.0, **UNPENALIZED),
    "unpenalized": UNPENALIZED,
    "defaults": {},
    "temperature 1": dict(temperature=1.0, top_k=0, **UNPENALIZED),
    "top-p": dict(temperature=0.8, top_k=0, top_p=0.95, **UNPENALIZED),
    "min-p": dict(temperature=1.0, top_k=0, min_p=0.05, **UNPENALIZED),
    "dry": dict(dry_multiplier=0.8, **UNPENALIZED),
    "greedy dry": dict(temperature=0.0, dry_multiplier=0.8, **UNPENALIZED),
}
# (row of the table, how a number is shown)
ROWS = {
    "ends by itself": "{:.1%}", "tokens, 10%": "{:.0f}", "tokens, half": "{:.0f}", "tokens, 90%": "{:.0f}",
    "repeated 4-grams": "{:.2%}", "looping": "{:.2%}", "distinct-1": "{:.4f}", "distinct-2": "{:.4f}",
    "distinct-3": "{:.4f}", "unknown words": "{:.3%}", "copied 8-grams": "{:.1%}", "perplexity": "{:.3f}",
    "grammatical": "{:.1%}",
}


@dataclass
class Story:
    ids: list  # without bos and eos
    ended: bool  # within the limit
    text: str

    def __post_init__(self):
        self.words = split_words(self.text)


# -----------------------------------------------------------------------------
# Numbers: pure functions of lists of words, in lower case

def split_words(text):
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def repeated_fraction(words, n=4):
    """Fraction of the n-grams that occurred before in the text; 0 where there are none."""
    found = ngrams(words, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def loops(words, n=8, times=3):
    """Whether an n-gram occurs `times` times."""
    return any(count >= times for count in collections.Counter(ngrams(words, n)).values())


def distinct(stories, n, limit):
    """Different n-grams per n-gram in the first `limit` words of all stories in a row."""
    found, left = [], limit
    for words in stories:
        found += ngrams(words[:left], n)
        left -= min(left, len(words))
    return len(set(found)) / max(1, len(found))


def scan_training(texts, columns, n=8):
    """(words, n-grams) of the columns' stories that occur in the training texts."""
    wanted_words = {word for stories in columns for words in stories for word in words}
    wanted = {gram for stories in columns for words in stories for gram in ngrams(words, n)}
    known, copied = set(), set()
    for text in texts:
        words = split_words(text)
        known |= wanted_words.intersection(words)
        copied |= wanted.intersection(ngrams(words, n))
    return known, copied


def fraction_of(items, known):
    return sum(item in known for item in items) / max(1, len(items))


def grammatical(text):
    try:
        return bool(grammar.parse(text))
    except ValueError:
        return False


# -----------------------------------------------------------------------------
# Perplexity

def windows(ids, first, block_size):
    """(tokens, targets) of length block_size that score each of ids[first:] once, after at least half a window where
    there is that much before it, as in generation."""
    half, start, scored = block_size // 2, 0, max(first, 1)
    while scored < len(ids):
        x, y = ids[start:start + block_size], ids[start + 1:start + block_size + 1]
        y = [IGNORE_INDEX if start + 1 + i < scored else token for i, token in enumerate(y)]
        yield x + [0] * (block_size - len(x)), y + [IGNORE_INDEX] * (block_size - len(y))
        scored, start = max(scored, start + len(y) + 1), start + half


@torch.inference_mode()
def perplexity(net, stories, bos_id, eos_id, first, batch_size):
    """exp of the mean nats per token from position `first` on, the end of a story included."""
    device, rows = net.wte.weight.device, []
    for story in stories:
        rows += windows([bos_id, *story.ids, *([eos_id] if story.ended else [])], first, net.config.block_size)
    nats, count = 0.0, 0
    for at in range(0, len(rows), batch_size):
        x, y = (torch.tensor(part, device=device) for part in zip(*rows[at:at + batch_size]))
        logits = net(x).float()
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum").item()
        count += (y != IGNORE_INDEX).sum().item()
    return float(np.exp(nats / max(1, count)))


# -----------------------------------------------------------------------------
# The stories

def real_stories(corpus, count, prompt_tokens, limit):
    """`count` validation stories, evenly spread, of those longer than the prompt."""
    lengths = story_lengths(corpus.val)
    long_enough = np.flatnonzero(lengths > prompt_tokens)
    if len(long_enough) < count:
        raise UserError(f"there are {len(long_enough)} validation stories of more than {prompt_tokens} tokens: pass "
                        f"--count {len(long_enough)} or less.")
    for i in long_enough[np.linspace(0, len(long_enough) - 1, count).astype(int)]:
        ids = corpus.val.read(corpus.val.story_starts[i] + 1, lengths[i]).tolist()
        cut = ids[:limit]
        yield Story(cut, len(ids) < limit, corpus.tokenizer.decode(cut))


def story_lengths(stream):
    """Tokens of each story without bos and eos."""
    return np.diff(stream.story_starts, append=len(stream)) - 2


def generate_stories(loaded, prompts, sampling, batch_size, seed):
    """The model's continuation of each prompt (N, P), prompt included."""
    stories = []
    for index, part in enumerate(prompts.chunk(-(-len(prompts) // batch_size))):
        generator = torch.Generator(loaded.device).manual_seed(seed + index)
        steps = list(loaded.model.generate(part.to(loaded.device), sampling, loaded.tokenizer.eos_id, generator))
        rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in part]
        for prompt, row in zip(part.tolist(), rows):
            new = [token for token in row if token != -1]
            ids = prompt[1:] + new
            stories.append(Story(ids, len(new) < sampling.max_new_tokens, loaded.tokenizer.decode(ids)))
    return stories


def training_texts(corpus):
    for start, length in zip(corpus.train.story_starts.tolist(), story_lengths(corpus.train).tolist()):
        yield corpus.tokenizer.decode(corpus.train.read(start + 1, length))


def figures(stories, known, copied, words_limit):
    """All numbers of a column except the perplexity."""
    words = [story.words for story in stories]
    lengths = [len(story.ids) for story in stories]
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9]).tolist()
    grams = [gram for story in words for gram in ngrams(story, 8)]
    return {
        "ends by itself": float(np.mean([story.ended for story in stories])),
        **dict(zip(("tokens, 10%", "tokens, half", "tokens, 90%"), quantiles)),
        "repeated 4-grams": float(np.mean([repeated_fraction(story) for story in words])),
        "looping": float(np.mean([loops(story) for story in words])),
        **{f"distinct-{n}": distinct(words, n, words_limit) for n in (1, 2, 3)},
        "unknown words": 1 - fraction_of([word for story in words for word in story], known),
        "copied 8-grams": fraction_of(grams, copied),
    }


def print_table(columns):
    names = list(columns)
    widths = (18, *(max(10, len(name)) for name in names))
    common.print_row(["", *names], widths)
    for row, form in ROWS.items():
        if any(row in column for column in columns.values()):
            common.print_row([row, *(form.format(column[row]) for column in columns.values())], widths)


@click.command()
@click.option("--checkpoint", type=click.Path(), default="out/best.pt", show_default=True, help="the model")
@click.option("--data-dir", type=click.Path(), default="data", show_default=True, help="the corpus it was trained on")
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="stories per column")
@click.option("--max-new-tokens", "limit", type=click.IntRange(2), default=600, show_default=True,
              help="maximum length of a story, in tokens, its beginning included")
@click.option("--prompt-tokens", type=click.IntRange(0), default=8, show_default=True,
              help="tokens of a real story to begin with; 0: stories from nothing")
@click.option("--settings", "chosen", type=click.Choice(list(SETTINGS)), multiple=True, help="columns; all if omitted")
@click.option("--batch-size", type=click.IntRange(1), help="stories at once  [default: 256 on CUDA, else 32]")
@click.option("--seed", default=1, show_default=True, help="seed of the first batch")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16")
@common.json_option
@common.tiny_option
def main(checkpoint, data_dir, count, limit, prompt_tokens, chosen, batch_size, seed, device, dtype, json_path, tiny):
    """Measure the quality of a model's text."""
    if tiny:
        count, limit, chosen = 4, 20, ("greedy", "defaults")
    if prompt_tokens >= limit:
        raise UserError(f"--prompt-tokens {prompt_tokens} is too many: pass less than --max-new-tokens ({limit}).")
    loaded, corpus = LoadedModel(checkpoint, device, dtype), Corpus(data_dir)
    tokenizer = corpus.tokenizer
    if tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(f"{checkpoint} has another tokenizer than the corpus in {data_dir}: pass its --data-dir.")
    batch_size = batch_size or (256 if loaded.device.type == "cuda" else 32)
    print(f"{loaded.description} {count:,} stories of at most {limit} tokens, the first {prompt_tokens} given.")

    stories = {"real": list(real_stories(corpus, count, prompt_tokens, limit))}
    prompts = torch.tensor([[tokenizer.bos_id, *story.ids[:prompt_tokens]] for story in stories["real"]])
    for name in chosen or SETTINGS:
        sampling, start = SampleConfig(max_new_tokens=limit - prompt_tokens, **SETTINGS[name]), time.perf_counter()
        stories[name] = generate_stories(loaded, prompts, sampling, batch_size, seed)
        seconds = time.perf_counter() - start
        tokens = sum(len(story.ids) - prompt_tokens for story in stories[name])
        print(f"  {name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second", flush=True)

    words = {name: [story.words for story in column] for name, column in stories.items()}
    known, copied = scan_training(training_texts(corpus), words.values())
    fewest = min(sum(map(len, column)) for column in words.values())  # distinct-n falls with length: same for all
    columns = {}
    for name, column in stories.items():
        columns[name] = figures(column, known, copied, fewest)
        columns[name]["perplexity"] = perplexity(loaded.model, column, tokenizer.bos_id, tokenizer.eos_id,
                                                 prompt_tokens + 1, min(batch_size, 64))
        if corpus.meta["source"] == "sample":
            columns[name]["grammatical"] = float(np.mean([grammatical(story.text) for story in column]))
    print()
    print_table(columns)
    for name, column in stories.items():
        print(f"\n--- {name}{'' if name == 'real' else f' {SETTINGS[name]}'}\n{column[0].text}", flush=True)
    common.write_json(json_path, checkpoint=str(checkpoint), description=loaded.description, count=count, limit=limit,
                      prompt_tokens=prompt_tokens, seed=seed, settings=SETTINGS, columns=columns,
                      examples={name: column[0].text for name, column in stories.items()}, **common.today())


if __name__ == "__main__":
    main()
