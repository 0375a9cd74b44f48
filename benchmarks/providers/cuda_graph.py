"""PyTorch eager recorded as a CUDA graph and replayed: what leaving the launches out gains alone.
Written from torch's documentation; not yet run on a GPU here."""

import torch

from ..ops.attention_case import bias_of, plain
from . import Skip

NAME = "cuda_graph"
LABEL = "eager, CUDA graph"
COMPILES = True
EXTRA = True
NO_BACKWARD = ("cuda",)
WARM_UP = 3


def reason() -> str | None:
    if torch.cuda.is_available():
        return None
    return "CUDA graphs need a CUDA device, and torch sees none here"


def attention(case, x, check: bool):
    if case.dropout:
        raise Skip("dropout draws from a generator outside the graph")

    def formula():
        bias = bias_of(case, x, x.q.dtype)
        return plain(x.q, x.k, x.v, causal=case.causal, mask=x.mask, bias=bias)

    return recorded(formula), x.leaves()


def model_forward(model, batch: dict, threads: int):
    model.eval()

    def forward():
        out = model(**batch)
        return out.logits if "logits" in out else out.last_hidden_state

    return recorded(forward)


def recorded(function):
    """A call that replays ``function``, recorded without gradients; its output is the same memory
    every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            out = function()
    except RuntimeError as error:
        raise Skip(f"it cannot be recorded: {str(error).splitlines()[0]}") from error

    def replay():
        graph.replay()
        return out

    return replay
