"""Greedy generation: fasttx.models beside transformers' own generate, with its dynamic and its
static cache, on the same random weights.

A call makes NEW_TOKENS tokens after a prompt of PROMPT, of a model that knows no end token. Checked
are the logits along the tokens that transformers chose, one token at a time with the cache, against
fp64: the ids themselves part at the first near tie in 16 bits.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..apart import NOTE, Apart
from ..contest import Bench as Contest
from ..contest import Case, Contender, Group, compare
from ..gate import Error, Verdict, judge
from ..ops.attention_case import DTYPES
from ..providers import Skip, theirs
from ..rows import Row, Run
from .families import as_fasttx

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
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "t5-small": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
         "decoder_start_token_id": 0},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"n_layer": 12, "hidden_size": 768, "n_head": 12, "vocab_size": 50304},
    ),
    "bart-base": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"encoder_layers": 6, "decoder_layers": 6, "d_model": 768, "encoder_ffn_dim": 3072,
         "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
         "forced_eos_token_id": None},
    ),
}  # fmt: skip


def cases(name: str, options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for batch in BATCHES:
            for threads in options.model_threads:
                yield Case(
                    f"generation by {name} {dtype}, {batch} a batch, {threads} thr.",
                    {"name": name, "dtype": dtype}, {"batch": batch}, threads,
                )  # fmt: skip


class Bench(Contest):
    """One model in one dtype: transformers', the same weights in fasttx.models, and in fp64; and
    what of the providers `beside` it can run."""

    def __init__(
        self,
        name: str,
        dtype: str,
        device: torch.device,
        run: Run,
        beside: Mapping[str, Any] | None = None,
    ):
        self.name, self.dtype, self.device, self.run = name, dtype, device, run
        self.peers = {n: p for n, p in (beside or {}).items() if hasattr(p, "generation")}
        self.theirs = make(name, dtype, device)
        self.ours = as_fasttx(self.theirs)
        self.seq2seq = self.theirs.config.is_encoder_decoder
        self._judged: dict[int, tuple] = {}

    def contest(self, threads: int, batch: int) -> tuple[Group, dict[str, Contender]]:
        ids = _prompt(self.theirs.config.vocab_size, batch, self.device)
        verdicts, chosen, exact = self._judge(batch, ids)
        contenders = {
            name: Contender(LABELS[name], call, verdicts[name])
            for name, call in calls(self.ours, self.theirs, ids).items()
        }
        contenders |= self._peers(ids, chosen, exact, threads)
        group = Group(
            "generate", self.name, f"{self.name}, {batch} x {PROMPT} + {NEW_TOKENS}", "generate",
            self.dtype, BASE, {"batch": batch, "queries": NEW_TOKENS}, {"prompt": PROMPT},
            moved=self._read_a_step() * NEW_TOKENS, tokens=batch * NEW_TOKENS,
        )  # fmt: skip
        return group, contenders

    def measure(self, threads: int, budget_s: float, on_round=None, **given: Any) -> list[Row]:
        group, contenders = self.contest(threads, **given)
        try:
            rows = compare(group, contenders, self.device, threads, budget_s, self.run, on_round)
        finally:
            for contender in contenders.values():
                if isinstance(contender.call, Apart):
                    contender.call.close()
        for row in rows:
            row.notes.append(f"{row.median_s / NEW_TOKENS * 1e3:.2f} ms a token")
        return rows

    def _peers(self, ids: Tensor, chosen: Tensor, exact: Tensor, threads: int) -> dict:
        """Other runtimes; checked by their log probabilities of transformers' tokens."""
        first = 1 if self.seq2seq else PROMPT
        taken = chosen[:, first:, None]

        def likelihoods(logits: Tensor) -> Tensor:
            if logits.dtype is not torch.float64:
                logits = logits.float()
            return logits.log_softmax(-1).gather(-1, taken)[..., 0]

        right, found = likelihoods(exact), {}
        own = likelihoods(self._their_logits(self.theirs, ids, chosen))
        plain = {"out": Error.between(own, right)}
        for name, peer in self.peers.items():
            try:
                with theirs():
                    call, scores = peer.generation(
                        self.theirs, self.dtype, ids, NEW_TOKENS, threads
                    )
            except Skip as why:
                self.run.skip(f"{peer.LABEL}: {self.name} {self.dtype}", str(why))
                continue
            error = Error.between(torch.tensor(scores(chosen)), right)
            verdict = judge({"out": error}, plain, DTYPES[self.dtype])
            found[name] = Contender(peer.LABEL, call, verdict, call.prepared_s, [NOTE])
        return found

    def _read_a_step(self) -> int:
        """Bytes of weights that a token needs; tables are looked up, and the encoder has run."""
        decoder = self.theirs.get_decoder() if self.seq2seq else self.theirs
        read = {p for n, p in decoder.named_parameters() if not any(part in n for part in _UNREAD)}
        read.add(self.theirs.get_output_embeddings().weight)
        return sum(p.numel() * p.element_size() for p in read)

    def _judge(self, batch: int, ids: Tensor) -> tuple[dict[str, Verdict], Tensor, Tensor]:
        """Verdicts, transformers' ids and the fp64 logits along them."""
        if batch not in self._judged:
            chosen = calls(None, self.theirs, ids)["dynamic"]()
            exact = self._their_logits(copy.deepcopy(self.theirs).double(), ids, chosen)
            plain = {"out": Error.between(self._their_logits(self.theirs, ids, chosen), exact)}
            own = {"out": Error.between(self._our_logits(ids, chosen), exact)}
            dtype = DTYPES[self.dtype]
            same = judge(plain, plain, dtype)
            verdicts = {"fasttx": judge(own, plain, dtype), "dynamic": same, "static": same}
            self._judged[batch] = verdicts, chosen, exact
        return self._judged[batch]

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


def make(name: str, dtype: str, device: torch.device):
    """transformers' model, which knows no end token."""
    transformers = importlib.import_module("transformers")
    head, config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, config)(**options))
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model.to(device, DTYPES[dtype]).eval()


def calls(ours, theirs, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by provider; `ours` or `theirs` may be None where the other is asked for."""
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    given["max_new_tokens"] = NEW_TOKENS
    static = {"cache_implementation": "static", "disable_compile": True}
    return {
        "fasttx": lambda: ours.generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=[]),
        "dynamic": lambda: theirs.generate(ids, **given),
        "static": lambda: theirs.generate(ids, **given, **static),
    }


def fresh(name: str, dtype: str, batch: int, provider: str, device: torch.device) -> Callable:
    """For a fresh process (fresh.py); the smaller call has one row."""
    theirs = make(name, dtype, device)
    ids = _prompt(theirs.config.vocab_size, batch, device)

    def prepare():
        ours = as_fasttx(theirs) if provider == "fasttx" else None
        return calls(ours, theirs, ids)[provider], calls(ours, theirs, ids[:1])[provider]

    return prepare


def _prompt(vocabulary: int, batch: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (batch, PROMPT), generator=generator).to(device)
