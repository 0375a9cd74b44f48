"""Bugs planted in the kernels that are bound by memory: every one is caught."""
# ruff: noqa: E501 (tables, one case a line)

import pytest
import torch

import fasttx
from fasttx.ops.embed import embed_bwd, embed_fwd
from fasttx.testing import guarded_outputs

from .planted import Bug, Planted

pytestmark = pytest.mark.slow

SOFTMAX, MASK, DECODE = "cuda/softmax.h", "cuda/softmax_mask.cu", "cuda/attention_decode.cu"
TILE = "for (int i = 0; i < 8; i++) scratch[slot * TILE_ROWS + i * 8 + at] = x[i];"
SUMS = "for (int i = 0; i < 8; i++) scratch[(row * 8 + i) * 32 + lane] = sums[kind][i];"
PLACES = "if (threadIdx.x < ROWS) rows[threadIdx.x] = query_of(p, b, g, first_row + threadIdx.x, length);"
FLAGS = "if (lane == 0) flags[warp] = bad ? 1.0f : 0.0f;"
PEAK = "if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;"
READ = "// Every thread has read the target's logit.\n  __syncthreads();"
BUGS = {
    "softmax": [
        Bug("no barrier in a tile", SOFTMAX, f"{TILE}\n  __syncthreads();", TILE),
        Bug("no barrier before a block's maximum", "cuda/reduce.h", f"{PEAK}\n  __syncthreads();", PEAK),
        Bug("a warp's maximum for a block's", "cuda/row_group.h", "return block_max(x, scratch);", "return warp_max(x);"),
        Bug("a row's maximum with its neighbour's", "cuda/row_group.h", "x = fmaxf(x, __shfl_xor_sync(~0u, x, with));", "x = fmaxf(x, __shfl_xor_sync(~0u, x, 2 * with));"),
        Bug("a vector too many", "cuda/sweep.h", "(V - lead) / 8", "(V - lead + 7) / 8"),
        Bug("a column too many", SOFTMAX, "at.i[2] + p.offset + 1", "at.i[2] + p.offset + 2"),
        Bug("no barrier before the rows' sums", MASK, "__syncthreads();\n  if (warp || n >= plan.columns) return;", "if (warp || n >= plan.columns) return;"),
        Bug("a part too few", MASK, "part < plan.parts", "part + 1 < plan.parts"),
    ],
    "embed": [
        Bug("a run ends too early", "cuda/embed_tables.cu", "e + k + 1 == CHUNK", "e + k + 2 == CHUNK"),
        Bug("a piece too few", "cuda/embed_tables.cu", "(lower_bound(p, int64_t{id} + 1) + CHUNK - 1) / CHUNK", "lower_bound(p, int64_t{id} + 1) / CHUNK"),
        Bug("absent rows left alone", "cuda/embed_tables.cu", "absent = key_at(p, at) != first + lane;", "absent = false;"),
        Bug("no barrier before the warps' sums", "cuda/norm_row.h", f"{SUMS}\n      __syncthreads();", SUMS),
        Bug("dropout of the column beside", "cuda/philox.h", "kept >> column % 8 & 1", "kept >> (column + 1) % 8 & 1"),
    ],
    "add_norm": [
        Bug("a warp's sum for a block's", "cuda/row_group.h", "block_sum(x, scratch);", "for (int k = 0; k < K; k++) x[k] = warp_sum(x[k]);"),
        Bug("a row's sum with its neighbour's", "cuda/row_group.h", "x[k] += __shfl_xor_sync(~0u, x[k], with);", "x[k] += __shfl_xor_sync(~0u, x[k], 2 * with);"),
        Bug("no last vector", "cuda/add_norm_fwd.cu", "if (n < N) x[c] = load16_once(static_cast<const uint16_t*>(a.x.data) + x_row + n);", "if (n < N - 8) x[c] = load16_once(static_cast<const uint16_t*>(a.x.data) + x_row + n);"),
        Bug("the rows of the tail left out", "cuda/norm_row.h", "(M + rows - 1) / rows", "M / rows"),
        Bug("dropout of the row beside", "cuda/add_norm_fwd.cu", "keep_bits(p.dropout, key, n / 8, static_cast<uint32_t>(m))", "keep_bits(p.dropout, key, n / 8, static_cast<uint32_t>(m + 1))"),
    ],
    "rope": [
        Bug("half a head too near", "cuda/rope.cu", "load16_once(row + column + half)", "load16_once(row + column + half - 8)"),
        Bug("the heads of the tail left out", "cuda/rope.cu", "(p.heads + HEADS - 1) / HEADS", "p.heads / HEADS"),
        Bug("the other sign backward", "cuda/rope.cu", "u[i] * ca + v[i] * sb", "u[i] * ca - v[i] * sb"),
        Bug("the angles of the token before", "cuda/rope.cu", "at.s * t.strides[1]", "(at.s ? at.s - 1 : 0) * t.strides[1]"),
    ],
    "cross_entropy": [
        Bug("no barrier before the row is overwritten", "cuda/cross_entropy.cu", READ, ";"),
        Bug("no last number", "cuda/sweep.h", "V - 8 * vectors", "V - 8 * vectors - 1"),
        Bug("the class beside", "cuda/cross_entropy_rows.h", "n == target", "n == target + 1"),
        Bug("ignored rows left alone", "cuda/cross_entropy.cu", "row_zero(row, stride, p.V);", ";"),
        Bug("a warp's sum for a block's", "cuda/cross_entropy_rows.h", "block_sum(sums, scratch);", "for (int k = 0; k < 2; k++) sums[k] = warp_sum(sums[k]);"),
    ],
    "attention_decode": [
        Bug("no barrier after the queries", DECODE, f"{PLACES}\n  __syncthreads();", PLACES),
        Bug("no barrier before the statistics", DECODE, f"{FLAGS}\n  __syncthreads();", FLAGS),
        Bug("sums of the warps at once", DECODE, "w == warp", "true"),
        Bug("a key twice", DECODE, "min(split * each, count)", "max(0, min(split * each, count) - 1)"),
        Bug("values of the key beside", DECODE, "2 * part + n % 2 + 8 * (n / 2)", "(2 * part + n % 2 + 8 * (n / 2)) ^ 1"),
        Bug("a product with what is hidden", DECODE, "p.S > 1", "false"),
        Bug("a split too few", DECODE, "s + k < p.splits ? load(totals + s + k) : 0.0f", "s + k + 2 < p.splits ? load(totals + s + k) : 0.0f"),
    ],
}  # fmt: skip
SOURCES = {
    "add_norm": ["add_norm_fwd.cu", "add_norm_bwd.cu", "rows.cu"],
    "rope": ["rope.cu"],
    "cross_entropy": ["cross_entropy.cu"],
    "softmax": ["softmax_fwd.cu", "softmax_bwd.cu", "softmax_mask.cu"],
    "embed": ["embed_fwd.cu", "embed_bwd.cu", "embed_tables.cu", "rows.cu"],
    "attention_decode": ["attention_decode.cu", "cache_append.cu"],
}


