"""Greedy search, sampling and beam search over a static cache, for every model that decodes."""

from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops.sample import sample
from .beam import beam_search
from .decoding import Decoder, align, grow_positions
from .generation_options import Options, options_of
from .scores import ScoreRules

__all__ = ["generate"]


def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    decoder_start_token_id: int | None = None,
    min_length: int | None = None,
    min_new_tokens: int | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    forced_bos_token_id: int | None = None,
    forced_eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None,
    streamer=None,
) -> Tensor:
    """Token ids that go on from a prompt, or of a seq2seq model from a start token with the prompt
    encoded: greedy, sampled or by beam search.

    Greedy and beam search give the tokens of transformers' generate on the same weights. What is
    None is the model's default: its generation_config.json, else its config.json, else what stands
    here.

    Args:
        input_ids: integers [B, S], the prompt.
        attention_mask: [B, S], bool or 0 and 1, True or 1 for real tokens, at least one a row, on
            any side; hidden tokens play no part, so a batch gives what its rows give one by one.
            None: everything is real, but for pad_token_id where it stands in the prompt and ends no
            sequence.
        max_new_tokens: at least 1; 20.
        do_sample: draw with fasttx.sample at temperature (1.0), of the top_k most probable (all)
            that reach top_p (all).
        num_beams: more than 1 is beam search; length_penalty: the exponent of the length that
            scores are divided by (1.0); early_stopping: True ends with num_beams finished
            sequences, False when a better one is unlikely (the default), "never" when none can
            come.
        eos_token_id: one or several ids that end a sequence, [] for none; what follows is
            pad_token_id, by default the first eos_token_id.
        decoder_start_token_id: a seq2seq model's first token.
        min_length, min_new_tokens: no eos_token_id before; with the prompt counted, and without,
            which goes first.
        repetition_penalty, no_repeat_ngram_size, forced_bos_token_id, forced_eos_token_id: as in
            transformers.
        generator: of the draws; None is torch's own.
        streamer: put(ids) is called with the prompt [B, S], or the start tokens, and each step's
            tokens [B], on the CPU, and end() at the end; not with beams. transformers' TextStreamer
            is one.

    Returns:
        int64 [B, S + n], the prompt in front; of a seq2seq model [B, 1 + n] from the start token.
        n is the longest of the batch.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before memory is taken.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "min_length": min_length,
        "min_new_tokens": min_new_tokens,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "forced_bos_token_id": forced_bos_token_id,
        "forced_eos_token_id": forced_eos_token_id,
    }
    seq2seq = hasattr(model, "encode")
    defaults = _defaults(model.config)
    vocabulary = model.config.vocab_size
    _check_ids(input_ids, vocabulary)
    _check_mask(input_ids, attention_mask)
    options = options_of(given, defaults, 1 if seq2seq else input_ids.shape[1])
    _check_tokens(options, pad_token_id, vocabulary)
    if streamer is not None and options.num_beams > 1:
        raise ValueError(
            f"streamer must be None with num_beams {options.num_beams}: a beam may be given up"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be None or a torch.Generator, got {type(generator).__name__}"
        )
    prompt = input_ids.long()
    mask = _visible(prompt, attention_mask, options)
    if seq2seq:
        first = _start_token(decoder_start_token_id, defaults, vocabulary)
        ids, start = prompt.new_full((len(prompt), 1), first), None
        source, prompt = prompt, ids
    else:
        ids, start = align(prompt, mask)
    _check_room(model.config.limit(), ids.shape[1], options.max_new_tokens)
    if seq2seq:
        _check_room(model.config.limit(), source.shape[1], 0)
    grow_positions(model, max(input_ids.shape[1], ids.shape[1] + options.max_new_tokens))
    with _evaluating(model):
        cache = model.new_cache(len(ids), ids.shape[1] + options.max_new_tokens - 1)
        cache.start = start
        if seq2seq:
            memory = model.encode(source, mask)
            model.start(memory, mask, cache)
        if options.num_beams > 1:
            out = _beams(model, cache, prompt, ids, start, options)
        else:
            out = _tokens(model, cache, prompt, ids, start, options, generator, streamer)
    return out.clone()  # not a tensor of inference mode


def _tokens(model, cache, prompt, ids, start, options: Options, generator, streamer) -> Tensor:
    B, P = ids.shape
    rules = ScoreRules(options, prompt.shape[1], start)
    N, eos = options.max_new_tokens, set(options.eos_token_id)
    step = Decoder(model, cache, N - 1)
    known = torch.cat((ids, ids.new_zeros(B, N)), 1)
    draw = {"temperature": 0.0}
    if options.do_sample:
        draw = {
            "temperature": options.temperature,
            "top_k": options.top_k or None,
            "top_p": options.top_p,
            "generator": generator,
        }
    if streamer is not None:
        streamer.put(prompt.cpu())
    open_rows, tokens, count = [True] * B, ids, N
    for new in range(N):
        logits = step(tokens)
        if rules:
            logits = rules(logits.float(), known[:, : P + new], new)
        chosen = sample(logits, **draw)
        if not all(open_rows):
            going = torch.tensor(open_rows, device=chosen.device)
            chosen = torch.where(going, chosen, options.pad_token_id)
        known[:, P + new] = chosen
        if streamer is not None:
            streamer.put(chosen.cpu().clone())
        if eos:
            values = chosen.tolist()
            open_rows = [o and v not in eos for o, v in zip(open_rows, values, strict=True)]
            if not any(open_rows):
                count = new + 1
                break
        tokens = chosen[:, None]
    if streamer is not None:
        streamer.end()
    return torch.cat((prompt, known[:, P : P + count]), 1)


def _beams(model, cache, prompt, ids, start, options: Options) -> Tensor:
    """The prompt runs once a sentence; its keys and values are then those of every beam."""
    K, P = options.num_beams, ids.shape[1]
    logits = Decoder(model, cache)(ids).float().repeat_interleave(K, 0)
    cache = cache.repeat(K)
    decoder = Decoder(model, cache, options.max_new_tokens - 1)

    def step(tokens: Tensor | None, rows: Tensor | None) -> Tensor:
        if tokens is None:
            return logits
        cache.reorder(rows, P)
        return decoder(tokens).float()

    return beam_search(step, prompt, ids, start, options)


@contextmanager
def _evaluating(model):
    """Inference mode, and evaluation mode until the end, whatever the end."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _defaults(config) -> dict:
    """The model's generation_config, or what transformers makes of its config where it has none."""
    if config.generation:
        return config.generation
    legacy = {n: v for n, v in config.source.items() if n in _LEGACY}
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return legacy | {n: getattr(config, n) for n in tokens}


