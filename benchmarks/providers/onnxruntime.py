"""ONNX Runtime on the CPU: a whole model's forward, exported by torch.onnx."""

import importlib
import io
import logging
import warnings

import torch

from . import Skip
from ._found import missing

NAME = "onnxruntime"
LABEL = "ONNX Runtime"
COMPILES = True


def reason() -> str | None:
    return missing("onnxruntime") or missing("onnx") or missing("onnxscript")


class _Outputs(torch.nn.Module):
    """Inputs by position, one tensor out: what the exporter takes."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        out = self.model(**dict(zip(self.names, tensors, strict=True)))
        return out.logits if "logits" in out else out.last_hidden_state


def model_forward(model, batch: dict, threads: int):
    """A call that returns the model's logits or last hidden states. Its threads do not spin, so
    that they do not take time from the others' between its turns."""
    if next(model.parameters()).dtype is not torch.float32:
        raise Skip("its CPU kernels for these models are float32")
    if next(model.parameters()).is_cuda:
        raise Skip("only its CPU kernels are compared")
    onnxruntime = importlib.import_module("onnxruntime")
    names = tuple(batch)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Outputs(model.eval(), names), tuple(batch.values()), dynamo=True, verbose=False
        )
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    given = [i.name for i in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(given, batch.values(), strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
