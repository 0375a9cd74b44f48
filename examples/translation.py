"""English to Spanish: a BART or a T5 of two and two layers learns from the verses of two Bibles.

    pip install sacrebleu
    python examples/translation.py --model bart --output runs/translation-bart
    python examples/translation.py --model t5 --output runs/translation-t5

King James and Reina-Valera 1909 (public domain) come out of the Debian packages sword-text-kjv and
sword-text-sparv; verses of at most 20 English words. 500 of them are held out, with everything that
has the English or the Spanish of one of them. The result is BLEU, by sacrebleu with its own
tokenizer, of greedy and of beam search, beside two answers that need no model: the most frequent
Spanish verse for everything, and the Spanish of the training verse that shares the most words
(weighted by how rare they are). A run that was stopped goes on when it is started again.
"""

import argparse
import math
import random
import sys
from collections import Counter, defaultdict

from seq2seq import trained, written
from verses import Unavailable, king_james, reina_valera

from fasttx.training import train_tokenizer

SIZES = {
    "bart": {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512,
             "decoder_ffn_dim": 512, "max_position_embeddings": 96, "dropout": 0.1,
             "scale_embedding": True},
    "t5": {"d_model": 128, "d_kv": 16, "num_heads": 8, "d_ff": 512, "num_layers": 2,
           "dropout_rate": 0.1},
}  # fmt: skip
LEARNING_RATES = {"bart": 1e-3, "t5": 3e-3}  # T5's tokens start fifty times as large as BART's
WORDS, HELD_OUT = 20, 500
Split = tuple[list[tuple[str, str]], list[tuple[str, str]]]


def verses(held_out: int = HELD_OUT) -> Split:
    """(held out, for training) of (English, Spanish), both shuffled."""
    english, spanish = king_james(), reina_valera()
    pairs = [(english[place], spanish[place]) for place in english if place in spanish]
    pairs = [(a, b) for a, b in pairs if len(a.split()) <= WORDS and len(b.split()) <= 2 * WORDS]
    random.Random(0).shuffle(pairs)
    held = pairs[:held_out]
    known = {side.lower() for pair in held for side in pair}
    rest = [(a, b) for a, b in pairs[held_out:] if not {a.lower(), b.lower()} & known]
    return held, rest


def most_frequent(held: list, rest: list) -> list[str]:
    """The most frequent target, for each that is held out."""
    return [Counter(b for _, b in rest).most_common(1)[0][0]] * len(held)


def nearest(held: list, rest: list) -> list[str]:
    """The target of the training source with the largest tf-idf cosine."""
    places = defaultdict(set)
    for i, (text, _) in enumerate(rest):
        for word in set(text.lower().split()):
            places[word].add(i)
    weight = {word: math.log(len(rest) / len(at)) for word, at in places.items()}
    sizes = [math.hypot(*(weight[w] for w in set(a.lower().split()))) or 1.0 for a, _ in rest]
    found = []
    for text, _ in held:
        score = Counter()
        for word in set(text.lower().split()) & weight.keys():
            for i in places[word]:
                score[i] += weight[word] ** 2 / sizes[i]
        found.append(rest[max(score, key=score.get, default=0)][1])
    return found


def main(arguments: list[str] | None = None, split: Split | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="bart")
    parser.add_argument("--output", default="runs/translation")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=3000)
    given = parser.parse_args(arguments)
    try:
        import sacrebleu

        held, rest = verses() if split is None else split
    except ModuleNotFoundError:
        sys.exit("sacrebleu is not installed: pip install sacrebleu")
    except Unavailable as why:
        sys.exit(f"the verses cannot be had: {why}")
    tokenizer = train_tokenizer("bpe", [side for pair in rest for side in pair],
                                given.vocabulary, template="eos")  # fmt: skip
    model, result, seconds = trained(
        given.model, SIZES[given.model] | {"bos_token_id": tokenizer.bos}, tokenizer, rest, held,
        given, lengths=(96, 96), learning_rate=LEARNING_RATES[given.model], evaluate_every=500,
    )  # fmt: skip
    texts, wanted = map(list, zip(*held, strict=True))
    answers = {
        "most frequent": most_frequent(held, rest),
        "nearest": nearest(held, rest),
        "greedy": written(model, tokenizer, texts, 100, max_new_tokens=80),
        "beam": written(model, tokenizer, texts, 100, max_new_tokens=80, num_beams=4),
    }
    bleu = {name: sacrebleu.corpus_bleu(a, [wanted]).score for name, a in answers.items()}
    for i in range(min(4, len(held))):
        print(f"  {texts[i]}\n    {answers['beam'][i]}\n    (is {wanted[i]})")
    print(", ".join(f"{name} {score:.2f}" for name, score in bleu.items())
          + f" BLEU on {len(held)} held-out verses; {result.steps} steps, {seconds:.0f} s of CPU "
          f"time, evaluation loss {result.evaluation_loss:.4f}")  # fmt: skip
    return {"bleu": bleu, "seconds": seconds, "loss": result.evaluation_loss}


if __name__ == "__main__":
    main()
