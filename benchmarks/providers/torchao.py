"""torchao's quantized linear layers in transformers' models: less exact by design, and the error
column says how much."""

import copy
import importlib
import logging
import warnings
from types import SimpleNamespace

import torch

from . import Skip
from ._found import missing

NOTES = ["torch.nn.Linear alone is quantized"]


def _provider(name: str, label: str, config: str) -> SimpleNamespace:
    def reason() -> str | None:
        return missing("torchao")

    def model_forward(model, batch: dict, threads: int):
        """A call that returns the logits or last hidden states of a quantized copy."""
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
        heads = {id(p) for p in (model.get_output_embeddings(),) if p is not None}
        if all(id(m) in heads for m in linears):
            raise Skip("its linear maps are not torch.nn.Linear")
        logging.getLogger("torchao").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ao = importlib.import_module("torchao.quantization")
            made = copy.deepcopy(model).eval()
            try:
                ao.quantize_(made, getattr(ao, config)(), filter_fn=_inner(made))
            except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
                raise Skip(str(error).splitlines()[0]) from error

        def call():
            with torch.no_grad():
                out = made(**batch)
                return out.logits if "logits" in out else out.last_hidden_state

        try:
            call()
        except (NotImplementedError, RuntimeError) as error:
            raise Skip(str(error).splitlines()[0]) from error
        return call

    return SimpleNamespace(
        NAME=name, LABEL=label, COMPILES=True, EXTRA=True, NOTES=NOTES, reason=reason,
        model_forward=model_forward,
    )  # fmt: skip


def _inner(model):
    """Every linear map but the output layer, whose weights are often the embedding's."""
    output = model.get_output_embeddings()
    return lambda module, name: isinstance(module, torch.nn.Linear) and module is not output


PROVIDERS = [
    _provider("torchao_int8", "torchao, int8", "Int8DynamicActivationInt8WeightConfig"),
    _provider("torchao_int8_weights", "torchao, int8 weights", "Int8WeightOnlyConfig"),
    _provider("torchao_int4_weights", "torchao, int4 weights", "Int4WeightOnlyConfig"),
]
