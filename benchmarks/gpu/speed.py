"""Attention beside every kernel that PyTorch has for it, and the other ops by `fasttx bench`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import limits, ops
from ..harness import clock_for, interleave
from .record import Item

TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BIASED_LENGTH = 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNBIASED = "fasttx without bias"
SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def items() -> list[Item]:
    found = [
        Item("bench", "bench/limits", f"{__name__}:card_limits", {}, _again("bench/limits"), 120)
    ]
    for D, causal, S in itertools.product((64, 128), (False, True), LENGTHS):
        case = {"S": S, "D": D, "causal": causal}
        key = f"bench/attention/{D}/{'causal' if causal else 'full'}/{S}"
        found.append(Item("bench", key, f"{__name__}:attention", case, _again(key), 120))
    for D, bias in itertools.product((64, 128), ("alibi", "relative")):
        case = {"S": BIASED_LENGTH, "D": D, "causal": True, "bias": bias}
        key = f"bench/attention/{D}/{bias}/{BIASED_LENGTH}"
        found.append(Item("bench", key, f"{__name__}:attention", case, _again(key), 120))
    for name in ops.names():
        key = f"bench/{name}"
        command = ["-m", "fasttx.benchmarks.run", "op", name, "--device", "cuda", "--full"]
        line = " ".join(["python", *command])
        found.append(Item("bench", key, f"{__name__}:op", {"command": command}, line, 300))
    return found


def _again(key: str) -> str:
    return f"python -m benchmarks.gpu --only bench --again --match {key}"


def card_limits(device: str = "cuda") -> dict[str, Any]:
    return limits.measure(torch.device(device), 1, DTYPES).as_dict()


def op(command: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        done = subprocess.run(
            [sys.executable, *command, "--json", str(path), "--out", folder],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=290, check=False,
        )  # fmt: skip
        if not path.exists():
            raise RuntimeError(done.stdout[-3000:])
        data = json.loads(path.read_text())
    wrong = [r for r in data["rows"] if r["ok"] is False and r["provider"] == "fasttx"]
    failures = [
        {"what": f"{r['op']} {r['case']} {r['dtype']} {r['direction']}", "message": r["why"],
         "reproduce": " ".join(["python", *command])}
        for r in wrong
    ]  # fmt: skip
    return {"rows": data["rows"], "failures": failures}


def is_ours(name: str) -> bool:
    return name.startswith("fasttx ") and name != UNBIASED


def backends(device_type: str) -> list[str]:
    """Ours that have kernels of their own for attention on a device."""
    from fasttx.op import OPS

    rows = OPS["attention_fwd"].tables[device_type]
    return [k.backend for k in rows if k.backend != "reference" and not k.needs.by_name]


def contenders(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: str | None
) -> dict[str, Callable]:
    """Forward calls by name; those that refuse here are found out by calling them."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import fasttx

    heads, device = q.shape[1], q.device
    position_bias = None
    if bias == "alibi":
        position_bias = fasttx.ALiBi(fasttx.ALiBi.standard_slopes(heads).to(device))
    elif bias == "relative":
        table = torch.randn(32, heads, device=device, dtype=q.dtype)
        position_bias = fasttx.RelativePositionBias(table)
    calls = {}
    for backend in backends(device.type):

        def ours(backend=backend):
            return fasttx.attention(
                q, k, v, is_causal=causal, position_bias=position_bias, backend=backend
            )

        calls[f"fasttx {backend}"] = ours
    if bias is not None:
        calls[UNBIASED] = lambda: fasttx.attention(q, k, v, is_causal=causal)
        return calls
    for name, member in SDPA.items():

        def sdpa(member=member):
            with sdpa_kernel(getattr(SDPBackend, member)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        calls[f"sdpa {name}"] = sdpa
    if device.type == "cuda":
        calls["flex"] = _flex(q, k, v, causal)
    return calls


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        S = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=q.device)
    return lambda: compiled(q, k, v, block_mask=mask)


