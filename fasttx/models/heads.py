"""Models: a topology and what reads its hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import KVCache, LayerNorm, Linear
from ..layers._fit import untouched
from ..layers.feed_forward import ACTIVATIONS
from ..ops.cross_entropy import cross_entropy
from ..ops.linear import linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from . import families, parts
from .config import Config
from .decoder import Decoder
from .encoder import Encoder
from .seq2seq import Seq2Seq

__all__ = [
    "BaseModel",
    "CausalLM",
    "ConditionalGeneration",
    "MaskedLM",
    "Output",
    "QuestionAnswering",
    "SequenceClassification",
    "TokenClassification",
]

_TOPOLOGIES = {"encoder": Encoder, "decoder": Decoder, "seq2seq": Seq2Seq}


@dataclass
class Output:
    """hidden: the last hidden states [B,S,d_model]; memory: those of a seq2seq model's encoder;
    pooled: of a base model with a pooler, [B,d_model]. loss where there were labels; logits, but
    for language models that train with labels (ask with logits=True)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    memory: Tensor | None = None
    pooled: Tensor | None = None


class BaseModel(nn.Module):
    """A topology, and the pooler of a BERT: tanh(dense(first token)). Also what every other model
    inherits from.

    Args:
        config: a Config. device, dtype: of the parameters; on "meta" they have no memory and no
            initial values.
    """

    kind = "base"

    def __init__(self, config: Config, *, device=None, dtype=None):
        super().__init__()
        architecture(config, self.kind)
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.transformer = _TOPOLOGIES[config.topology](config, **factory)
        self.head = self.make_head(factory)
        if str(device) != "meta":
            from .initial import initialize

            initialize(self)

    def make_head(self, factory: dict) -> nn.Module | None:
        return _Pooler(self.config, factory) if self.config.pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Output:
        """input_ids [B,S]; attention_mask [B,S], 1 or True for real tokens. token_type_ids: of
        encoders with segments; position_ids: of encoders and decoders; the rest of a seq2seq model,
        whose decoder reads input_ids shifted by one where decoder_input_ids is None.

        Raises TypeError and ValueError naming the argument, the value and what is allowed. Values
        at padding mean nothing.
        """
        given = {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "memory": memory,
        }
        out = self._run(input_ids, attention_mask, given)
        if self.head is not None:
            out.pooled = self.head(_first(out.hidden, attention_mask))
        return out

    def _run(self, input_ids, attention_mask, given: dict, labels: Tensor | None = None) -> Output:
        topology = self.config.topology
        takes = {
            "encoder": ("token_type_ids", "position_ids"),
            "decoder": ("position_ids", "cu_seqlens"),
            "seq2seq": ("decoder_input_ids", "decoder_attention_mask", "memory"),
        }[topology]
        for name, value in given.items():
            if value is not None and name not in takes:
                raise ValueError(f"{name} must be None for {self.config.family}, a {topology}")
        if given["token_type_ids"] is not None and not self.config.segments:
            raise ValueError(f"token_type_ids must be None for {self.config.family}: no segments")
        parts.check_ids("input_ids", input_ids)
        given = {n: given.get(n) for n in takes}
        if topology != "seq2seq":
            return Output(hidden=self.transformer(input_ids, attention_mask, **given))
        if given["decoder_input_ids"] is None:
            source = input_ids if labels is None else labels
            given["decoder_input_ids"] = self.transformer.shifted(source)
        hidden, memory = self.transformer(input_ids, attention_mask, **given)
        return Output(hidden=hidden, memory=memory)

    def save_pretrained(self, folder, *, max_shard_bytes: int | None = None) -> None:
        """Write config.json and model.safetensors as transformers reads them; see
        fasttx.models.save_pretrained."""
        from .save import save_pretrained

        save_pretrained(self, folder, max_shard_bytes=max_shard_bytes)


class _Pooler(nn.Module):
    def __init__(self, config: Config, factory: dict):
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


def _first(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden state [B,d_model] of each sequence's first real token."""
    if mask is None:
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)]


class _Language(nn.Module):
    """Hidden states to logits: through a dense layer, activation and norm where masked, then the
    token table, or `out` where it is not tied."""

    def __init__(self, config: Config, factory: dict, *, masked: bool):
        super().__init__()
        width, vocab = config.d_model, config.vocab_size
        self.dense = Linear(width, width, **factory) if masked else None
        self.norm = LayerNorm(width, eps=config.eps, **factory) if masked else None
        self.activation = "gelu" if config.family == "roberta" else config.activation
        self.out = None if config.tied else Linear(width, vocab, bias=False, **factory)
        self.scale = config.logit_scale
        if masked:
            self.bias = nn.Parameter(torch.zeros(vocab, **factory))
        else:
            bias = torch.zeros(1, vocab, **factory) if config.logits_bias else None
            self.register_buffer("bias", bias)

    def transformed(self, hidden: Tensor) -> Tensor:
        if self.dense is not None:
            hidden = self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))
        return hidden if self.scale == 1.0 else hidden * self.scale

    def replaced(self) -> bool:
        """Whether the output layer is not a plain one, and has to be called."""
        return self.out is not None and not untouched(self.out, Linear)

    def weights(self, tokens: nn.Embedding) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias.view(-1)
        return tokens.weight if self.out is None else self.out.weight, bias


