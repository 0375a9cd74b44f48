"""The attention and mask functions under the name "fasttx", called as transformers does."""

import importlib
import itertools
import warnings

import pytest
import torch

import fasttx

from .hf_models import bert

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hf_attention = importlib.import_module("fasttx.integrations.hf_attention")
masking_utils = importlib.import_module("transformers.masking_utils")
modeling_utils = importlib.import_module("transformers.modeling_utils")
attention_forward, attention_mask = hf_attention.attention_forward, hf_attention.attention_mask

CONFIG = transformers.BertConfig()


def test_both_are_registered():
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS["fasttx"] is attention_forward
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fasttx"] is attention_mask


def dense(mask, S, T, causal):
    """bool [B|1, 1, S, T]: what a mask of ours means."""
    every = torch.ones(1, 1, S, T, dtype=torch.bool)
    if mask is None:
        return every.tril() if causal and S > 1 else every
    if mask.dim() == 5:
        return (mask[:, 0] & every.tril(T - S)).expand(-1, 1, S, T)
    return mask.expand(-1, 1, S, T)


def padding(kind, T):
    if kind == "absent":
        return None
    mask = torch.ones(3, T, dtype=torch.bool)
    if kind == "left":
        mask[1, : T // 2] = False
    elif kind == "right":
        mask[2, T - T // 2 :] = False
    return mask


CASES = list(
    itertools.product(
        ["absent", "full", "left", "right"], [(7, 7, 0), (1, 7, 6), (3, 7, 4), (4, 7, 0)]
    )
)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("kind", "lengths"), CASES, ids=str)
def test_mask_means_what_transformers_means(kind, lengths, causal):
    S, T, offset = lengths
    name = "causal_mask_function" if causal else "bidirectional_mask_function"
    call = {
        "batch_size": 3,
        "q_length": S,
        "kv_length": T,
        "q_offset": offset,
        "mask_function": getattr(masking_utils, name),
        "attention_mask": padding(kind, T),
        "dtype": torch.float32,
        "device": "cpu",
        "config": CONFIG,
    }
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = masking_utils.sdpa_mask(**call, **whole)
    ours = attention_mask(
        **call, allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal
    )
    assert torch.equal(dense(ours, S, T, causal).expand(3, 1, S, T), expected)
    if not causal:
        assert ours is None if kind in ("absent", "full") else ours.shape == (3, 1, 1, T)
    elif offset + S == T and kind in ("left", "right"):
        assert ours.shape == ((3, 1, 1, T) if S == 1 else (3, 1, 1, 1, T))
    elif offset + S == T and S in (1, T):
        assert ours is None
    assert torch.equal(attention_mask(**call, **whole), expected)


@pytest.mark.parametrize(
    "case", ["window", "overlay", "static cache", "unknown model", "kv_offset"]
)
def test_other_patterns_become_dense(case):
    call = {
        "batch_size": 3,
        "q_length": 6,
        "kv_length": 6,
        "mask_function": masking_utils.causal_mask_function,
        "attention_mask": padding("left", 6),
        "config": CONFIG,
    }
    if case == "window":
        call |= {
            "mask_function": masking_utils.sliding_window_causal_mask_function(2),
            "local_size": 2,
        }
    elif case == "overlay":
        prefix = lambda b, h, q, k: k < 2  # noqa: E731
        call |= {
            "mask_function": masking_utils.or_masks(masking_utils.causal_mask_function, prefix),
            "use_vmap": True,
            "allow_is_causal_skip": False,
        }
    elif case == "static cache":
        call |= {"kv_length": 10, "q_offset": torch.tensor(2)}
    elif case == "unknown model":
        call |= {"config": transformers.MistralConfig()}
    else:
        call |= {"kv_offset": 2, "attention_mask": padding("left", 8), "q_offset": 2}
    ours = attention_mask(**call)
    assert torch.equal(ours, masking_utils.sdpa_mask(**call))
    assert ours.shape[-2] == 6


def test_mask_of_another_rank_is_refused():
    call = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, keys\].*\(1, 3, 3\)"):
        attention_mask(**call, attention_mask=torch.ones(1, 3, 3, dtype=torch.bool))
    ours = torch.ones(1, 1, 1, 1, 3, dtype=torch.bool)
    assert attention_mask(**call, attention_mask=ours) is ours


class Attention(torch.nn.Module):
    """A module transformers does not know, with no eager function in its file."""

    is_causal = False


def qkv(H=4, G=4, S=5, T=7, B=2):
    g = torch.Generator().manual_seed(9)
    make = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return make(B, H, S, 8), make(B, G, T, 8), make(B, G, T, 6)


def test_arguments_reach_the_op():
    q, k, v = qkv(G=2)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    out, weights = attention_forward(Attention(), q, k, v, mask, scaling=0.3, softcap=4.0)
    expected = fasttx.attention(q, k, v, mask, scale=0.3, softcap=4.0).transpose(1, 2)
    assert weights is None
    assert out.shape == (2, 5, 4, 6)
    assert out.is_contiguous()
    assert torch.equal(out, expected)