def attention(
    S: int, D: int, causal: bool, bias: str | None = None, device: str = "cuda",
    tokens: int = TOKENS, width: int = WIDTH, dtype: str = "bf16", seconds: float = 2.0,
) -> dict[str, Any]:  # fmt: skip
    """Median seconds and TFLOP/s, forward and backward, of whoever runs this case rightly."""
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(0)
    shape = (max(1, tokens // S), width // D, S, D)
    q, k, v, g = (
        torch.randn(shape, generator=generator, device=place).to(DTYPES[dtype]) for _ in range(4)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    calls, refused, errors = {}, {}, {}
    exact = None if bias else _exact(q, k, v, g, causal)
    for name, call in contenders(q, k, v, causal, bias).items():
        try:
            with torch.no_grad():
                call()
            out = call()
            grads = torch.autograd.grad(out, leaves, g, retain_graph=True)
        except (RuntimeError, NotImplementedError) as reason:
            if "CUDA error" in str(reason):
                raise
            refused[name] = str(reason).strip().splitlines()[0][:300]
            continue
        calls[name] = (call, out)
        if exact is not None:
            errors[name] = _errors((out, *grads), exact)
    failures = [
        {"what": f"{name} S {S} D {D} causal {causal}", "message": f"relative RMS errors {e}",
         "reproduce": ""}
        for name, e in errors.items()
        if is_ours(name) and not max(e) < 2 * max(x for n, x in _others(errors) for x in x)
    ]  # fmt: skip
    clock = clock_for(place, 1)

    def quiet(call):
        def run():
            with torch.no_grad():
                return call()

        return run

    forward = interleave({n: quiet(c) for n, (c, _) in calls.items()}, clock, seconds)
    backward = interleave(
        {
            n: lambda out=out: torch.autograd.grad(out, leaves, g, retain_graph=True)
            for n, (_, out) in calls.items()
        },
        clock,
        seconds,
    )
    flops = 4 * shape[0] * shape[1] * S * S * D * (0.5 if causal else 1.0)
    rows = {}
    for name in calls:
        rows[name] = {
            "forward": _rate(forward[name], flops),
            "backward": _rate(backward[name], 2.5 * flops),
            "error": errors.get(name),
        }
    case = {"B": shape[0], "H": shape[1], "S": S, "D": D, "causal": causal, "bias": bias}
    return {"case": case | {"dtype": dtype}, "rows": rows, "refused": refused, "failures": failures}


def _others(errors: dict[str, list[float]]):
    """Who ours are held to: everybody else, or themselves where nobody else ran."""
    others = {n: e for n, e in errors.items() if not is_ours(n)}
    return list((others or errors).items())


def _rate(timing, flops: float) -> dict[str, float]:
    found = timing.interval
    return {"seconds": found.median, "width": found.width, "tflops": flops / found.median / 1e12}


def _exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor, causal: bool) -> list[Tensor]:
    """The first head in fp64, row blocks at a time: out, dq, dk, dv."""
    q, k, v, g = (t[0, 0].detach().double() for t in (q, k, v, g))
    S, D = q.shape
    out, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    columns = torch.arange(S, device=q.device)
    for begin in range(0, S, 1024):
        rows = slice(begin, min(S, begin + 1024))
        logits = q[rows] @ k.t() * D**-0.5
        if causal:
            logits.masked_fill_(columns > columns[rows, None], -torch.inf)
        p = logits.softmax(-1)
        out[rows] = p @ v
        dv += p.t() @ g[rows]
        dp = g[rows] @ v.t()
        ds = p * (dp - (g[rows] * out[rows]).sum(-1, keepdim=True)) * D**-0.5
        dq[rows] = ds @ k
        dk += ds.t() @ q[rows]
    return [out, dq, dk, dv]


def _errors(got: tuple[Tensor, ...], exact: list[Tensor]) -> list[float]:
    from fasttx.testing import relative_rms

    return [relative_rms(t[0, 0].detach(), e) for t, e in zip(got, exact, strict=True)]