class _LanguageModel(BaseModel):
    masked = False

    def make_head(self, factory: dict) -> nn.Module:
        return _Language(self.config, factory, masked=self.masked)

    def tokens(self) -> nn.Embedding:
        body = self.transformer
        return (body.decoder if self.config.topology == "seq2seq" else body).embedding.tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,d_model] to logits [...,vocab_size]."""
        x, (weight, bias) = self.head.transformed(hidden), self.head.weights(self.tokens())
        if self.head.replaced():
            return self.head.out(x) if bias is None else self.head.out(x) + bias
        return linear(x, weight, bias)

    def _losses(self, out: Output, labels: Tensor | None, logits: bool | None, shift: int):
        """loss and logits; in training the logits of the loss never exist whole."""
        if labels is not None and labels.shape != out.hidden.shape[:2]:
            raise ValueError(
                f"labels must be [B, S] = {tuple(out.hidden.shape[:2])}, got {tuple(labels.shape)}"
            )
        wanted = not (self.training and labels is not None) if logits is None else logits
        wanted = wanted or (labels is not None and self.head.replaced())
        if wanted:
            out.logits = self.logits(out.hidden)
        if labels is None:
            return out
        last = labels.shape[1] - shift
        targets = labels[:, shift:].flatten()
        if wanted:
            out.loss = cross_entropy(out.logits[:, :last].flatten(0, 1), targets)
        else:
            weight, bias = self.head.weights(self.tokens())
            x = self.head.transformed(out.hidden[:, :last]).flatten(0, 1)
            out.loss = linear_cross_entropy(x, weight, targets, bias)
        return out


class MaskedLM(_LanguageModel):
    """BERT and RoBERTa as they were trained: the token at every place."""

    kind, masked = "masked_lm", True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits: bool | None = None,
    ) -> Output:
        """As BaseModel; labels [B,S], -100 where there is no loss (the mean over the rest).
        logits: None makes them unless it trains with labels."""
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        out = self._run(input_ids, attention_mask, given)
        return self._losses(out, labels, logits, 0)


class CausalLM(_LanguageModel):
    """GPT-2 and BLOOM: the next token."""

    kind = "causal_lm"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> Output:
        """As BaseModel; labels [B,S] are input_ids (shifted here), -100 where there is no loss.
        logits: None makes them unless it trains with labels. cu_seq_lens_q: bounds of packed
        sequences in one row, with their position_ids, as transformers' flash attention takes them
        (the rest of these arguments says the same)."""
        given = {
            "token_type_ids": None,
            "position_ids": position_ids,
            "cu_seqlens": cu_seq_lens_q,
        }
        out = self._run(input_ids, attention_mask, given)
        return self._losses(out, labels, logits, 1)

    def new_cache(self, batch: int, length: int, start: Tensor | None = None) -> KVCache:
        """An empty cache; see Decoder.new_cache."""
        return self.transformer.new_cache(batch, length, start)

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """The newest tokens [B,S] to hidden states [B,S,d_model]; see Decoder.decode."""
        return self.transformer.decode(input_ids, cache)

    def generate(self, *args, **kwargs):
        """See fasttx.models.generate.generate."""
        from .generate import generate

        return generate(self, *args, **kwargs)


class ConditionalGeneration(_LanguageModel):
    """T5, BART and the sinusoidal encoder-decoder: a target text for a source text."""

    kind = "conditional_generation"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        labels: Tensor | None = None,
        logits: bool | None = None,
    ) -> Output:
        """As BaseModel; labels [B,S] are the targets, -100 where there is no loss; shifted by one
        they are the decoder's input where decoder_input_ids is None. logits: None makes them unless
        it trains with labels."""
        given = {
            "token_type_ids": None,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "memory": memory,
        }
        return self._losses(self._run(input_ids, attention_mask, given, labels), labels, logits, 0)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The memory [B,T,d_model] of a source [B,T]."""
        return self.transformer.encoder(input_ids, attention_mask)

    def new_cache(self, batch: int, length: int, start: Tensor | None = None) -> KVCache:
        """An empty cache of the decoder; see Decoder.new_cache."""
        return self.transformer.decoder.new_cache(batch, length, start)

    def start(self, memory: Tensor, attention_mask: Tensor | None, cache: KVCache) -> None:
        """The memory's keys and values into the cache; attention_mask [B,T]."""
        self.transformer.start(memory, attention_mask, cache)

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """The newest target tokens [B,S] to hidden states; see Decoder.decode."""
        return self.transformer.decoder.decode(input_ids, cache)

    generate = CausalLM.generate