def softmax(backend):
    """Rows by a block, odd rows, rows side by side; a mask that all rows share."""
    found = []
    generator = torch.Generator().manual_seed(2)
    for shape, dim, causal in (((2, 1104), -1, False), ((5, 61), -1, False), ((40, 16), 0, False), ((6, 9), -1, True)):  # fmt: skip
        x = torch.randn(shape, generator=generator).bfloat16()
        x[0, 3] = 9  # the largest of a row, by far
        x.requires_grad_()
        y = fasttx.log_softmax(x, dim=dim, is_causal=causal, backend=backend)
        g = torch.randn(shape, generator=generator).bfloat16()
        found += [y, *torch.autograd.grad(y, x, g)]
    x = torch.randn(100, 24, generator=generator).bfloat16()
    mask = torch.zeros(24, requires_grad=True)
    y = fasttx.log_softmax(x, mask=mask, backend=backend)
    return [*found, *torch.autograd.grad(y[:, ::2].sum(), mask)]


def embed(backend):
    """Ids in runs that begin and end within 32 and beyond, a norm, dropout; odd columns."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1] * 70 + [4] * 20 + [7] * 40])
    ids = ids[:, torch.randperm(130, generator=generator)]
    found, seed = [], torch.tensor([5])
    for N in (16, 13):
        w = torch.randn(9, N, generator=generator).bfloat16()
        scale, g = torch.randn(2, 130, N, generator=generator).bfloat16()
        tables, rest = (w, None, None, scale[0], scale[1]), (ids, None, None, seed, 0, -1, -1, 1)
        out, stats = embed_fwd(*tables, *rest, 1.0, 1e-5, 0.3, False, backend=backend)
        found += [out, *embed_bwd(*tables, stats, g[None], *rest, 1.0, 0.3, 25, backend=backend)]
    return found


def attention_decode(backend):
    """Several splits, two queries, with NaN in what the second alone sees."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(1, n, t, 32, generator=generator).bfloat16()
        for n, t in ((2, 2), (1, 700), (1, 700))
    )
    v[0, 0, 191::192] = v[0, 0, 192::192] = 200  # where a range of keys ends or begins
    lengths = torch.tensor([700], dtype=torch.int32)
    clean = fasttx.attention_decode(q, k, v, lengths, scale=0.5, backend=backend)
    v[0, 0, 699] = torch.nan
    hidden = fasttx.attention_decode(q, k, v, lengths, scale=0.5, backend=backend)
    return [clean, hidden[:, :, :1]]


