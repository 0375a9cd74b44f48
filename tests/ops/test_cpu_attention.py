"""The native CPU forward against the reference in fp64, at every instruction set."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttx import native
from fasttx.reference.attention import attention_math

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["mask", "slopes", "positions", "table", "lut", "cu_q", "cu_k", "seed"]
SCALARS = {
    "softcap": 0.0,
    "dropout_p": 0.0,
    "left": -1,
    "right": -1,
    "lower_right": False,
    "bias_shift": 0,
}


def arguments(options: dict, D: int) -> list:
    scalars = SCALARS | {"scale": 1 / math.sqrt(max(D, 1))} | options
    order = ("scale", "softcap", "dropout_p", "left", "right", "lower_right", "bias_shift")
    return [options.get(n) for n in NAMES] + [scalars[n] for n in order]


def native_forward(q, k, v, **options):
    (B, H, S, D), Dv = q.shape, v.shape[3]
    out = torch.full((B, S, H, Dv), math.nan, dtype=q.dtype).transpose(1, 2)
    lse = torch.full((B, H, S), math.nan)
    native.load()
    op = torch.ops.fasttx_native.attention_fwd_cpu
    op(out, lse, q, k, v, *arguments(options, D))
    return out, lse


def exact(q, k, v, **options):
    wide = {
        n: t.double() if n in ("slopes", "positions", "table") else t for n, t in options.items()
    }
    mask = options.get("mask")
    if mask is not None and mask.dtype is not torch.bool:
        wide["mask"] = mask.double()
    return attention_math(q.double(), k.double(), v.double(), *arguments(wide, q.shape[3]))


# Relative RMS of the output, and absolute of lse. fp32: chains of up to a few hundred roundings of
# 6e-8. 16 bit: the output's own rounding is 1.1e-3 (bf16), 1.4e-4 (fp16) RMS, and bf16 rounds the
# probabilities (2^-9 at most, which is lse's error for a row of one or two keys).
BOUNDS = {
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (3.5e-3, 2e-3),
    torch.float16: (4e-4, 1e-5),
}


def check(q, k, v, **options):
    out, lse = native_forward(q, k, v, **options)
    o, statistics = exact(q, k, v, **options)
    assert (out.isnan() == o.isnan()).all()
    assert ((lse == -math.inf) == (statistics == -math.inf)).all()
    assert (lse.isnan() == statistics.isnan()).all()
    rms, absolute = BOUNDS[q.dtype]
    finite = o.isfinite()
    error = (out.double() - o)[finite].norm() / o[finite].norm().clamp_min(1e-3)
    assert error <= rms, f"relative error {error:.2e}"
    seen = statistics.isfinite()
    scale = statistics[seen].abs().clamp_min(1)
    worst = ((lse.double() - statistics)[seen].abs() / scale).amax() if seen.any() else 0
    assert worst <= absolute, f"lse {worst:.2e}"
    return out, lse


def qkv(B, H, S, T, D, G=None, Dv=None, dtype=torch.float32):
    G, Dv = G or H, D if Dv is None else Dv
    return [torch.randn(s).to(dtype) for s in ((B, H, S, D), (B, G, T, D), (B, G, T, Dv))]


def test_lower_instruction_sets():
    """This file and the one of the vector layer again, in a process for each."""
    _C = pytest.importorskip("fasttx._C", reason="fasttx._C is not built (python3-dev)")
    names = _C.cpu_isas()
    files = [__file__, str(Path(__file__).with_name("test_cpu_vec.py"))]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not lower_instruction_sets"]
    for level in names[: names.index(_C.cpu_isa())]:
        env = os.environ | {"FASTTX_CPU_ISA": level}
        command = [sys.executable, "-m", "pytest", *options, *files]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{level}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 64, 128, 64),
        (2, 1, 100, 77, 64),
        (1, 1, 1, 1, 1),
        (1, 2, 17, 3, 5),
        (1, 1, 129, 257, 33),
        (1, 1, 33, 31, 256),
        (1, 1, 1, 500, 128),
        (2, 3, 70, 140, 2),
    ],
)
def test_shapes(shape, dtype):
    check(*qkv(*shape, dtype=dtype))
    check(*qkv(*shape, Dv=shape[4] // 2 + 1, dtype=dtype), right=0)
    check(*qkv(*shape, dtype=dtype), right=0, lower_right=True)


@pytest.mark.parametrize(("S", "T"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(S, T):
    out, lse = native_forward(*qkv(2, 2, S, T, 8))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize(("D", "Dv"), [(0, 8), (8, 0)])
def test_no_columns(D, Dv):
    out, lse = native_forward(*qkv(1, 2, 20, 30, D, Dv=Dv))
    assert out.isfinite().all()
    assert lse.isfinite().all()


def pad(dtype, T, B=2):
    lengths = torch.tensor([T - 7 * b for b in range(B)])
    seen = (torch.arange(T) < lengths[:, None])[:, None, None]
    return seen if dtype is torch.bool else torch.where(seen, 0.0, -math.inf).to(dtype)


def scattered(*shape):
    mask = torch.rand(shape) < 0.6
    mask[..., : shape[-2] // 3, :] &= torch.rand(shape[-2] // 3, 1) < 0.5
    return mask


def lut(reach=20, buckets=9):
    return torch.randint(0, buckets, (2 * reach + 1,), dtype=torch.int32)


S, T, H = 150, 170, 2
SEED = torch.tensor([0x1234567_89ABCDEF])
FEATURES = {
    "gqa": lambda: {"G": 1},
    "softcap": lambda: {"softcap": 1.5},
    "causal softcap": lambda: {"softcap": 2.0, "right": 0},
    "window": lambda: {"left": 20, "right": 11},
    "window lower right": lambda: {"left": 3, "right": 0, "lower_right": True},
    "left window": lambda: {"left": 70},
    "negative scale": lambda: {"scale": -0.3, "right": 0},
    "zero scale": lambda: {"scale": 0.0, "right": 0},
    "key padding": lambda: {"mask": pad(torch.bool, T)},
    "key padding fp32": lambda: {"mask": pad(torch.float32, T)},
    "left padding": lambda: {"mask": pad(torch.bool, T).flip(-1), "right": 0},
    "holes": lambda: {"mask": scattered(2, 1, 1, T), "right": 5},
    "key bias": lambda: {"mask": torch.randn(1, H, 1, T)},
    "bool mask": lambda: {"mask": scattered(2, H, S, T)},
    "bool mask over heads": lambda: {
        "mask": scattered(2, 1, S, T),
        "right": 0,
        "lower_right": True,
    },
    "float mask": lambda: {"mask": torch.randn(S, T)[None, None]},
    "bf16 mask": lambda: {"mask": torch.randn(1, H, S, T).bfloat16(), "softcap": 3.0},
    "fp16 mask with holes": lambda: {
        "mask": torch.randn(1, 1, S, T).masked_fill(~scattered(1, 1, S, T), -math.inf).half()
    },
    "transposed mask": lambda: {"mask": torch.randn(2, H, T, S).transpose(2, 3)},
    "mask with gaps": lambda: {"mask": torch.randn(2, 1, S, 2 * T)[..., ::2]},
    "causal bool mask": lambda: {"mask": torch.ones(1, 1, S, T, dtype=torch.bool).tril(-3)},
    "band bool mask": lambda: {
        "mask": torch.ones(1, H, S, T, dtype=torch.bool).tril(90).triu(20),
        "right": 100,
    },
    "expanded mask": lambda: {"mask": scattered(2, 1, 1, T).expand(2, 1, S, T), "right": 5},
    "mask per query": lambda: {"mask": scattered(2, 1, S, 1)},
    "one number": lambda: {"mask": torch.tensor(1.5).expand(1, 1, 1, 1)},
    "alibi": lambda: {"slopes": torch.tensor([[0.5, 0.25]]), "right": 0},
    "alibi positions": lambda: {
        "slopes": torch.rand(2, H),
        "positions": torch.arange(2 * T).view(2, T).float(),
        "right": 0,
    },
    "alibi and padding": lambda: {"slopes": 0.3 * torch.rand(1, H), "mask": pad(torch.bool, T)},
    "relative bias": lambda: {"table": torch.randn(9, H), "lut": lut()},
    "relative bias shifted": lambda: {
        "table": torch.randn(9, H).bfloat16(),
        "lut": lut(300),
        "bias_shift": -13,
        "right": 0,
    },
    "relative bias and mask": lambda: {
        "table": torch.randn(9, H),
        "lut": lut(1),
        "mask": scattered(2, 1, 1, T),
    },
    "dropout": lambda: {"dropout_p": 0.3, "seed": SEED},
    "dropout causal": lambda: {"dropout_p": 0.1, "seed": SEED, "right": 0},
    "dropout of nearly all": lambda: {"dropout_p": 0.999, "seed": SEED},
    "dropout window gqa": lambda: {"dropout_p": 0.5, "seed": -SEED, "left": 9, "right": 30, "G": 1},
    "dropout padding": lambda: {
        "dropout_p": 0.5,
        "seed": SEED,
        "mask": pad(torch.bool, T).flip(-1),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, dtype):
    options = FEATURES[name]()
    check(*qkv(2, H, S, T, 24, G=options.pop("G", None), dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"right": 0, "lower_right": True},
        {"left": 4, "right": 0},
        {"dropout_p": 0.3, "seed": SEED, "right": 0},
        {"slopes": torch.tensor([[0.3, 0.1], [0.2, 0.4], [0.1, 0.1], [1.0, 2.0]])},
        {"table": torch.randn(9, H), "lut": lut(6)},
    ],
)
def test_packed(options, dtype):
    # Rows and keys before the first, between and behind the sequences' ends; one has no keys.
    cu_q = torch.tensor([2, 35, 35, 99, 110], dtype=torch.int32)
    cu_k = torch.tensor([0, 50, 57, 130, 130], dtype=torch.int32)
    q, k, v = qkv(1, H, 117, 140, 24, dtype=dtype)
    v[:, :, 130:] = math.nan
    k[:, :, 130:] = math.nan
    check(q, k, v, cu_q=cu_q, cu_k=cu_k, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    def spread(t, how):
        B, H, S, D = t.shape
        if how == "columns":
            return t.transpose(2, 3).contiguous().transpose(2, 3)
        if how == "gaps":
            return torch.full((B, H, 2 * S, D + 3), math.nan, dtype=dtype)[:, :, ::2, :D].copy_(t)
        if how == "every other":
            return torch.full((B, H, S, 2 * D), math.nan, dtype=dtype)[..., ::2].copy_(t)
        return t[:1, :, :1].expand(B, H, S, D)

    for shape in [(2, 2, 40, 90, 32), (2, 2, 40, 20, 7)]:
        q, k, v = qkv(*shape, dtype=dtype)
        for how in ("columns", "gaps", "every other", "expanded"):
            check(spread(q, how), k, v)
            check(q, spread(k, how), v, right=0)
            check(q, k, spread(v, how), right=0, dropout_p=0.2, seed=SEED)


def test_outputs_of_any_stride_and_no_other_memory():
    q, k, v = qkv(2, 2, 37, 50, 20, Dv=19, dtype=torch.bfloat16)
    expected, _ = native_forward(q, k, v)
    memory = torch.full((2, 2, 40, 64), 7.0).bfloat16()
    out = memory[:, :, 1:38, 3:41:2]
    statistics = torch.full((2, 2, 39), 7.0)
    lse = statistics[:, :, 1:38]
    op = torch.ops.fasttx_native.attention_fwd_cpu
    op(out, lse, q, k, v, *arguments({}, 20))
    assert (out == expected).all()
    out.fill_(7)
    lse.fill_(7)
    assert (memory == 7).all()
    assert (statistics == 7).all()


POISON = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_poison_stays_hidden(dtype, poison):
    S = T = 140
    key_mask = torch.ones(1, 1, 1, T, dtype=torch.bool)
    key_mask[..., 13] = key_mask[..., 90] = key_mask[..., 131:] = False
    float_mask = torch.zeros(1, 1, S, T).masked_fill(~key_mask, -math.inf)
    bad = ~key_mask[0, 0, 0]
    for options in (
        {"mask": key_mask},
        {"mask": key_mask.expand(1, 1, S, T)},
        {"mask": float_mask},
        {"mask": key_mask, "right": 0, "slopes": torch.rand(1, 2)},
        {"mask": key_mask, "dropout_p": 0.3, "seed": SEED},
    ):
        q, k, v = qkv(1, 2, S, T, 16, dtype=dtype)
        _, clean_lse = native_forward(q, k, v, **options)
        k[:, :, bad] = poison
        v[:, :, bad] = poison
        out, lse = native_forward(q, k, v, **options)
        assert out.isfinite().all()
        assert (lse == clean_lse).all()
        check(q, k, v, **options)

    q, k, v = qkv(1, 1, S, T, 16, dtype=dtype)
    k[:, :, 100:] = v[:, :, 100:] = poison
    out, lse = native_forward(q, k, v, right=0)
    assert out[:, :, :100].isfinite().all()
    assert lse[:, :, :100].isfinite().all()
    assert not out[:, :, 100:].isfinite().any()


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["query", "value"])
def test_visible_poison_is_seen(dtype, poison, where):
    q, k, v = qkv(1, 2, 70, 90, 16, dtype=dtype)
    if where == "query":
        q[0, 0, 20, 3] = poison
        out, lse = native_forward(q, k, v)
        assert out[0, 0, 20].isnan().all()
        assert lse[0, 0, 20].isnan()
        out[0, 0, 20] = 0
        assert out.isfinite().all()
    else:
        v[0, 1, 60, 5] = poison
        out, _ = native_forward(q, k, v, right=0)
        column = out[0, 1, 60:, 5]
        assert column.isnan().all() if math.isnan(poison) else (column == poison).all()
        out[0, 1, 60:, 5] = 0
        assert out.isfinite().all()


@pytest.mark.parametrize(
    "lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min]
)
def test_the_finite_minimum_is_a_number(lowest):
    """A row of nothing else is a plain mean, as in softmax."""
    q, k, v = qkv(1, 2, 40, 50, 16)
    seen = scattered(1, 1, 40, 50)
    seen[:, :, 3] = False
    for mask in (
        torch.zeros(1, 1, 40, 50).masked_fill(~seen, lowest),
        torch.full((1, 1, 1, 50), lowest),
    ):
        out, lse = native_forward(q, k, v, mask=mask)
        wide = [t.double() for t in (q, k, v, mask)]
        expected = torch.nn.functional.scaled_dot_product_attention(*wide[:3], attn_mask=wide[3])
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-6)
        logits = (wide[0] @ wide[1].transpose(2, 3)) / 4 + wide[3]
        # Sums are in units of log2(e), which saturate at the lowest fp32 number.
        torch.testing.assert_close(lse, logits.logsumexp(-1).float(), rtol=4e-3, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = qkv(1, 1, 30, 40, 16)
    out, lse = check(100 * q, 100 * k, v)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 1), (1, 3), (5, 3)])
def test_threads_change_nothing(B, H, dtype, threads):
    q, k, v = qkv(B, H, 200, 210, 24, dtype=dtype)
    packed = [
        qkv(1, H, 200, 210, 24, dtype=dtype),
        {
            "cu_q": torch.tensor([0, 90, 200], dtype=torch.int32),
            "cu_k": torch.tensor([0, 100, 210], dtype=torch.int32),
        },
    ]
    calls = [
        ((q, k, v), {"right": 0}),
        ((q, k, v), {"table": torch.randn(9, H), "lut": lut()}),
        packed,
    ]
    for tensors, options in calls:
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(native_forward(*tensors, **options))
        for out, lse in results[1:]:
            assert (out == results[0][0]).all()
            assert (lse == results[0][1]).all()


def test_runs_in_a_forked_child(threads):
    threads(2)
    q, k, v = qkv(1, 3, 200, 200, 16)
    expected, _ = native_forward(q, k, v)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        out, _ = native_forward(q, k, v)
        os._exit(0 if (out == expected).all() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
