"""Bad input to attention: one error each, naming argument, value and what is allowed, before any
kernel runs."""
# ruff: noqa: E501 (a table, one case a line)

import pytest
import torch

import fasttx
from fasttx import ALiBi, RelativePositionBias
from tests.ops.contract import refused

Q = torch.randn(2, 4, 6, 8)
NAN = float("nan")
BAD = {
    "rank 1": (ValueError, "query must have at least 2 dimensions", {"query": torch.randn(8)}),
    "ranks differ": (ValueError, "key must have query's 4 dimensions", {"key": torch.randn(6, 8)}),
    "not a tensor": (TypeError, "value must be a tensor, got list", {"value": [1.0]}),
    "int query": (TypeError, "query must be float32.*got int64", {"query": Q.long()}),
    "complex query": (TypeError, "query must be float32.*got complex64", {"query": Q.to(torch.complex64)}),
    "dtypes differ": (TypeError, "one dtype, got float32, float16 and float32", {"key": Q.half()}),
    "devices differ": (ValueError, "one device, got cpu, meta and cpu", {"key": Q.to("meta")}),
    "head size 0": (ValueError, r"query must have a head size of at least 1, got shape \(2, 4, 6, 0\)", dict.fromkeys(("query", "key"), Q[..., :0])),
    "head sizes differ": (ValueError, "key must have query's head size 8, got 4", {"key": Q[..., :4]}),
    "value keys": (ValueError, r"value must have key's 4 heads and 6 keys, got shape \(2, 4, 5, 8\)", {"value": Q[:, :, :5]}),
    "value heads": (ValueError, "value must have key's 4 heads", {"value": Q[:, :2]}),
    "head counts": (ValueError, "key must have a number of heads that divides query's 4, got 3", dict.fromkeys(("key", "value"), Q[:, :3])),
    "no key heads": (ValueError, "divides query's 4, got 0", dict.fromkeys(("key", "value"), Q[:, :0])),
    "batches differ": (ValueError, r"leading dimensions must broadcast, got query \(2,\), key \(3,\)", dict.fromkeys(("key", "value"), torch.randn(3, 4, 6, 8))),
    "mask type": (TypeError, "attn_mask must be a tensor or None, got str", {"attn_mask": "causal"}),
    "mask dtype": (TypeError, "attn_mask must be bool .* got int64", {"attn_mask": torch.ones(6, 6, dtype=torch.int64)}),
    "mask shape": (ValueError, r"attn_mask must broadcast to \(2, 4, 6, 6\), got shape \(6, 5\)", {"attn_mask": torch.ones(6, 5, dtype=torch.bool)}),
    "mask rank": (ValueError, "attn_mask must broadcast", {"attn_mask": torch.ones(1, 2, 4, 6, 6)}),
    "mask device": (ValueError, "attn_mask must be on query's device cpu, got meta", {"attn_mask": torch.ones(6, 6, device="meta")}),
    "dropout 1": (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    "dropout negative": (ValueError, r"dropout_p must be in \[0, 1\), got -0.1", {"dropout_p": -0.1}),
    "dropout nan": (ValueError, "dropout_p must be in .*got nan", {"dropout_p": NAN}),
    "dropout type": (TypeError, "dropout_p must be in .*got '0.1'", {"dropout_p": "0.1"}),
    "causal": (ValueError, "is_causal must be False, True, 'upper_left' or 'lower_right', got 'lower'", {"is_causal": "lower"}),
    "causal number": (ValueError, "is_causal must be", {"is_causal": 2}),
    "scale nan": (ValueError, "scale must be a finite number or None, got nan", {"scale": NAN}),
    "scale type": (TypeError, "scale must be a finite number or None, got 'big'", {"scale": "big"}),
    "softcap zero": (ValueError, "softcap must be a finite number above 0 or None, got 0.0", {"softcap": 0.0}),
    "softcap negative": (ValueError, "softcap must be .* got -1", {"softcap": -1}),
    "window negative": (ValueError, r"window must hold two of int >= 0 or None \(unbounded\), got \(-1, 0\)", {"window": (-1, 0)}),
    "window float": (ValueError, "window must hold", {"window": (1.5, 0)}),
    "window bool": (ValueError, "window must hold", {"window": (True, 0)}),
    "window one": (ValueError, r"window must be a pair \(left, right\) or None, got 3", {"window": 3}),
    "bias type": (TypeError, "position_bias must be fasttx.ALiBi, .* got Tensor", {"position_bias": torch.ones(6, 6)}),
    "slopes count": (ValueError, r"position_bias.slopes must be \[4\] or \[2, 4\], got shape \(3,\)", {"position_bias": ALiBi(torch.ones(3))}),
    "positions count": (ValueError, r"position_bias.positions must be \[6\] or \[2, 6\], got shape \(5,\)", {"position_bias": ALiBi(torch.ones(4), torch.arange(5))}),
    "table heads": (ValueError, r"position_bias.weight must be \[buckets, 4\], got shape \(32, 2\)", {"position_bias": RelativePositionBias(torch.ones(32, 2))}),
    "cu_seqlens type": (TypeError, "cu_seqlens must be a tensor", {"cu_seqlens": (0, 6)}),
    "cu_seqlens dtype": (TypeError, "cu_seqlens must be int32 or int64, got float32", {"cu_seqlens": torch.tensor([0.0, 6.0]), **dict.fromkeys(("query", "key", "value"), Q[:1])}),
    "cu_seqlens batch": (ValueError, "cu_seqlens needs a batch of 1.*got batch 2", {"cu_seqlens": torch.tensor([0, 6])}),
    "seed type": (ValueError, "seed must be a 64-bit int.*got 'x'", {"seed": "x", "dropout_p": 0.1}),
    "seed large": (ValueError, "seed must be a 64-bit int", {"seed": 2**63, "dropout_p": 0.1}),
    "seed tensor": (ValueError, r"seed must be an int64 tensor of one element, got float32 \(2,\)", {"seed": torch.zeros(2), "dropout_p": 0.1}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip
PACKED = {
    "falls": (ValueError, r"cu_seqlens must start at 0 and never fall, got \[0, 4, 3, 6\]", {"cu_seqlens": torch.tensor([0, 4, 3, 6])}),
    "starts late": (ValueError, r"must start at 0 and never fall, got \[1, 6\]", {"cu_seqlens": torch.tensor([1, 6])}),
    "past the end": (ValueError, r"must end at or before query's length 6, got \[0, 7\]", {"cu_seqlens": torch.tensor([0, 7])}),
    "past the key's end": (ValueError, r"must end at or before key's length 6, got \[0, 9\]", {"cu_seqlens": (torch.tensor([0, 6]), torch.tensor([0, 9]))}),
    "counts differ": (ValueError, "as many sequences for query as for key, got 1 and 2", {"cu_seqlens": (torch.tensor([0, 6]), torch.tensor([0, 2, 6]))}),
    "empty": (ValueError, r"cu_seqlens must be \[sequences \+ 1\]", {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}),
    "rank": (ValueError, r"cu_seqlens must be \[sequences \+ 1\]", {"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}),
    "with a mask": (ValueError, "attn_mask cannot be combined with cu_seqlens", {"cu_seqlens": torch.tensor([0, 6]), "attn_mask": torch.ones(6, 6)}),
    "positions": (ValueError, "positions cannot be combined with cu_seqlens", {"cu_seqlens": torch.tensor([0, 6]), "position_bias": ALiBi(torch.ones(4), torch.arange(6))}),
    "query_offset": (ValueError, "query_offset must be None with cu_seqlens, got 2", {"cu_seqlens": torch.tensor([0, 6]), "position_bias": RelativePositionBias(torch.ones(32, 4), query_offset=2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.attention, BAD[name], query=Q, key=Q, value=Q)


@pytest.mark.parametrize("name", PACKED)
def test_bad_packing(name, monkeypatch):
    one = Q[:1]
    refused(monkeypatch, fasttx.attention, PACKED[name], query=one, key=one, value=one)


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (TypeError, "slopes must be a floating tensor", lambda: ALiBi([1.0])),
        (TypeError, "slopes must be a floating tensor", lambda: ALiBi(torch.ones(4, dtype=torch.int32))),
        (ValueError, r"slopes must be \[H\] or \[B, H\], got shape \(1, 1, 4\)", lambda: ALiBi(torch.ones(1, 1, 4))),
        (ValueError, "slopes requires grad", lambda: ALiBi(torch.ones(4, requires_grad=True))),
        (TypeError, "positions must be an integer or floating tensor", lambda: ALiBi(torch.ones(4), torch.ones(4, dtype=torch.bool))),
        (ValueError, "heads must be at least 1, got 0", lambda: ALiBi.standard_slopes(0)),
        (TypeError, "weight must be a floating tensor", lambda: RelativePositionBias(torch.ones(32, 4, dtype=torch.int64))),
        (ValueError, r"weight must be \[buckets, H\]", lambda: RelativePositionBias(torch.ones(32))),
        (ValueError, "even number of at least 4 buckets, got 7", lambda: RelativePositionBias(torch.ones(7, 4))),
        (ValueError, "max_distance must be an int above 8", lambda: RelativePositionBias(torch.ones(32, 4), max_distance=8)),
        (TypeError, "query_offset must be an int or None", lambda: RelativePositionBias(torch.ones(32, 4), query_offset=1.5)),
    ],
)  # fmt: skip
def test_bad_bias(error, text, make):
    with pytest.raises(error, match=text):
        make()


def test_unsupported_lists_every_reason():
    x = torch.randn(1, 1, 4, 300)
    with pytest.raises(NotImplementedError) as error:
        fasttx.attention(x, x, x, backend="cpu")
    text = str(error.value)
    assert "cpu: needs 1 <= q.shape[3] <= 256, got 300" in text
    assert "triton:" in text
    assert "reference: supports it" in text
    with pytest.raises(
        NotImplementedError, match="backend='torch' does not support softcap, return_lse"
    ):
        fasttx.attention(x, x, x, softcap=1.0, return_lse=True, backend="torch")


def test_torch_by_name():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)
    expected = fasttx.attention(q, k, k, is_causal=True, backend="reference")
    torch.testing.assert_close(fasttx.attention(q, k, k, is_causal=True, backend="torch"), expected)
    x = torch.randn(6, 8)
    assert fasttx.attention(x, x, x, backend="torch").shape == (6, 8)


def test_buckets_are_those_of_t5():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for bidirectional in (True, False):
        for buckets, reach in ((32, 128), (8, 20), (64, 999), (4, 3)):
            bias = RelativePositionBias(
                torch.ones(buckets, 1), bidirectional=bidirectional, max_distance=reach
            )
            distance = torch.arange(-reach - 50, reach + 51)
            expected = t5.T5Attention._relative_position_bucket(
                distance, bidirectional, buckets, reach
            )
            assert torch.equal(
                bias.buckets()[distance.clamp(-reach, reach) + reach].long(), expected
            )


def test_standard_slopes_are_those_of_bloom():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 2, 3, 8, 12, 16, 25):
        expected = bloom.build_alibi_tensor(
            torch.ones(1, 3, dtype=torch.int64), heads, torch.float32
        )[:, 0, 1]
        torch.testing.assert_close(ALiBi.standard_slopes(heads), expected)
