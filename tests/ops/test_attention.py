"""attention on every backend and dtype against fp64, in the one harness."""

import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx.reference.philox import dropout_threshold, philox_mask
from fasttx.testing import check, guarded_outputs
from tests.conftest import unusable
from tests.ops.attention_cases import Case, cases, qkv, relative
from tests.ops.contract import BACKENDS, backend_fixture, every_case, skip_unusable

pytestmark = pytest.mark.filterwarnings("ignore:fasttx.attention runs on the plain")


backend = backend_fixture("attention_fwd")


QUICK = {c.name for c in cases(fast=True)}


def _slow(backend, case, dtype):
    """Triton's interpreter takes seconds a case: fp32 and bf16 of the first list are quick."""
    return backend == "triton" and (case.name not in QUICK or dtype is torch.float16)


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(cases(), _slow)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("attention_fwd", name)
    check(
        case.function(name),
        case.function("reference"),
        case.plain(dtype),
        case.inputs,
        dtype=dtype,
        wanted=case.wanted,
        names=("out", "lse"),
        keep=case.keep,
        layouts=case.layouts,
    )


def _refused(case: Case) -> bool:
    """What PyTorch's own kernel for the CPU cannot say."""
    o = case.options
    mine = {"softcap", "dropout_p", "cu_seqlens", "window"} & {*o}
    q, k = case.inputs["query"], case.inputs["key"]
    shifted = o.get("is_causal") == "lower_right" and q.shape[-2] != k.shape[-2]
    return bool(mine) or case.bias is not None or shifted


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(cases(), backends=("torch",))))
def test_torch_against_fp64(name: str, dtype: torch.dtype, case: Case):
    if _refused(case):
        inputs = {
            n: t if n in case.keep or not t.is_floating_point() else t.to(dtype)
            for n, t in case.inputs.items()
        }
        with pytest.raises(NotImplementedError, match="backend='torch' does not support"):
            case.function(name, lse=False)(**inputs)
        return
    gold = case.function("reference", lse=False)
    # Without an lse gradients may be 0 but for the rounding of delta: see Case.plain.
    plain = (case.function("reference", dtype, lse=False), gold)
    layouts = {n: v for n, v in case.layouts.items() if n != "dlse"}
    check(
        case.function(name, lse=False), gold, plain, case.inputs, dtype=dtype, wanted=case.wanted,
        keep=case.keep, layouts=layouts,
    )  # fmt: skip


def test_reference_is_sdpa():
    """The authority itself, against PyTorch's math in fp64."""
    for causal in (False, True):
        x = qkv(S=12, T=12, H=4, G=2)
        expected = F.scaled_dot_product_attention(*x.values(), is_causal=causal, enable_gqa=True)
        got = fasttx.attention(*x.values(), is_causal=causal, backend="reference")
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "is_causal": "lower_right",
            "window": (5, None),
            "softcap": 3.0,
            "dropout_p": 0.2,
            "seed": 3,
        },
    ],
)
def test_gradcheck(options):
    leaves = [t.requires_grad_() for t in qkv(B=1, H=2, G=1, S=4, T=6, D=3, Dv=2).values()]
    table = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(1, 2, 1, 6, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, mask, table):
        bias = fasttx.RelativePositionBias(table, max_distance=4)
        return fasttx.attention(q, k, v, mask, position_bias=bias, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, (*leaves, mask, table))
    assert torch.autograd.gradgradcheck(function, (*leaves, mask, table))


def test_sdpa_in_its_place(backend):
    """The same answers as F.scaled_dot_product_attention for its own arguments, through the same
    call."""
    q, k, v = (t.float() for t in qkv(H=4, G=2, S=17, T=17).values())
    mask = torch.randn(2, 1, 17, 17) > -1
    for args, kwargs in (
        ((), {}),
        ((mask,), {}),
        ((mask.float(),), {}),
        ((None, 0.0, True), {"scale": 0.3}),
    ):
        expected = F.scaled_dot_product_attention(q, k, v, *args, **kwargs, enable_gqa=True)
        got = fasttx.attention(q, k, v, *args, **kwargs, enable_gqa=True, backend=backend)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("where", ["key", "value", "both"])
def test_hidden_values_reach_nothing(backend, where):
    skip_unusable("attention_fwd", backend)
    q, k, v = (t.float() for t in qkv(S=20, T=20).values())
    visible = torch.arange(20) < 13
    options = {"attn_mask": visible[None, None, None].expand(2, 1, 1, 20), "backend": backend}
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = fasttx.attention(*clean, **options)
    expected.square().sum().backward()
    for poison in (torch.nan, torch.inf):
        dirty = [t.clone() for t in (q, k, v)]
        for i in {"key": [1], "value": [2], "both": [1, 2]}[where]:
            dirty[i][:, :, 13:] = poison
        for t in dirty:
            t.requires_grad_()
        out = fasttx.attention(*dirty, **options)
        out.square().sum().backward()
        torch.testing.assert_close(out, expected)
        for got, want in zip(dirty, clean, strict=True):
            torch.testing.assert_close(got.grad, want.grad)


