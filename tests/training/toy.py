"""A model of fasttx's own blocks, and a run of it small enough to repeat."""

import torch
from torch import nn

import fasttx
from fasttx.training import MaskedLM

from . import corpus


class Toy(nn.Module):
    """A masked language model with dropout and a tied output layer."""

    def __init__(self, vocabulary: int, width: int = 16, dropout: float = 0.1, layers: int = 2):
        super().__init__()
        self.embedding = fasttx.nn.TransformerEmbedding(vocabulary, width)
        self.stack = fasttx.nn.Stack(
            (fasttx.nn.EncoderLayer(width, 2, 32, norm_first=True, dropout=dropout)
             for _ in range(layers)),
            fasttx.nn.LayerNorm(width),
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.tokens.weight

    def forward(self, input_ids, attention_mask, labels):
        x = self.stack(self.embedding(input_ids), padding_mask=attention_mask)
        return {"loss": fasttx.linear_cross_entropy(x, self.head.weight, labels)}


def model(tokenizer, **options) -> Toy:
    torch.manual_seed(3)
    return Toy(tokenizer.vocab_size, **options)


def examples(tokenizer, count: int = 60, length: int = 24, seed: int = 0):
    return MaskedLM(tokenizer, length).examples(corpus.stream(tokenizer, count), seed)
