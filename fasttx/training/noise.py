"""Which tokens are hidden: the random parts of the objectives, on numpy arrays."""

import numpy as np

__all__ = ["infilling_spans", "masked_positions", "t5_counts", "t5_spans"]


def masked_positions(n: int, rate: float, words: np.ndarray | None, rng) -> np.ndarray:
    """bool [n]: each token with probability rate; with `words` (True where one begins) each word
    whole. At least one, as BERT has it."""
    if words is None:
        chosen = rng.random(n) < rate
        if n and not chosen.any():
            chosen[rng.integers(n)] = True
        return chosen
    word = np.cumsum(words)
    word -= word[0]
    chosen = rng.random(word[-1] + 1) < rate
    if not chosen.any():
        chosen[rng.integers(len(chosen))] = True
    return chosen[word]


def t5_spans(n: int, density: float, mean: float, rng) -> np.ndarray:
    """bool [n], True: noise, as T5's random_spans_noise_mask: round(n density) tokens in
    round(noise / mean) spans, both parted at random, a kept span first.

    Source: google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py.
    """
    noise, spans = t5_counts(n, density, mean)
    if n < 2:
        return np.ones(n, bool)
    lengths = np.stack([_parts(n - noise, spans, rng), _parts(noise, spans, rng)], 1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def t5_counts(n: int, density: float, mean: float) -> tuple[int, int]:
    """(noise tokens, spans) of n tokens; a single token is noise."""
    if n < 2:
        return n, n
    noise = min(max(round(n * density), 1), n - 1)
    return noise, min(max(round(noise / mean), 1), n - noise)


def _parts(total: int, count: int, rng) -> np.ndarray:
    """total as a sum of count positive numbers, every way as likely."""
    cuts = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def infilling_spans(n: int, rate: float, mean: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the spans that a mask each takes the place of, in order, not touching:
    lengths Poisson(mean), drawn until ceil(n rate) tokens are covered and the last cut short; a
    span of length 0 puts a mask between two tokens. There are never more spans than covered tokens.
    """
    covered = int(np.ceil(n * rate))
    lengths, total = [], 0
    while total < covered:
        length = min(int(rng.poisson(mean)), covered - total)
        if length or len(lengths) < covered:
            lengths.append(length)
        total += length
    kept = n - covered
    lengths = _fewer(lengths, min(covered, kept + 1))
    lengths = np.asarray(lengths, np.int64)[rng.permutation(len(lengths))]
    gaps = np.sort(rng.permutation(kept + 1)[: len(lengths)])
    before = np.cumsum(lengths) - lengths
    return gaps + before, lengths


def _fewer(lengths: list[int], most: int) -> list[int]:
    """Empty spans are left out, then short ones joined, until there are `most`."""
    lengths = sorted(lengths, reverse=True)
    while len(lengths) > most:
        last = lengths.pop()
        lengths[-1] += last
    return lengths