def test_hidden_rows_reach_nothing_under_causal(backend):
    """Keys that only later queries may see, and queries that earlier keys never meet."""
    q, k, v = (t.float() for t in qkv(S=24, T=24).values())
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = fasttx.attention(*clean, is_causal=True, backend=backend)
    expected[:, :, :15].square().sum().backward()
    dirty = [t.clone() for t in (q, k, v)]
    for t in dirty:
        t[:, :, 15:] = torch.nan
        t.requires_grad_()
    out = fasttx.attention(*dirty, is_causal=True, backend=backend)
    torch.testing.assert_close(out[:, :, :15], expected[:, :, :15])
    assert out[:, :, 15:].isnan().all()
    weight = torch.zeros_like(out)
    weight[:, :, :15] = 2 * out.detach()[:, :, :15]
    grads = torch.autograd.grad(out, dirty, weight)
    torch.testing.assert_close(grads[0][:, :, :15], clean[0].grad[:, :, :15])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_visible_nan_shows(backend, which):
    tensors = [t.float() for t in qkv(S=9, T=9).values()]
    tensors[which][1, 1, 4, 2] = torch.nan
    out = fasttx.attention(*tensors, backend=backend)
    if which == 0:
        assert out[1, 1, 4].isnan().all()
        assert out.isnan().sum() == out.shape[-1]
    elif which == 1:
        assert out[1, 1].isnan().all()
        assert not out[0].isnan().any()
    else:
        assert out[1, 1, :, 2].isnan().all()
        assert out.isnan().sum() == 9


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_nan_in_a_mask_shows_unless_hidden(backend):
    skip_unusable("attention_fwd", backend)
    q, k, v = (t.float() for t in qkv(S=9, T=9).values())
    mask = torch.zeros(9, 9)
    mask[3, 2] = torch.nan
    mask[3, 7] = torch.nan
    out = fasttx.attention(q, k, v, mask, is_causal=True, backend=backend)
    assert out[:, :, 3].isnan().all()
    mask[3, 2] = 0
    out = fasttx.attention(q, k, v, mask, is_causal=True, backend=backend)
    assert not out.isnan().any()


def test_backends_follow_each_other(backend):
    """Any backend's backward follows any backend's forward: the residuals are part of the
    contract."""
    from fasttx.ops.attention import attention_bwd, attention_fwd

    q, k, v = (t.float() for t in qkv(S=30, T=44, D=16).values())
    dout = torch.randn(2, 2, 30, 16)
    rest = (None,) * 6 + (torch.tensor([9]),)
    scalars = (0.25, 0.0, 0.2, -1, 0, True, 0)
    expected = None
    for first in BACKENDS:
        if unusable("attention_fwd", first):
            continue
        out, lse = attention_fwd(q, k, v, None, *rest, *scalars, backend=first)
        grads = attention_bwd(
            dout, None, q, k, v, out, lse, None, *rest, *scalars, 7, backend=backend
        )[:3]
        expected = expected or grads
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("need", range(1, 32))
def test_every_subset_of_gradients(need):
    """need: what is not asked for is not computed into the others, for the native kernel and the
    door alike."""
    skip_unusable("attention_bwd", "cpu")
    names = ("query", "key", "value", "attn_mask", "table")
    inputs = {
        **qkv(B=1, S=21),
        "attn_mask": torch.randn(1, 2, 21, 21).double(),
        "table": torch.randn(8, 2).double(),
    }
    case = Case(
        "subset",
        inputs,
        {"is_causal": True},
        tuple(n for i, n in enumerate(names) if need >> i & 1),
        relative(max_distance=9),
    )
    plain = case.plain(torch.float32)
    check(
        case.function("cpu"), case.function("reference"), plain, inputs,
        dtype=torch.float32, wanted=case.wanted, names=("out", "lse"),
    )  # fmt: skip


def _kept(backend, seed, B=2, H=3, S=21, T=45, p=0.25, **options):
    """The dropout mask a backend applies, seen through uniform probabilities and an identity
    value."""
    q, k = torch.zeros(B, H, S, 4), torch.zeros(B, H, T, 4)
    v = torch.eye(T).expand(B, H, T, T)
    return fasttx.attention(q, k, v, dropout_p=p, seed=seed, backend=backend, **options) > 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**33 + 5])
def test_dropout_bits_are_the_same_everywhere(backend, seed):
    assert torch.equal(_kept(backend, seed), philox_mask(torch.tensor([seed]), 0.25, 2, 3, 21, 45))


