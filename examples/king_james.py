"""Text generation: a GPT-2 or a BLOOM learns the King James Bible, and goes on in its words.

    python examples/king_james.py --family bloom --output runs/king_james

A document is a chapter, a verse a line; every twentieth chapter is held out. The tokens are
byte-level BPE, and the result is nats a character: -ln P of the held-out chapters, their ends
included, over the number of their characters; beside it what xz needs for them after the rest. A
run that was stopped goes on when it is started again.
"""

import argparse
import lzma
import math
import sys
import time

import torch
from verses import Unavailable, king_james

import fasttx
from fasttx.training import (
    CausalLM,
    TokenStream,
    fit,
    generate_text,
    log_likelihood,
    train_tokenizer,
)

SIZES = {
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256, "embd_pdrop": 0.0,
             "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"hidden_size": 128, "n_layer": 4, "n_head": 4},
}  # fmt: skip
LENGTH = 256
PROMPTS = ("And God said,", "And the king", "Blessed are")


def chapters() -> list[str]:
    """The chapters in order, each its verses as lines."""
    found: dict[tuple[str, int], list[str]] = {}
    for (book, chapter, _), text in king_james().items():
        found.setdefault((book, chapter), []).append(text)
    return ["\n".join(verses) for verses in found.values()]


def parted(documents: list[str]) -> tuple[list[str], list[str]]:
    """(what is trained on, every twentieth, held out)."""
    held = documents[9::20]
    return [d for i, d in enumerate(documents) if i % 20 != 9], held


def nats_per_character(model, tokenizer, texts: list[str], length: int = LENGTH) -> float:
    """-ln P(texts and their ends) / number of characters; nothing is left unscored."""
    total = log_likelihood(model, tokenizer, texts, ends=True, length=length).total.sum()
    return -float(total) / sum(map(len, texts))


def xz_nats_per_character(rest: list[str], held: list[str]) -> float:
    """The bytes by which the compressed text grows, as nats: a baseline that learned no English."""
    sizes = [len(lzma.compress("\n\n".join(texts).encode())) for texts in (rest, rest + held)]
    return (sizes[1] - sizes[0]) * 8 * math.log(2) / sum(map(len, held))


def main(arguments: list[str] | None = None, documents: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SIZES, default="gpt2")
    parser.add_argument("--output", default="runs/king_james")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    given = parser.parse_args(arguments)
    try:
        documents = chapters() if documents is None else documents
    except Unavailable as why:
        sys.exit(f"the text cannot be had: {why}")
    rest, held = parted(documents)
    tokenizer = train_tokenizer("bpe", rest, given.vocab_size, template="bos")
    objective = CausalLM(tokenizer, LENGTH, layout="flat")
    torch.manual_seed(0)
    model = fasttx.models.create(
        given.family,
        "causal_lm",
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        **SIZES[given.family],
    )
    start, start_cpu = time.monotonic(), time.process_time()
    result = fit(
        model,
        objective.examples(TokenStream.from_documents(tokenizer, rest)),
        given.output,
        evaluation=objective.examples(TokenStream.from_documents(tokenizer, held)),
        tokenizer=tokenizer,
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        weight_decay=0.1,
        save_every=200,
        resume=True,
        progress=True,
    )
    seconds, cpu = time.monotonic() - start, time.process_time() - start_cpu
    nats = nats_per_character(model, tokenizer, held)
    torch.manual_seed(0)
    for prompt in PROMPTS:
        text = generate_text(
            model, tokenizer, prompt, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95
        )
        print(f"{prompt}|{text[0]}\n")
    baseline = xz_nats_per_character(rest, held)
    print(
        f"{nats:.3f} nats a character of {sum(map(len, held))} held out, xz {baseline:.3f}; "
        f"{result.steps} steps, {seconds:.0f} s of training ({cpu:.0f} s of processor time)"
    )
    return {"nats": nats, "xz": baseline, "seconds": seconds, "loss": result.evaluation_loss}


if __name__ == "__main__":
    main()
