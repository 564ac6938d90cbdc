"""The grammar of the built-in corpus read backwards: the choices behind a story, its surprisal, the mean of that."""

import itertools
import math
from functools import cache

from preprocess import GRAMMAR, PRONOUNS, SLOT, STORY, with_article


def parse(story):
    """The choices {name: value} that make `story`; ValueError if the grammar cannot have written it."""
    choices = next(derivations(story), None)
    if choices is None:
        raise ValueError("not a story of the built-in grammar")
    return choices


def story_nats(story):
    """-ln of the probability of `story`."""
    choices = parse(story)
    return -math.fsum(math.log(tables[choices.get(parent)][choices[name]])
                      for name, (parent, tables) in GRAMMAR.items())


def entropy():
    """Mean of story_nats over all stories, exactly: choices that depend on one other form a tree."""
    marginals, nats = {None: {None: 1.0}}, 0.0
    for name, (parent, tables) in GRAMMAR.items():
        marginals[name] = {}
        for value, weight in marginals[parent].items():
            for choice, p in tables[value].items():
                marginals[name][choice] = marginals[name].get(choice, 0.0) + weight * p
                nats -= weight * p * math.log(p)
    return nats


@cache
def split_template(template):
    """'A {child}.' as ('A ', ('child', False), '.'); the flag says that an article comes first."""
    parts = SLOT.split(template)
    slots = [(name, bool(article)) for article, name in zip(parts[1::3], parts[2::3], strict=True)]
    return tuple(item for item in itertools.chain(*itertools.zip_longest(parts[::3], slots)) if item)


def derivations(text, at=0, items=split_template(STORY), choices={}):
    """Yield each way to read `items` from text[at:], as `choices` with what was read added."""
    if not items:
        if at == len(text):
            yield choices
        return
    item, rest = items[0], items[1:]
    if isinstance(item, tuple):
        name, article = item
        value = PRONOUNS[choices.get("child", "boy")].get(name) or choices.get(name)
        if value is None:  # the first mention
            parent, tables = GRAMMAR[name]
            for value in tables[choices.get(parent)]:
                words = (with_article(value),) if article else split_template(value)
                yield from derivations(text, at, words + rest, choices | {name: value})
            return
        item = with_article(value) if article else value
    if text.startswith(item, at):
        yield from derivations(text, at + len(item), rest, choices)