def test_dropout_rate_and_independence():
    kept = philox_mask(torch.tensor([123]), 0.1, 4, 8, 128, 128)
    p = dropout_threshold(0.1) / 65536
    n = kept.numel()
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    for shift in ((1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 3)):
        moved = kept.roll(shift, (shift.index(max(shift)), shift.index(max(shift)) + 2))
        both = (~kept & ~moved).float().mean().item()
        assert abs(both - p * p) < 6 * (p * p / n) ** 0.5


def test_manual_seed_governs_dropout():
    x = [t.float() for t in qkv().values()]
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fasttx.attention(*x, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(fasttx.attention(*x, dropout_p=0.5), fasttx.attention(*x, dropout_p=0.5))


def test_packed_is_padded(backend):
    """Sequences one after the other give what the same sequences give as a padded batch, dropout
    bits included."""
    lengths, longest = [9, 30, 1, 17], 30
    B, H, D = len(lengths), 2, 16
    x = torch.randn(3, B, H, longest, D)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
    options = {"dropout_p": 0.2, "seed": 77, "is_causal": True, "backend": backend}
    padded = fasttx.attention(*x, mask, **options)
    flat = torch.cat([x[:, i, :, :n] for i, n in enumerate(lengths)], 2)[:, None]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = fasttx.attention(*flat, cu_seqlens=cu, **options)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(packed[0, :, cu[i] : cu[i + 1]], padded[i, :, :n])


def test_batch_of_one_is_the_batch(backend):
    x = torch.randn(3, 3, 2, 33, 16)
    whole = fasttx.attention(*x, is_causal=True, backend=backend)
    for i in range(3):
        assert torch.equal(
            fasttx.attention(*x[:, i : i + 1], is_causal=True, backend=backend)[0], whole[i]
        )


@pytest.mark.parametrize("causal", [False, True, "lower_right"])
def test_every_pair_of_small_lengths(causal):
    """All (S, T) to 20, and around the block sizes, on the native kernels."""
    skip_unusable("attention_fwd", "cpu")
    lengths = [*range(20), 31, 32, 33, 63, 64, 65, 127, 129]
    for S in lengths:
        for T in lengths:
            q, k, v = torch.randn(1, 1, S, 8), torch.randn(1, 1, T, 8), torch.randn(1, 1, T, 8)
            with guarded_outputs():
                got, lse = fasttx.attention(
                    q, k, v, is_causal=causal, return_lse=True, backend="cpu"
                )
            expected, gold = fasttx.attention(
                q.double(),
                k.double(),
                v.double(),
                is_causal=causal,
                return_lse=True,
                backend="reference",
            )
            torch.testing.assert_close(
                got,
                expected.float(),
                atol=3e-6,
                rtol=1e-5,
                msg=lambda m, S=S, T=T: f"S={S} T={T}: {m}",
            )
            torch.testing.assert_close(lse, gold.float(), atol=3e-6, rtol=1e-5)


def test_every_head_size():
    skip_unusable("attention_fwd", "cpu")
    for D in range(1, 257):
        x = [t.bfloat16().float() for t in qkv(B=1, H=1, S=7, T=9, D=D, seed=D).values()]
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
            leaves = [t.to(dtype).requires_grad_() for t in x]
            with guarded_outputs():
                out = fasttx.attention(*leaves, backend="cpu")
                grads = torch.autograd.grad(out.sum(), leaves)
            wide = [t.double().requires_grad_() for t in x]
            gold = fasttx.attention(*wide, backend="reference")
            expected = torch.autograd.grad(gold.sum(), wide)
            for got, want in zip((out, *grads), (gold, *expected), strict=True):
                torch.testing.assert_close(
                    got.double(),
                    want,
                    atol=tolerance * max(1, want.abs().max().item()),
                    rtol=0,
                    msg=lambda m, D=D: f"D={D}: {m}",
                )


def test_memory_order_is_that_of_sdpa(backend):
    out = fasttx.attention(*(t.float() for t in qkv().values()), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


def test_inputs_that_need_no_gradient_get_none():
    q, k, v = (t.float() for t in qkv().values())
    q.requires_grad_()
    fasttx.attention(q, k, v, return_lse=True)[1].sum().backward()
    assert q.grad is not None
    assert k.grad is v.grad is None


def test_a_bias_first_used_in_inference_mode_trains():
    """What is kept between calls is no tensor of inference mode."""
    weight = torch.randn(10, 2, requires_grad=True)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    bias = fasttx.RelativePositionBias(weight, bidirectional=True, max_distance=37)
    with torch.inference_mode():
        fasttx.attention(q, q, q, position_bias=bias)
    fasttx.attention(q, q, q, position_bias=bias).sum().backward()
    assert weight.grad is not None
