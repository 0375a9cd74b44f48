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
        if "Int4" in config and model.device.type == "cpu" and model.dtype is not torch.bfloat16:
            raise Skip("its int4 kernels on the CPU are for bfloat16")
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
        heads = {id(p) for p in (model.get_output_embeddings(),) if p is not None}
        if all(id(m) in heads for m in linears):
            raise Skip("its linear maps are not torch.nn.Linear")
        logging.getLogger("torchao").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ao = importlib.import_module("torchao.quantization")
            made = copy.deepcopy(model).eval()
            how = _config(ao, config, made.device)
            # Inductor's settings are the whole process's, torch.compile's rows among it.
            ao.quantize_(made, how(set_inductor_config=False), filter_fn=_inner(made))
        linears = [m for m in made.modules() if isinstance(m, torch.nn.Linear)]
        if all(type(m.weight) is torch.nn.Parameter for m in linears):
            raise Skip("it quantizes none of these shapes")

        def call():
            with torch.no_grad():
                out = made(**batch)
                return out.logits if "logits" in out else out.last_hidden_state

        return call

    return SimpleNamespace(
        NAME=name, LABEL=label, COMPILES=True, EXTRA=True, NOTES=NOTES, reason=reason,
        model_forward=model_forward,
    )  # fmt: skip


def _config(ao, name: str, device: torch.device):
    """The configuration of that name; torchao keeps its int4 weights for the CPU elsewhere."""
    if name == "Int4WeightOnlyConfig" and device.type == "cpu":
        try:
            int4 = importlib.import_module("torchao.prototype.quantization.int4")
            return int4.PrototypeInt4WeightOnlyConfig
        except (ImportError, AttributeError):
            pass
    return getattr(ao, name)


def _inner(model):
    """Every linear map but the output layer, whose weights are often the embedding's."""
    output = model.get_output_embeddings()
    return lambda module, name: isinstance(module, torch.nn.Linear) and module is not output


PROVIDERS = [
    _provider("torchao_int8", "torchao, int8", "Int8DynamicActivationInt8WeightConfig"),
    _provider("torchao_int8_weights", "torchao, int8 weights", "Int8WeightOnlyConfig"),
    _provider("torchao_int4_weights", "torchao, int4 weights", "Int4WeightOnlyConfig"),
]
