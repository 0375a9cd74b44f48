"""The kernels of linear and ffn compiled for GPUs that are not there; parts, terms, layouts and
dropout bits under the interpreter."""

import pytest
import torch
from fasttx.kernels import ffn as ffn_kernels
from fasttx.kernels import gemm

from fasttx.reference.philox import dropout_threshold, philox_mask

from .ahead import compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_products_in_parts(dtype, transposed, terms):
    """K split over programs, the tail of the last part included; the same bits again."""
    M, N, K = 37, 50, 1203
    pairs = [(torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)) for _ in range(terms)]
    found = []
    for _ in range(2):
        out = torch.full((N, M) if transposed else (M, N), torch.nan, dtype=dtype)
        out = out.t() if transposed else out
        calls = list(gemm.product_calls("sm90", out, pairs, 0.5))
        assert [call.kernel.__name__ for call in calls] == ["product_kernel", "sum_parts_kernel"]
        for call in calls:
            call.run()
        found.append(out)
    assert torch.equal(*found)
    expected = 0.5 * sum(a.double() @ b.double() for a, b in pairs)
    room = torch.finfo(dtype).eps * expected.abs().max().item() * (20 if dtype.itemsize == 4 else 1)
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=room)


def test_many_tiles():
    """More rows of tiles than go together, the last group smaller."""
    M, N, K = 330, 70, 20
    a, b, out = torch.randn(M, K), torch.randn(K, N), torch.full((M, N), torch.nan)
    (call,) = gemm.product_calls("sm90", out, [(a, b)])
    assert -(-M // call.features.BLOCK_M) % 8
    call.run()
    torch.testing.assert_close(out, a @ b, atol=1e-4, rtol=1e-5)


def test_dropout_bits():
    """Of the hidden layer and of the output: the ones of the reference."""
    M, F, p, q, seed = 19, 40, 0.3, 0.6, torch.tensor([2**62 + 12345])
    x, w1, b1, w2 = torch.zeros(M, 3), torch.zeros(F, 3), torch.ones(F), torch.eye(F)
    keeps = philox_mask(seed, p, 1, 1, M, F)[0, 0], philox_mask(seed, q, 1, 2, M, F)[0, 1]
    for hidden_p, output_p, expected in ((p, 0.0, keeps[0]), (0.0, q, keeps[1])):
        out = torch.full((M, F), torch.nan)
        rest = (w1, b1, w2, None, None, None, seed, 3, hidden_p, output_p, False)
        ffn_kernels.ffn_fwd(out, None, None, x, *rest)
        scale = 65536 / (65536 - dropout_threshold(hidden_p or output_p))
        torch.testing.assert_close(out, expected * scale)


def test_wide_strides():
    """Offsets inside a tile beyond 2^31: a stride, not memory."""
    try:
        memory = torch.empty(2**32 + 64, dtype=torch.bfloat16)  # touched only where columns lie
    except RuntimeError as error:
        pytest.skip(f"8 GiB of address space: {error}")
    a = memory.as_strided((3, 5), (1, 2**30))
    a.copy_(torch.randn(3, 5))
    b, out = torch.randn(5, 4).bfloat16(), torch.full((3, 4), torch.nan, dtype=torch.bfloat16)
    for call in gemm.product_calls("interpreter", out, [(a, b)]):
        call.run()
    torch.testing.assert_close(out, a.clone() @ b)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiles_without_spills():
    rows = compiled("linear")
    unit = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
    for row in rows:
        product = row["kernel"] not in ("sum_parts_kernel", "linear_dpre_kernel")
        if row["fp32"]:
            single = row["tf32"] or row.get("tcgen05")
            assert bool(single) == (product and "tf32" in row["config"]), row
        elif product:
            # The warpgroup instructions of sm_90 and sm_100 take 64 rows or more.
            assert row[unit[row["arch"]] if row["rows"] >= 64 or "mma" not in row else "mma"], row