def test_causal_rules():
    """As transformers' sdpa: the call's flag, else the module's, else True; no mask, S > 1."""
    module = Attention()
    q, k, v = qkv(T=5)
    full = fasttx.attention(q, k, v).transpose(1, 2)
    causal = fasttx.attention(q, k, v, is_causal=True).transpose(1, 2)
    assert torch.equal(attention_forward(module, q, k, v, None)[0], full)
    assert torch.equal(attention_forward(module, q, k, v, None, is_causal=True)[0], causal)
    module.is_causal = True
    assert torch.equal(attention_forward(module, q, k, v, None)[0], causal)
    assert torch.equal(attention_forward(module, q, k, v, None, is_causal=False)[0], full)
    assert torch.equal(attention_forward(torch.nn.Identity(), q, k, v, None)[0], causal)
    every = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(attention_forward(module, q, k, v, every)[0], full)
    one = attention_forward(module, q[:, :, :1], k, v, None)[0]
    torch.testing.assert_close(one, full[:, :1])
    q, k, v = qkv(S=3, T=7)
    newest = attention_forward(module, q, k, v, torch.ones(1, 1, 1, 1, 7, dtype=torch.bool))[0]
    expected = fasttx.attention(q, k, v, is_causal="lower_right").transpose(1, 2)
    torch.testing.assert_close(newest, expected)
    with pytest.raises(ValueError, match="5 dimensions"):
        attention_forward(module, q, k, v, torch.ones(2, 4, 1, 3, 7))


def test_cross_attention_is_never_causal():
    model = bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    module = model.bert.encoder.layer[0].crossattention.self
    q, k, v = qkv()
    ours = attention_forward(module, q, k, v, None, is_causal=True)[0]
    assert torch.equal(ours, fasttx.attention(q, k, v).transpose(1, 2))


def test_what_is_not_known_is_not_ignored():
    q, k, v = qkv()
    module = bert().encoder.layer[0].attention.self
    inert = {
        "position_ids": torch.arange(5),
        "use_cache": True,
        "s_aux": None,
        "output_attentions": False,
    }
    expected = fasttx.attention(q, k, v, scale=0.3).transpose(1, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attn_implementation")
        ours = attention_forward(module, q, k, v, None, scaling=0.3, **inert)[0]
        assert torch.equal(ours, expected)
    hf_attention._tell.cache_clear()
    given = {"scaling": 0.3, "s_aux": torch.zeros(4)}
    with pytest.warns(RuntimeWarning, match="BertSelfAttention was given s_aux"):
        out, weights = attention_forward(module, q, k, v, None, **given)
    torch.testing.assert_close(out, expected)
    assert weights.shape == (2, 4, 5, 7)
    with pytest.raises(NotImplementedError, match=r"s_aux.*eager_attention_forward"):
        attention_forward(Attention(), q, k, v, None, **given)
    with pytest.raises(NotImplementedError, match="paged cache"):
        attention_forward(module, q, k, v, None, cache=object())
    with pytest.raises(NotImplementedError, match="sliding_window=6"):
        attention_forward(module, q, k, v, None, sliding_window=6)
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    attention_forward(module, q, k, v, mask, sliding_window=6)
    attention_forward(module, q, k, v, None, sliding_window=7)


def test_packed_sequences_are_checked():
    module = bert().encoder.layer[0].attention.self
    q, k, v = qkv(S=7, B=1)
    cu = torch.tensor([0, 3, 7])
    pair = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    out = attention_forward(module, q, k, v, None, **pair)[0]
    for a, b in ((0, 3), (3, 7)):
        part = fasttx.attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]).transpose(1, 2)
        torch.testing.assert_close(out[:, a:b], part)
    with pytest.raises(ValueError, match="given together"):
        attention_forward(module, q, k, v, None, cu_seq_lens_q=cu)
    with pytest.raises(ValueError, match="combined with attention_mask"):
        attention_forward(module, q, k, v, torch.ones(1, 1, 1, 7, dtype=torch.bool), **pair)
    for bad in (qkv(S=5, B=1), qkv(S=7, B=2)):
        with pytest.raises(ValueError, match="one row of packed sequences"):
            attention_forward(module, *bad, None, **pair)


def test_eager_runs_with_every_mask_of_ours():
    """output_attentions with each form the mask function gives, against the op on the same mask."""
    module = bert().encoder.layer[0].attention.self
    q, k, v = qkv(S=5, T=7)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[1, :2] = False
    for mask in (None, seen[:, None, None], seen[:, None, None, None], torch.rand(2, 1, 5, 7)):
        for causal in (False, True):
            ours = attention_forward(module, q, k, v, mask, scaling=0.4, is_causal=causal)[0]
            asked = {"is_causal": causal, "output_attentions": True}
            eager, weights = attention_forward(module, q, k, v, mask, scaling=0.4, **asked)
            torch.testing.assert_close(eager, ours)
            torch.testing.assert_close((weights @ v).transpose(1, 2), ours)