def add_norm(backend):
    """Rows by lanes, by a warp, by a block; the rows of a part; many parts."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for M, N in ((13, 264), (3, 1104), (7, 37), (1100, 16)):
        x, residual, g = torch.randn(3, M, N, generator=generator).bfloat16()
        x[:, 0] = 8  # a row's own sum, by far
        scale = torch.randn(2, N, generator=generator).bfloat16() / 8
        leaves = [t.requires_grad_() for t in (x, residual, scale[0].clone(), scale[1].clone())]
        options = {"dropout_p": 0.25, "seed": 3, "backend": backend}
        y = fasttx.add_norm(leaves[0], leaves[1], weight=leaves[2], bias=leaves[3], **options)
        grads = torch.autograd.grad(y, leaves, g / 32)
        found += [y, *grads]
    return found


def rope(backend):
    """Six heads, so that some share a thread's four and some do not; halves and neighbours."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for interleaved in (False, True):
        q, k = (torch.randn(1, h, 5, 64, generator=generator).bfloat16() for h in (4, 2))
        cos, sin = torch.randn(2, 5, 32, generator=generator)
        leaves = [q.requires_grad_(), k.requires_grad_()]
        options = {"interleaved": interleaved, "backend": backend}
        out = fasttx.rope(*leaves, cos, sin, **options)
        g = [torch.randn(t.shape, generator=generator).bfloat16() for t in out]
        found += [*out, *torch.autograd.grad(out, leaves, g)]
    return found


def cross_entropy(backend):
    """Rows that begin anywhere; the gradient in the logits' place."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for V, inplace in ((1030, False), (45, False), (1030, True)):
        x = torch.randn(6, V, generator=generator).bfloat16() * 3
        target = torch.tensor([0, V - 2, -100, V // 2, 3 * V // 4, 1])
        x[torch.arange(6), target.clamp(0)] = 5
        leaf = x.clone().requires_grad_()
        options = {"inplace_grad": inplace, "reduction": "none", "backend": backend}
        logits = leaf * 1 if inplace else leaf
        loss = fasttx.cross_entropy(logits, target, **options)
        found += [loss, *torch.autograd.grad(loss.sum(), leaf)]
    return found


CALLS = {
    "softmax": softmax,
    "embed": embed,
    "attention_decode": attention_decode,
    "add_norm": add_norm,
    "rope": rope,
    "cross_entropy": cross_entropy,
}


@pytest.fixture(scope="module")
def planted():
    made = {}

    def make(op: str) -> Planted:
        if op not in made:
            sources = [f"cuda/{s}" for s in (*SOURCES[op], "device.cu")]
            made[op] = Planted(op, [*sources, f"ops/cuda/{op}.cpp"], BUGS[op])
        return made[op]

    return make


def wrong(kernels: Planted, op: str, bug: str | None) -> bool:
    """Whether some schedule shows it: a fault, a write outside, or a result that is not right."""
    expected = [t.detach() for t in CALLS[op]("reference")]
    for eager, seed in ((False, 0), (True, 1), (False, 2), (True, 3)):
        try:
            with kernels.bug(bug, 80, eager, seed), guarded_outputs():
                got = [t.detach() for t in CALLS[op]("cuda")]
        except (RuntimeError, AssertionError):
            return True
        for ours, theirs in zip(got, expected, strict=True):
            if not torch.allclose(ours.double(), theirs.double(), atol=6e-2, rtol=2e-2):
                return True
    return False


@pytest.mark.parametrize("op", BUGS)
def test_without_a_bug_all_is_well(planted, op):
    assert not wrong(planted(op), op, None)


@pytest.mark.parametrize(
    ("op", "bug"), [(o, b.name) for o, bugs in BUGS.items() for b in bugs], ids=str
)
def test_a_planted_bug_is_caught(planted, op, bug):
    assert wrong(planted(op), op, bug)
