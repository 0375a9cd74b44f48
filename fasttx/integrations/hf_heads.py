"""Language-model heads as `patch` runs them: transformers' own, given labels.

The classes are made when they are first asked for, subclasses of transformers' class of the same
name, from what hf_families.HEADS says of it. Without labels they are that class. With labels the
loss is fasttx's: of the logits where those are wanted (in evaluation, or by patch(logits=True)),
else of the last hidden states and the projection, and no logits exist.
"""

import functools
import importlib
import inspect
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..ops.cross_entropy import cross_entropy
from ..ops.linear_cross_entropy import linear_cross_entropy
from .hf_families import HEADS, LOGITS, Head
from .hf_fused import LINEARS, has_hooks, is_plain


def _make(base: type, head: Head) -> type:
    names = list(inspect.signature(base.forward).parameters)[1:]
    output = getattr(modeling_outputs, head.output)
    rest = [f.name for f in fields(output) if f.name not in ("loss", "logits")]

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        if args:
            kwargs.update(zip(names, args, strict=False))
        given = kwargs.get("labels")
        if given is None or (head.causal and not _is_causal_loss(self)):
            return base.forward(self, **kwargs)
        labels = kwargs.pop("labels")
        as_dict = kwargs.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        if head.stops_cache:
            kwargs["use_cache"] = False
        decoded = kwargs.get("decoder_input_ids"), kwargs.get("decoder_inputs_embeds")
        if head.output == "Seq2SeqLMOutput" and decoded == (None, None):
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        projection = self.get_submodule(head.projection)
        hidden = None
        if self.training and not vars(self).get(LOGITS) and _bare(self, head.projection):
            out = _BODIES.get(base.__name__, _body)(self, kwargs)
            hidden = _ready(self, head, out[0])
            if hidden.dtype is not projection.weight.dtype and not torch.is_autocast_enabled(
                hidden.device.type
            ):
                hidden = None
        if hidden is None:
            out = base.forward(self, **kwargs, return_dict=True)
            loss = _loss(head, kwargs, labels, logits=out.logits)
            out = type(out)(loss=loss, **out)
        else:
            bias = projection.bias if head.bias is None else getattr(self, head.bias).flatten()
            loss = _loss(head, kwargs, labels, x=hidden, weight=projection.weight, bias=bias)
            out = output(loss=loss, **{name: getattr(out, name, None) for name in rest})
        return out if as_dict else out.to_tuple()

    return type(base.__name__, (base,), {"__module__": __name__, "forward": forward})


def _is_causal_loss(model: nn.Module) -> bool:
    """model.loss_function, without its message about a loss_type that is not set."""
    if (own := vars(model).get("_loss_function")) is not None:
        return own is ForCausalLMLoss
    return LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss


def _bare(model: nn.Module, path: str) -> bool:
    """The projection is a plain Linear, and neither it nor what holds it is hooked."""
    holders = path.split(".")[:-1]
    around = [model.get_submodule(".".join(holders[: i + 1])) for i in range(len(holders))]
    own = any("forward" in vars(m) or has_hooks(m) for m in around)
    return is_plain(model.get_submodule(path), *LINEARS) and not own


def _body(model: nn.Module, given: dict):
    inner = {k: v for k, v in given.items() if k != "logits_to_keep"}
    return getattr(model, model.base_model_prefix)(**inner, return_dict=True)


def _t5_body(model: nn.Module, given: dict):
    """T5ForConditionalGeneration has no model of its own between itself and its two stacks."""
    given = dict(given)
    source = {name: given.pop(name, None) for name in ("input_ids", "inputs_embeds")}
    target = {
        name: given.pop(f"decoder_{name}", None)
        for name in ("input_ids", "inputs_embeds", "attention_mask")
    }
    mask, encoded = given.pop("attention_mask", None), given.pop("encoder_outputs", None)
    cache = {name: given.pop(name, None) for name in ("past_key_values", "use_cache")}
    if encoded is None:
        encoded = model.encoder(**source, attention_mask=mask, **given)
    elif not isinstance(encoded, modeling_outputs.BaseModelOutput):
        more = [encoded[i] if len(encoded) > i else None for i in (1, 2)]
        encoded = modeling_outputs.BaseModelOutput(encoded[0], *more)
    out = model.decoder(
        **target,
        encoder_hidden_states=encoded[0],
        encoder_attention_mask=mask,
        **cache,
        **given,
    )
    hidden = out[0]
    if model.config.scale_decoder_outputs:
        hidden = hidden * model.model_dim**-0.5
    return modeling_outputs.Seq2SeqModelOutput(
        last_hidden_state=hidden,
        past_key_values=out.past_key_values,
        decoder_hidden_states=out.hidden_states,
        decoder_attentions=out.attentions,
        cross_attentions=out.cross_attentions,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


_BODIES = {"T5ForConditionalGeneration": _t5_body}


def _ready(model: nn.Module, head: Head, x: Tensor) -> Tensor:
    """What the projection is applied to."""
    if head.transform == "roberta":
        lm_head = model.lm_head
        return lm_head.layer_norm(nn.functional.gelu(lm_head.dense(x)))
    return model.get_submodule(head.transform)(x) if head.transform else x


def _loss(head: Head, given: dict, labels: Tensor, *, logits=None, x=None, weight=None, bias=None):
    """transformers' loss: a causal head honours num_items_in_batch, ignore_index and shift_labels,
    the others take the mean over what is not -100."""
    items, ignore_index = None, -100
    if head.causal:
        items, ignore_index = given.get("num_items_in_batch"), given.get("ignore_index", -100)
        if (shifted := given.get("shift_labels")) is None:
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        labels = shifted
    options = {"ignore_index": ignore_index, "reduction": "mean" if items is None else "sum"}
    if x is None:
        rows = logits.flatten(0, -2)
        loss = cross_entropy(rows, labels.reshape(-1).to(rows.device), **options)
    else:
        rows = x.flatten(0, -2)
        labels = labels.reshape(-1).to(rows.device)
        loss = linear_cross_entropy(rows, weight, labels, bias, **options)
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def __getattr__(name: str) -> type:
    for path, head in HEADS.items():
        module, _, cls = path.rpartition(".")
        if cls == name:
            base = getattr(importlib.import_module(f"transformers.models.{module}"), cls)
            return globals().setdefault(name, _make(base, head))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
