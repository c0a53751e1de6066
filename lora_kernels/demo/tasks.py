"""Three questions about a docstring. Training and held-out texts come from different source files.

Topic is no task here: a linear head on the frozen sentence encoder already tells module families apart as well
as an adapter does. What these ask for is form, which a sentence embedding does not keep.
"""

import dataclasses
import random
import re
import zlib
from collections.abc import Callable

_SENTENCE = re.compile(r"(.{20,160}?)[.!?](?:\s|$)")


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    question: str
    labels: tuple[str, ...]
    example: Callable  # Docstring -> (text, label), or None where it gives no example


@dataclasses.dataclass(frozen=True)
class Example:
    text: str
    label: int


def _kind(doc):
    return doc.text, doc.kind


def _cut(doc):
    sentence = _SENTENCE.match(doc.text)
    words = sentence.group(1).split() if sentence else []
    if len(words) < 6:
        return None
    draw = _own_random(doc)
    if draw.random() < 0.5:
        return " ".join(words), "whole"
    return " ".join(words[: draw.randint(len(words) // 2, len(words) - 2)]).rstrip(",;:"), "cut"


def _typo(doc):
    words = doc.text.split()[:20]
    places = [i for i, word in enumerate(words) if word.isalpha() and word.islower() and len(word) >= 4]
    if len(words) < 5 or not places:
        return None
    draw = _own_random(doc)
    if draw.random() < 0.5:
        return " ".join(words), "clean"
    place = draw.choice(places)
    word = words[place]
    at = draw.randint(0, len(word) - 2)
    words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return (" ".join(words), "typo") if words[place] != word else None


TASKS = (
    Task("kind", "of what: a class, a function or a method?", ("class", "function", "method"), _kind),
    Task("cut", "is the sentence whole, or was its end cut off?", ("cut", "whole"), _cut),
    Task("typo", "were two letters of a word swapped?", ("clean", "typo"), _typo),
)
MAX_LABELS = max(len(task.labels) for task in TASKS)


def split(docs, task, per_label, held_out_per_label, seed=0):
    """``(train, held_out)`` lists of examples, at most so many of each label."""
    docs = list(docs)
    random.Random(seed).shuffle(docs)
    sides = {False: [], True: []}
    counts = {}
    for doc in docs:
        example = task.example(doc)
        if example is None:
            continue
        text, label = example
        # A third of the files. The recipe (epochs, learning rate) was chosen on another third: remainder 0.
        held_out = zlib.crc32(doc.file.encode()) % 3 == 1
        counts[held_out, label] = counts.get((held_out, label), 0) + 1
        if counts[held_out, label] <= (held_out_per_label if held_out else per_label):
            sides[held_out].append(Example(text, task.labels.index(label)))
    return sides[False], sides[True]


def _own_random(doc):
    return random.Random(zlib.crc32(doc.text.encode()))