class _Classifier(nn.Module):
    """out(dropout(x)), or with a dense layer out(dropout(tanh(dense(x)))), x dropped out before
    where `first`."""

    def __init__(self, config, outputs, factory, *, dense=False, first=True, bias=True, p=0.0):
        super().__init__()
        width = config.d_model
        self.dense = Linear(width, width, **factory) if dense else None
        self.out = Linear(width, outputs, bias=bias, **factory)
        self.dropout, self.first = nn.Dropout(p), first

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            x = torch.tanh(self.dense(self.dropout(x) if self.first else x))
        return self.out(self.dropout(x))


class _Classification(BaseModel):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        given = {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "memory": None,
        }
        out = self._run(input_ids, attention_mask, given)
        out.logits = self.head(self._read(out.hidden, input_ids, attention_mask))
        if labels is not None:
            out.loss = self._loss(out.logits, labels, self._seen(given, attention_mask))
        return out

    def _seen(self, given: dict, mask: Tensor | None) -> Tensor | None:
        return given["decoder_attention_mask"] if self.config.topology == "seq2seq" else mask


class SequenceClassification(_Classification):
    """Logits [B, num_labels] of a whole text; labels [B] (or [B, num_labels] for several at once,
    and numbers for a regression: config.problem_type, or by num_labels and the labels' dtype)."""

    kind = "sequence_classification"

    def make_head(self, factory: dict) -> nn.Module:
        rule = families.FAMILIES[self.config.family].classifier
        return _Classifier(
            self.config,
            self.config.num_labels,
            factory,
            dense=rule != "last",
            first=rule != "pooled",
            bias=rule != "last",
            p=0.0 if rule == "last" else self.config.classifier_dropout,
        )

    def _read(self, hidden: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        config, places = self.config, torch.arange(ids.shape[1], device=ids.device)
        rule = families.FAMILIES[config.family].classifier
        if rule in ("pooled", "first"):
            return _first(hidden, mask)
        if rule == "eos":
            seen = ids == config.eos_token_id
            if hidden.shape[1] != ids.shape[1] or not seen.any(1).all():
                raise ValueError(
                    f"input_ids must hold the end token {config.eos_token_id} in every sequence, "
                    "and decoder_input_ids must be as long"
                )
        elif config.pad_token_id is not None:
            seen = ids != config.pad_token_id
        else:
            seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
        last = (places * seen).argmax(1)
        return hidden[torch.arange(len(ids), device=ids.device), last]

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        count, problem = self.config.num_labels, self.config.problem_type
        if problem is None and count == 1:
            problem = "regression"
        if problem is None:
            single = labels.dtype in (torch.int64, torch.int32)
            problem = ("multi" if not single else "single") + "_label_classification"
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.flatten())
        if problem == "regression":
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class TokenClassification(_Classification):
    """Logits [B, S, num_labels] of every token; labels [B,S], -100 where there is no loss."""

    kind = "token_classification"

    def make_head(self, factory: dict) -> nn.Module:
        p = self.config.classifier_dropout
        return _Classifier(self.config, self.config.num_labels, factory, p=p)

    def _read(self, hidden: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        return hidden

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


class QuestionAnswering(_Classification):
    """Logits [B, S, 2]: that an answer starts, and ends, at a token. labels [B,2]: its first and
    last token; a place outside of the sequence, or at padding, costs nothing. Padding takes no part
    in the loss, so that a batch costs what its sequences cost alone."""

    kind = "question_answering"

    def make_head(self, factory: dict) -> nn.Module:
        return _Classifier(self.config, 2, factory)

    def _read(self, hidden: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        return hidden

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        if labels.shape != (len(logits), 2):
            raise ValueError(
                f"labels must be [B, 2] = ({len(logits)}, 2), got {tuple(labels.shape)}"
            )
        count = logits.shape[1]
        places = labels.masked_fill(labels < 0, count).clamp(max=count)
        if mask is not None:
            logits = logits.masked_fill(~mask.bool()[..., None], -torch.inf)
            real = F.pad(mask.bool(), (0, 1)).gather(1, places)
            places = places.masked_fill(~real, count)
        start, end = (
            cross_entropy(logits[..., i], places[:, i], ignore_index=count) for i in (0, 1)
        )
        return (start + end) / 2


MODELS = {
    cls.kind: cls
    for cls in (
        BaseModel,
        MaskedLM,
        CausalLM,
        ConditionalGeneration,
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
    )
}


def architecture(config: Config, kind: str) -> str:
    """The name of this model's class in a folder's config, or a ValueError."""
    family = families.FAMILIES[config.family]
    alone = config.topology == "encoder" != family.topology
    known = family.encoders if alone else family.architectures
    if kind not in known:
        raise ValueError(
            f"head must be one of {', '.join(known)} for {config.family}, got {kind!r}"
        )
    return known[kind]
