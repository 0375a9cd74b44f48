"""Greedy generation: fasttx.models beside transformers' own generate, with its dynamic and its
static cache, on the same random weights.

A call makes NEW_TOKENS tokens after a prompt of PROMPT, of a model that knows no end token. Checked
are the logits along the tokens that transformers chose, one token at a time with the cache, against
fp64: the ids themselves part at the first near tie in 16 bits.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..gate import Error, Verdict, judge
from ..harness import clock_for, interleave
from ..ops.attention_case import DTYPES
from ..rows import Row, Run, set_ratios

BASE = "dynamic"
LABELS = {
    "fasttx": "fasttx.models",
    "dynamic": "transformers, dynamic cache",
    "static": "transformers, static cache",
}
PROMPT, NEW_TOKENS = 8, 64
_UNREAD = ("embed", "wpe", "wte", "shared", "EncDecAttention.k.", "EncDecAttention.v.")
BATCHES = (1, 8)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "generate-gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "generate-t5-small": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


class Bench:
    """One model in one dtype: transformers', the same weights in fasttx.models, and in fp64."""

    def __init__(self, name: str, dtype: str, device: torch.device, run: Run):
        transformers = importlib.import_module("transformers")
        models = importlib.import_module("fasttx").models
        head, config, options = MODELS[name]
        self.name, self.dtype, self.device, self.run = name, dtype, device, run
        torch.manual_seed(0)
        made = getattr(transformers, head)(getattr(transformers, config)(**options))
        self.theirs = made.to(device, DTYPES[dtype]).eval()
        self.theirs.generation_config.eos_token_id = None
        with tempfile.TemporaryDirectory() as folder:
            self.theirs.save_pretrained(folder)
            self.ours = models.from_pretrained(folder).to(device)
        self.seq2seq = self.theirs.config.is_encoder_decoder
        self._verdicts: dict[int, dict[str, Verdict]] = {}

    def measure(self, batch: int, threads: int, budget_s: float, on_round=None) -> list[Row]:
        ids = _prompt(self.theirs.config.vocab_size, batch, self.device)
        verdicts = self._judge(batch, ids)
        calls = self._calls(ids)
        timings = interleave(calls, clock_for(self.device, threads), budget_s, on_round=on_round)
        rows = []
        for name, timing in timings.items():
            row = Row(
                "model", self.name, f"{self.name}, {batch} x {PROMPT} + {NEW_TOKENS}", "generate",
                name, LABELS[name], self.dtype, str(self.device), threads, timing.clock,
                {"batch": batch, "queries": NEW_TOKENS}, {"prompt": PROMPT},
            )  # fmt: skip
            row.set_timing(timing)
            limits = self.run.limits_for(str(self.device), threads)
            row.set_rate(None, limits, self._read_a_step() * NEW_TOKENS)
            row.set_verdict(verdicts[name])
            row.notes.append(f"{row.median_s / NEW_TOKENS * 1e3:.2f} ms a token")
            rows.append(row)
        set_ratios(rows, timings, BASE)
        return rows

    def _calls(self, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        given["max_new_tokens"] = NEW_TOKENS
        static = {"cache_implementation": "static", "disable_compile": True}
        return {
            "fasttx": lambda: self.ours.generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=[]),
            "dynamic": lambda: self.theirs.generate(ids, **given),
            "static": lambda: self.theirs.generate(ids, **given, **static),
        }

    def _read_a_step(self) -> int:
        """Bytes of weights that a token needs; tables are looked up, and the encoder has run."""
        decoder = self.theirs.get_decoder() if self.seq2seq else self.theirs
        read = {p for n, p in decoder.named_parameters() if not any(part in n for part in _UNREAD)}
        read.add(self.theirs.get_output_embeddings().weight)
        return sum(p.numel() * p.element_size() for p in read)

    def _judge(self, batch: int, ids: Tensor) -> dict[str, Verdict]:
        if batch not in self._verdicts:
            chosen = self._calls(ids)["dynamic"]()
            exact = self._their_logits(copy.deepcopy(self.theirs).double(), ids, chosen)
            plain = {"out": Error.between(self._their_logits(self.theirs, ids, chosen), exact)}
            own = {"out": Error.between(self._our_logits(ids, chosen), exact)}
            dtype = DTYPES[self.dtype]
            same = judge(plain, plain, dtype)
            self._verdicts[batch] = {
                "fasttx": judge(own, plain, dtype),
                "dynamic": same,
                "static": same,
            }
        return self._verdicts[batch]

    @torch.no_grad()
    def _their_logits(self, model, ids: Tensor, chosen: Tensor) -> Tensor:
        if self.seq2seq:
            return model(input_ids=ids, decoder_input_ids=chosen[:, :-1]).logits
        return model(chosen[:, :-1]).logits[:, PROMPT - 1 :]

    @torch.no_grad()
    def _our_logits(self, ids: Tensor, chosen: Tensor) -> Tensor:
        model, first = self.ours, 1 if self.seq2seq else PROMPT
        cache = model.new_cache(len(ids), chosen.shape[1])
        if self.seq2seq:
            model.start(model.encode(ids), None, cache)
        parts = [model.logits(model.decode(chosen[:, :first], cache)[:, -1])]
        for step in range(first, chosen.shape[1] - 1):
            parts.append(model.logits(model.decode(chosen[:, step : step + 1], cache)[:, -1]))
        return torch.stack(parts, 1)


def _prompt(vocabulary: int, batch: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (batch, PROMPT), generator=generator).to(device)