# What old config.json files hold for generate.
_LEGACY = (
    "max_length",
    "min_length",
    "do_sample",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def _visible(prompt: Tensor, mask: Tensor | None, options: Options) -> Tensor | None:
    if mask is not None:
        return mask
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_id:
        return None
    visible = prompt != pad
    return None if bool(visible.all()) else visible


def _start_token(given: int | None, defaults: dict, vocabulary: int) -> int:
    for value in (given, defaults.get("decoder_start_token_id"), defaults.get("bos_token_id")):
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
                raise ValueError(
                    f"decoder_start_token_id must be in [0, {vocabulary}), got {value!r}"
                )
            return value
    raise ValueError("decoder_start_token_id must be given: the model has no default, got None")


def _check_ids(input_ids, vocabulary: int) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, S], B and S > 0, got {tuple(input_ids.shape)}")
    low, high = (int(v) for v in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids must be in [0, {vocabulary}), got {wrong}")


def _check_mask(input_ids: Tensor, mask) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must be on input_ids' device {input_ids.device}, got {mask.device}"
        )
    if mask.dtype is not torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must hold 0 and 1 alone, got other values")


def _check_tokens(options: Options, pad: int | None, vocabulary: int) -> None:
    """pad: as given. A model's default may lie outside, as its end token then does."""
    for name, value in (
        ("forced_bos_token_id", options.forced_bos_token_id),
        ("forced_eos_token_id", max(options.forced_eos_token_id, default=None)),
        ("pad_token_id", pad),
    ):
        if value is not None and value >= vocabulary:
            raise ValueError(f"{name} must be in [0, {vocabulary}), got {value}")
    needed = max(2, 1 + len(options.eos_token_id))
    if options.num_beams > 1 and needed > vocabulary:
        raise ValueError(f"num_beams needs a vocabulary of at least {needed}, got {vocabulary}")


def _check_room(limit: int | None, length: int, new: int) -> None:
    """The newest token is never read, so it needs no position."""
    needed = length + max(new - 1, 0)
    if limit is not None and needed > limit:
        raise ValueError(
            f"max_new_tokens must leave the sequence within the model's {limit} positions, got "
            f"{new} after {length} tokens"
        )
