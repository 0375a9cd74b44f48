"""The two kinds of model that can be looked at, under one set of names."""

import inspect

import torch
from torch import Tensor, nn

from ..training.batches import is_seq2seq

__all__ = ["Subject"]

# What configs call these, the last side of a seq2seq model first.
_LAYERS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "layers")
_HEADS = ("decoder_heads", "decoder_attention_heads", "num_attention_heads", "heads")


class Subject:
    """A model of fasttx.models, or of transformers after fasttx.patch.

    seq2seq, masked, language: what it is. limit: the most tokens it has positions for, or None.
    positions: how it knows where a token stands, in words. layers, heads: of the last side.
    """

    def __init__(self, model: nn.Module):
        from ..models import BaseModel

        self.model, self.config = model, getattr(model, "config", None)
        self.own = isinstance(model, BaseModel)
        if not self.own and not hasattr(model, "get_input_embeddings"):
            raise TypeError(
                "model must be one of fasttx.models or a patched one of transformers, got "
                f"{type(model).__name__}"
            )
        self.seq2seq = is_seq2seq(model)
        kind = type(model).__name__
        self.masked = kind == "MaskedLM" or kind.endswith("ForMaskedLM")
        self.language = hasattr(model, "logits") if self.own else self._speaks()
        self.limit, self.positions = self._own_places() if self.own else self._places()
        last = slice(None) if self.seq2seq else slice(-2, None)
        self.layers, self.heads = self._size(_LAYERS[last]), self._size(_HEADS[last])
        self.device = next(model.parameters()).device

    def _size(self, names: tuple[str, ...]) -> int:
        found = (getattr(self.config, name, None) for name in names)
        return next((n for n in found if isinstance(n, int)), 1)

    def _speaks(self) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None

    def _own_places(self) -> tuple[int | None, str]:
        words = {
            "learned": "a learned row a position, added to the token's",
            "sinusoidal": "fixed sines and cosines, added to the token's row",
            "alibi": "ALiBi: each head's logits fall with the distance",
            "relative": "a learned bias of the logits by distance",
        }
        return self.config.limit(), words.get(self.config.positions, str(self.config.positions))

    def _places(self) -> tuple[int | None, str]:
        kind = self.config.model_type
        if kind == "t5":
            return None, "a learned bias of the logits by distance"
        if kind == "bloom":
            return None, "ALiBi: each head's logits fall with the distance"
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and "roberta" in kind:
            limit -= self.config.pad_token_id + 1
        table = next((m for n, m in self.model.named_modules() if _is_positions(n)), None)
        words = (
            "rotary: queries and keys are turned" if table is None else "a row a position, added"
        )
        return limit, words

    @property
    def vocabulary(self) -> Tensor:
        """The table of input embeddings [V,width]."""
        if not self.own:
            return self.model.get_input_embeddings().weight
        body = self.model.transformer
        return (body.encoder if self.seq2seq else body).embedding.tokens.weight

    def run(self, ids: Tensor, target: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(last hidden states [S,width] of the decoder or the only stack, None) of ids [S]; for
        transformers, which keeps them to itself, (states, logits) with the logits [S', V] of the
        last S' places."""
        given = {} if target is None else {"decoder_input_ids": target[None]}
        if self.own:
            if self.language:
                given["logits"] = False
            return self.model(ids[None], **given).hidden[0], None
        keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if keep and self.language and not self.seq2seq:
            given["logits_to_keep"] = 64
        elif not self.seq2seq and "use_cache" in inspect.signature(self.model.forward).parameters:
            given["use_cache"] = False
        out = self.model(ids[None], output_hidden_states=True, return_dict=True, **given)
        states = out.decoder_hidden_states if self.seq2seq else out.hidden_states
        return states[-1][0], out.logits[0] if self.language else None

    def logits(self, hidden: Tensor, logits: Tensor | None, places: list[int]) -> Tensor:
        """float32 [len(places), V] on the CPU, of what run gave."""
        at = torch.tensor(places, device=hidden.device)
        if self.own:
            return self.model.logits(hidden[at]).float().cpu()
        return logits[at - (hidden.shape[0] - logits.shape[0])].float().cpu()

    def write(self, ids: Tensor, count: int) -> Tensor:
        """What a seq2seq model writes for ids, greedily: [n], the start token in front."""
        options = {"max_new_tokens": count, "do_sample": False, "num_beams": 1}
        return self.model.generate(ids[None], **options)[0]

    def start(self) -> int:
        """The token a seq2seq model's decoder begins with."""
        first = getattr(self.config, "decoder_start_token_id", None)
        if first is None:
            raise ValueError("model: its config has no decoder_start_token_id")
        return int(first)


def _is_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("wpe", "position_embeddings", "embed_positions")
