"""What attention should answer: fp64 by the plain formula, one head group at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gate import Error, Verdict, judge
from .attention_case import Case, Tensors, plain, relative_buckets

MAX_PAIRS = 1 << 24


@dataclass
class Answer:
    """fp64 values of ``out``, ``dq``, ``dk``, ``dv`` (and ``dtable``) for some head groups.

    groups: the (batch row, key head) pairs computed; all of them where the problem is small, else
    an even sample, so that a check costs a bounded number of pairs. plain: the errors of the same
    formula run in the case's own dtype, the yardstick of the gate.
    """

    case: Case
    groups: list[tuple[int, int]]
    values: dict[str, Tensor]
    plain: dict[str, Error]

    @property
    def sampled(self) -> bool:
        return len(self.groups) < self.case.batch * self.case.groups

    def errors(self, actual: dict[str, Tensor]) -> dict[str, Error]:
        picked = {name: _pick(self.case, self.groups, name, t) for name, t in actual.items()}
        return {name: Error.between(t, self.values[name]) for name, t in picked.items()}

    def judge(self, actual: dict[str, Tensor]) -> Verdict:
        return judge(self.errors(actual), self.plain, self.case.torch_dtype)


def exact_answer(case: Case, x: Tensors) -> Answer:
    """The fp64 values alone, with no yardstick."""
    groups = _sample(case)
    return Answer(case, groups, _compute(case, x, groups, torch.float64, True), {})


def answer(case: Case, x: Tensors, gradients: bool = True) -> Answer:
    groups = _sample(case)
    exact = _compute(case, x, groups, torch.float64, gradients)
    rounded = _compute(case, x, groups, case.torch_dtype, gradients)
    errors = {name: Error.between(rounded[name], exact[name]) for name in exact}
    return Answer(case, groups, exact, errors)


def _sample(case: Case) -> list[tuple[int, int]]:
    """Head groups to check; whole heads where a table's gradient sums over the batch."""
    per_group = case.queries * case.keys * (case.heads // case.groups)
    if case.bias == "relative":
        affordable = max(1, MAX_PAIRS // (per_group * case.batch))
        return [(b, g) for g in _spread(case.groups, affordable) for b in range(case.batch)]
    every = [(b, g) for b in range(case.batch) for g in range(case.groups)]
    return [every[i] for i in _spread(len(every), max(1, MAX_PAIRS // per_group))]


def _spread(n: int, count: int) -> list[int]:
    if count >= n:
        return list(range(n))
    if count == 1:
        return [n - 1]
    return sorted({round(i * (n - 1) / (count - 1)) for i in range(count)})


def _heads(case: Case, group: int) -> slice:
    repeats = case.heads // case.groups
    return slice(group * repeats, (group + 1) * repeats)


def _pick(case: Case, groups: list[tuple[int, int]], name: str, value: Tensor) -> Tensor:
    if name == "dtable":
        columns = sorted({h for _, g in groups for h in range(case.heads)[_heads(case, g)]})
        return value[:, columns]
    if name in ("dk", "dv"):
        return torch.stack([value[b, g : g + 1] for b, g in groups])
    return torch.stack([value[b, _heads(case, g)] for b, g in groups])


def _compute(
    case: Case, x: Tensors, groups: list[tuple[int, int]], dtype: torch.dtype, gradients: bool
) -> dict[str, Tensor]:
    table = None if x.table is None else x.table.detach().to(dtype).requires_grad_(gradients)
    buckets = None
    if table is not None:
        buckets = relative_buckets(case.queries, case.keys, x.q.device)
    positions = torch.arange(case.keys, device=x.q.device, dtype=dtype)
    found: dict[str, list[Tensor]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    for b, g in groups:
        heads = _heads(case, g)
        q, k, v = (
            t.detach()[b : b + 1, chosen].to(dtype).requires_grad_(gradients)
            for t, chosen in ((x.q, heads), (x.k, slice(g, g + 1)), (x.v, slice(g, g + 1)))
        )
        bias = None
        if table is not None:
            bias = table[:, heads][buckets].permute(2, 0, 1)[None]
        elif x.slopes is not None:
            bias = (x.slopes[heads].to(dtype)[:, None, None] * positions)[None]
        out = plain(
            q, k, v,
            causal=case.causal,
            mask=None if x.mask is None else x.mask[b : b + 1],
            bias=bias,
            keep=None if x.keep is None else x.keep[b : b + 1, heads],
            dropout=case.dropout,
        )  # fmt: skip
        found["out"].append(out.detach()[0])
        if gradients:
            out.backward(x.dout[b : b + 1, heads].to(dtype))
            for name, leaf in (("dq", q), ("dk", k), ("dv", v)):
                found[name].append(leaf.grad[0])
    values = {name: torch.stack(parts) for name, parts in found.items() if parts}
    if gradients and table is not None:
        values["dtable"] = _pick(case, groups, "dtable", table.grad)
    return values
