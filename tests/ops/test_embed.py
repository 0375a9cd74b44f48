"""embed on every backend and dtype against fp64, in the one harness."""
# ruff: noqa: E501 (tables, one case a line)

import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx.ops.embed import embed, embed_bwd, embed_fwd, sinusoidal_positions
from fasttx.reference.philox import philox_mask
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.conftest import unusable
from tests.ops import contract
from tests.ops.contract import (
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
)

BACKENDS = (*contract.BACKENDS, "torch")
NAMES = ("token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias")
ROWS = {"token_weight": 50, "position_weight": 40, "segment_weight": 3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.embed runs on the plain"),
    # NumPy's word for arithmetic on rows that hold NaN under the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@dataclass
class Case:
    """shape of input_ids, columns, which of NAMES are there, options of the door."""

    name: str
    shape: tuple = (3, 7)
    N: int = 37
    given: tuple = NAMES
    options: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    keep: tuple = ()
    segments: bool = True
    quick: bool = False

    def ids(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        made = {"input_ids": torch.randint(0, 50, self.shape, generator=generator)}
        made["input_ids"].view(-1)[::3] = (
            1  # many of one id, over several chunks in the large cases
        )
        if "segment_weight" in self.given and self.segments:
            made["segment_ids"] = torch.randint(0, 3, self.shape, generator=generator)
        return made

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        made = {}
        for n in self.given:
            shape = (ROWS[n], self.N) if n in ROWS else (self.N,)
            made[n] = torch.randn(shape, generator=generator, dtype=torch.float64)
            if n in self.keep:
                made[n] = made[n].float()
        return made

    def function(self, backend: str | None):
        def call(**weights):
            return embed(**self.ids(), **weights, **self.options, backend=backend)

        return call

    def plain(self, **w):
        """The formula in torch's own calls, in the dtype of the tables."""
        o = {"dropout_p": 0.0, "eps": None, "kind": "layer", "scale": 1.0, **self.options}
        ids, padding = self.ids()["input_ids"], o.get("padding_idx")
        out = F.embedding(ids, w["token_weight"], padding) * o["scale"]
        if "position_weight" in w:
            positions = plain_positions(
                ids, o.get("positions"), o.get("position_offset", 0), padding
            )
            rule = padding if isinstance(o.get("positions"), str) else None
            out = out + F.embedding(positions, w["position_weight"], rule)
        if "segment_weight" in w:
            segments = self.ids().get("segment_ids", torch.zeros_like(ids))
            out = out + F.embedding(segments, w["segment_weight"])
        scale, shift = w.get("norm_weight"), w.get("norm_bias")
        if scale is not None or shift is not None or o["eps"] is not None:
            eps, N = 1e-5 if o["eps"] is None else o["eps"], (self.N,)
            dtype = out.dtype
            wide = [None if t is None else t.to(dtype) for t in (scale, shift)]
            if o["kind"] == "rms":
                out = F.rms_norm(out, N, wide[0], eps)
                out = out if shift is None else out + wide[1]
            else:
                out = F.layer_norm(out, N, *wide, eps)
        if o["dropout_p"]:
            keep = philox_mask(torch.tensor([o["seed"]]), o["dropout_p"], 1, 1, ids.numel(), self.N)
            p = int(o["dropout_p"] * 65536 + 0.5) / 65536
            out = torch.where(keep.view(out.shape), out / (1 - p), 0)
        return out


def plain_positions(ids, positions, offset, padding):
    if isinstance(offset, Tensor):
        offset = offset[..., None]
    if isinstance(positions, str):
        used = ids.ne(padding).int()
        return ((used.cumsum(-1) + offset) * used).long() + padding
    if positions is None:
        positions = torch.arange(ids.shape[-1]) if ids.dim() else torch.tensor(0)
    return positions.expand(ids.shape) + offset


DROP, RMS = {"dropout_p": 0.3, "seed": 11}, {"kind": "rms"}
BERT = {"padding_idx": 0, "eps": 1e-12}
CASES = [
    Case("BERT", options={**DROP, **BERT}, quick=True),
    Case("RoBERTa", options={"positions": "padding", "padding_idx": 1}, segments=False, quick=True),
    Case("GPT-2", given=NAMES[:2], options=DROP),
    Case("tokens alone", given=NAMES[:1]),
    Case("BLOOM", given=("token_weight", "norm_weight", "norm_bias"), N=65),
    Case("BART", given=("token_weight", "position_weight", "norm_weight", "norm_bias"), options={"position_offset": 2, "scale": 6.1}),
    Case("rms", options={**RMS, **DROP}, quick=True),
    Case("rms without parameters", given=NAMES[:2], options={**RMS, "eps": 0.1}),
    Case("no norm, everything", given=NAMES[:3], options={**DROP, "scale": 0.5}),
    Case("offsets", options={"position_offset": torch.tensor([3, 0, 30])}),
    Case("explicit positions", options={"positions": torch.tensor([[4, 4, 0, 39, 1, 2, 3]]), "position_offset": 0}),
    Case("one sequence", (33,)),
    Case("one id", (), options=DROP),
    Case("four dimensions", (2, 1, 2, 3), options={"positions": "padding", "padding_idx": 1, **DROP}),
    Case("one column", N=1),
    Case("no tokens", (2, 0)),
    Case("no sequences", (0, 4), options=DROP),
    Case("no columns", N=0),
    Case("wide", (1, 3), N=5001, options=DROP),
    Case("many rows", (30, 40), N=20),
    Case("many rows, no norm", (31, 40), N=70, given=NAMES[:3]),
    Case("strided", options=DROP, layouts={"token_weight": "strided", "position_weight": "transposed", "segment_weight": "sliced", "norm_weight": "strided", "dout": "strided"}),
    Case("strided, no norm", given=NAMES[:3], layouts={"token_weight": "sliced", "position_weight": "transposed", "dout": "transposed"}, quick=True),
    Case("expanded", (4, 4), layouts={"dout": "expanded"}),
    Case("fp32 parameters", keep=("norm_weight", "norm_bias")),
    Case("fp32 positions", keep=("position_weight",), options=DROP),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("embed_fwd", BACKENDS)


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(CASES, backends=BACKENDS)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("embed_fwd", name)
    if name == "torch" and "dropout_p" in case.options:
        inputs = {n: t.to(dtype) for n, t in case.inputs().items()}
        with pytest.raises(NotImplementedError, match="torch: does not support seed"):
            case.function(name)(**inputs)
        return
    check(
        case.function(name), case.plain, case.plain, case.inputs(), dtype=dtype, wanted=case.given,
        keep=case.keep, layouts=case.layouts,
    )  # fmt: skip
    inputs = {n: t if n in case.keep else t.to(dtype) for n, t in case.inputs().items()}
    out = case.function(name)(**inputs)
    assert out.dtype is (torch.float32 if "position_weight" in case.keep else dtype)
    assert out.is_contiguous()
    assert out.shape == (*case.shape, case.N)


def test_is_transformers():
    """BERT's and RoBERTa's own embeddings, the position rule and the padding's gradients too."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertEmbeddings
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "num_attention_heads": 2,
    }
    ids = torch.randint(2, 50, (3, 9))
    ids[0, 4:], ids[1, :3] = 1, 1
    for module, options in (
        (BertEmbeddings(transformers.BertConfig(**sizes, pad_token_id=1)), {}),
        (
            RobertaEmbeddings(
                transformers.RobertaConfig(**sizes, pad_token_id=1, type_vocab_size=1)
            ),
            {"positions": "padding"},
        ),
    ):
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        tables = [getattr(module, n).weight for n in names]
        norm = (module.LayerNorm.weight, module.LayerNorm.bias)
        want = module(ids)
        got = embed(
            ids, tables[0], tables[1], None, tables[2], padding_idx=1, norm_weight=norm[0],
            norm_bias=norm[1], eps=module.LayerNorm.eps, **options,
        )  # fmt: skip
        torch.testing.assert_close(got, want)
        g = torch.randn_like(got)
        grads = [torch.autograd.grad(out, (*tables, *norm), g) for out in (got, want)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
        assert not grads[0][0][1].any()


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoidal_positions(interleaved):
    table = sinusoidal_positions(100, 7, interleaved=interleaved, dtype=torch.float64)
    assert table.shape == (100, 7)
    for p, i in ((0, 0), (3, 1), (99, 2)):
        angle = torch.tensor(p * 10000 ** (-2 * i / 7), dtype=torch.float64)
        sin, cos = (2 * i, 2 * i + 1) if interleaved else (i, 4 + i)
        torch.testing.assert_close(table[p, [sin, cos]], torch.stack([angle.sin(), angle.cos()]))
    assert sinusoidal_positions(2, 4).dtype is torch.float32
    assert sinusoidal_positions(0, 4).shape == (0, 4)
    assert sinusoidal_positions(4, 0).shape == (4, 0)
    for bad in ({"count": -1}, {"features": 1.5}, {"base": 0.0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            sinusoidal_positions(**{"count": 2, "features": 2, **bad})


def test_decoding_is_the_tail_of_the_sequence(backend):
    """Token by token with an offset a sequence, padding on the left, gives the whole's rows."""
    ids, w, p = torch.randint(2, 50, (2, 6)), torch.randn(50, 8), torch.randn(40, 8)
    ids[1, :2] = 1
    whole = embed(ids, w, p, positions="padding", padding_idx=1, backend=backend)
    for s in range(1, 6):
        before = ids[:, :s].ne(1).sum(1)
        step = embed(
            ids[:, s:][:, :1],
            w,
            p,
            positions="padding",
            padding_idx=1,
            position_offset=before,
            backend=backend,
        )
        torch.testing.assert_close(step[:, 0], whole[:, s])
    plain = embed(ids, w, p, backend=backend)
    torch.testing.assert_close(
        embed(ids[:, 4:], w, p, position_offset=4, backend=backend), plain[:, 4:]
    )


@pytest.mark.parametrize("options", [{}, {**RMS, **DROP, "scale": 1.3}])
def test_gradcheck(options):
    ids, segments = torch.randint(0, 5, (2, 3)), torch.randint(0, 2, (2, 3))
    leaves = [torch.randn(s).double().requires_grad_() for s in ((5, 4), (3, 4), (2, 4), 4, 4)]

    def function(*t):
        return embed(ids, t[0], t[1], segments, t[2], norm_weight=t[3], norm_bias=t[4], **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradient_penalty(backend):
    """A gradient of a gradient, padding left out."""
    ids, results = torch.tensor([[1, 2, 2, 0]]), []
    w, s = torch.randn(4, 9), torch.randn(9)
    for function in (
        lambda w, s: embed(ids, w, norm_weight=s, padding_idx=0, backend=backend),
        lambda w, s: F.layer_norm(F.embedding(ids, w, 0), (9,), s),
    ):
        leaves = [t.clone().requires_grad_() for t in (w, s)]
        grads = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)


def _inner(case: Case, norm: int, seed=5):
    w = [case.inputs()[n].float() for n in NAMES]
    ids = [case.ids()["input_ids"], case.ids()["segment_ids"], None, torch.tensor([seed])]
    return w, ids, (0, 1, -1, norm)


def test_backends_follow_each_other(backend):
    """Any backend's backward follows any backend's forward."""
    case = BY_NAME["BERT"]
    for norm, p in itertools.product((0, 1, 2), (0.0, 0.2)):
        w, (*ids, seed), place = _inner(case, norm)
        ids = (*ids, seed if p else None)
        g, expected = torch.randn(3, 7, 37), None
        able = contract.BACKENDS if p else BACKENDS
        for first in able if backend in able else ():
            if unusable("embed_fwd", first):
                continue
            stats = embed_fwd(*w, *ids, *place, 1.0, 1e-5, p, False, backend=first)[1]
            need = 31 if norm else 7
            grads = embed_bwd(*w, stats, g, *ids, *place, 1.0, p, need, backend=backend)
            expected = expected or grads
            torch.testing.assert_close(grads, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("need", range(1, 32))
def test_every_subset_of_gradients(need):
    skip_unusable("embed_fwd", "cpu")
    for name in ("BERT", "no norm, everything"):
        case = BY_NAME[name]
        wanted = tuple(n for i, n in enumerate(NAMES) if need >> i & 1 and n in case.given)
        check(
            case.function("cpu"),
            case.plain,
            case.plain,
            case.inputs(),
            dtype=torch.float32,
            wanted=wanted,
        )


@pytest.mark.parametrize("seed", [0, -1, 2**33 + 5])
@pytest.mark.parametrize("N", [1, 30, 257])
@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_dropout_bits(backend, seed, N):
    """Row is the flattened row, batch and head 0."""
    skip_unusable("embed_fwd", backend)
    out = embed(
        torch.zeros(3, 7, dtype=torch.long),
        torch.ones(1, N),
        dropout_p=0.25,
        seed=seed,
        backend=backend,
    )
    keep = philox_mask(torch.tensor([seed]), 0.25, 1, 1, 21, N).view(3, 7, N)
    assert torch.equal(out, keep * torch.tensor(1 / 0.75))


def test_manual_seed_governs_dropout():
    ids, w, draws = torch.arange(8), torch.randn(8, 64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(embed(ids, w, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradients_of_a_long_run(backend):
    """One id many times over: its row is as near to fp64 as the dtype allows, the others 0."""
    M = 20_000 if backend == "cpu" else 200
    ids = torch.full((M,), 3)
    ids[7] = 2
    w, g = torch.zeros(5, 3, requires_grad=True), torch.randn(M, 3) + 1
    with guarded_outputs():
        (grad,) = torch.autograd.grad(embed(ids, w, scale=2.0, backend=backend), w, g)
    want = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, ids, 2 * g.double())
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-6)
    assert not grad[[0, 1, 4]].any()


def test_large_table_is_zero_elsewhere():
    """A gradient of more than 32 MB, whose memory the system is asked to zero; used memory too."""
    skip_unusable("embed_fwd", "cpu")
    w = torch.zeros(40_000, 256, dtype=torch.float32, requires_grad=True)
    out = embed(torch.tensor([[39_999, 5, 5, 0]]), w, backend="cpu")
    want = torch.zeros(40_000, 256)
    want[[39_999, 0]], want[5] = 1, 2
    for _ in range(2):
        (grad,) = torch.autograd.grad(out, w, torch.ones(1, 4, 256), retain_graph=True)
        assert torch.equal(grad, want)
        del grad
    with guarded_outputs():
        (grad,) = torch.autograd.grad(out, w, torch.ones(1, 4, 256))
    assert torch.equal(grad, want)


def test_nothing_depends_on_threads_or_the_run():
    case, results, before = Case("threads", (40, 50), 96), [], torch.get_num_threads()
    weights = {n: t.bfloat16() for n, t in case.inputs().items()}
    g = torch.randn(40, 50, 96).bfloat16()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
            out = embed(
                **case.ids(), **leaves, positions=torch.arange(50) % 30, dropout_p=0.1, seed=3
            )
            results.append([out, *torch.autograd.grad(out, list(leaves.values()), g)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unknown_ids_make_their_row_nan(backend):
    """What the door cannot read (traced calls, a GPU) stays in bounds."""
    w, p = torch.randn(5, 9), torch.randn(4, 9)
    ids = torch.tensor([[1, 5, -1, 2], [2, 1, 2**40, 0]])
    for norm in (0, 1):
        arguments = (ids, None, None, None, 0, -1, -1, norm)
        with guarded_outputs():
            out, stats = embed_fwd(
                w, p, None, None, None, *arguments, 1.0, 1e-5, 0.0, False, backend=backend
            )
        bad = torch.tensor([[False, True, True, False], [False, False, True, False]])
        assert torch.equal(out.isnan().all(-1), bad)
        assert torch.equal(out.isnan().any(-1), bad)
        with guarded_outputs():
            grads = embed_bwd(
                w,
                p,
                None,
                None,
                None,
                stats,
                torch.ones(2, 4, 9),
                *arguments,
                1.0,
                0.0,
                1,
                backend=backend,
            )
        assert grads[0].isfinite().all()


def test_more_than_32_bit_offsets():
    """A row 2^31 elements after the first one: a stride, not memory."""
    skip_unusable("embed_fwd", "cpu")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where rows lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    w = memory.as_strided((2, 40), (2**31, 1))
    w.copy_(torch.randn(2, 40))
    ids = torch.tensor([1, 0, 1])
    assert torch.equal(
        embed(ids, w, eps=1e-5, backend="cpu"), embed(ids, w.clone(), eps=1e-5, backend="cpu")
    )


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "no norm, everything", "no tokens"])
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    with recorded_calls() as calls:
        leaves = {n: t.float().requires_grad_() for n, t in case.inputs().items()}
        case.function(None)(**leaves).sum().backward()
    assert [op.name for op, _, _ in calls] == ["embed_fwd", "embed_bwd"]
    for op, args, _ in calls:
        opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("positions", [None, "padding"])
def test_compile(dynamic, positions):
    def full(ids, w, p, s, b):
        return embed(
            ids, w, p, norm_weight=s, norm_bias=b, dropout_p=0.2, seed=3, padding_idx=1,
            positions=positions,
        )  # fmt: skip

    def arguments(S):
        leaves = [torch.randn(s, requires_grad=True) for s in ((50, 24), (40, 24), 24, 24)]
        return [torch.randint(0, 50, (2, S)), *leaves]

    check_compiled(full, arguments, dynamic)


IDS, TOKENS, POSITIONS = torch.tensor([[1, 2, 3], [4, 0, 1]]), torch.randn(5, 8), torch.randn(6, 8)
SEGMENTS = {"segment_ids": torch.zeros(2, 3, dtype=torch.long), "segment_weight": torch.randn(2, 8)}
BAD = {
    "ids type": (TypeError, "input_ids must be a tensor, got list", {"input_ids": [1]}),
    "ids dtype": (TypeError, "input_ids must hold integers, got float32", {"input_ids": IDS.float()}),
    "ids bool": (TypeError, "input_ids must hold integers, got bool", {"input_ids": IDS > 1}),
    "ids device": (ValueError, "input_ids must be on token_weight's device cpu, got meta", {"input_ids": IDS.to("meta")}),
    "ids high": (ValueError, r"input_ids must be in \[0, 5\), got 5", {"input_ids": IDS + 1}),
    "ids low": (ValueError, r"input_ids must be in \[0, 5\), got -1", {"input_ids": IDS - 1}),
    "tokens type": (TypeError, "token_weight must be a tensor, got list", {"token_weight": [1.0]}),
    "tokens dtype": (TypeError, "token_weight must be float32, .* got int64", {"token_weight": TOKENS.long()}),
    "tokens rank": (ValueError, r"token_weight must have shape \(V, N\), got \(8,\)", {"token_weight": TOKENS[0]}),
    "positions dtype": (TypeError, "position_weight must be float32, .* got bool", {"position_weight": POSITIONS > 0}),
    "positions width": (ValueError, r"position_weight must have shape \(P, 8\), got \(6, 7\)", {"position_weight": POSITIONS[:, :7]}),
    "positions device": (ValueError, "position_weight must be on token_weight's device cpu, got meta", {"position_weight": POSITIONS.to("meta")}),
    "positions double": (TypeError, "position_weight must be float64 exactly where token_weight is, got float64 beside float32", {"position_weight": POSITIONS.double()}),
    "too few positions": (ValueError, r"position_offset must be in \[0, -1\] \(3 tokens, 2 positions\), got 0", {"position_weight": POSITIONS[:2]}),
    "offset high": (ValueError, r"position_offset must be in \[0, 3\] \(3 tokens, 6 positions\), got 4", {"position_offset": 4}),
    "offset low": (ValueError, r"position_offset must be in \[0, 3\].* got -1", {"position_offset": -1}),
    "offset type": (TypeError, "position_offset must be an int or a tensor, got 1.5", {"position_offset": 1.5}),
    "offset dtype": (TypeError, "position_offset must hold integers, got float32", {"position_offset": torch.ones(2)}),
    "offset shape": (ValueError, r"position_offset must be an int or have the shape \(2,\).* got \(3,\)", {"position_offset": torch.ones(3).long()}),
    "offsets high": (ValueError, r"positions must be in \[0, 6\), got 6", {"position_offset": torch.tensor([0, 4])}),
    "position ids shape": (ValueError, r"positions must broadcast to the shape \(2, 3\) of input_ids, got \(2,\)", {"positions": torch.zeros(2).long()}),
    "position ids dtype": (TypeError, "positions must hold integers, got float32", {"positions": torch.zeros(3)}),
    "position ids high": (ValueError, r"positions must be in \[0, 6\), got 7", {"positions": torch.tensor([0, 7, 1])}),
    "positions word": (ValueError, "positions must be None, a tensor of integers or 'padding', got 'pad'", {"positions": "pad"}),
    "padding rule": (ValueError, "positions='padding' needs padding_idx, got None", {"positions": "padding"}),
    "padding rule high": (ValueError, r"positions must be in \[0, 6\), got 7", {"positions": "padding", "padding_idx": 4}),
    "positions without table": (ValueError, "positions needs position_weight, got None", {"positions": "padding", "position_weight": None}),
    "padding type": (TypeError, "padding_idx must be None or an int, got 1.0", {"padding_idx": 1.0}),
    "padding high": (ValueError, r"padding_idx must be in \[-5, 5\), got 5", {"padding_idx": 5}),
    "segments alone": (ValueError, "segment_ids needs segment_weight, got None", {**SEGMENTS, "segment_weight": None}),
    "segments shape": (ValueError, r"segment_ids must broadcast to the shape \(2, 3\) of input_ids, got \(4,\)", {**SEGMENTS, "segment_ids": torch.zeros(4).long()}),
    "segments high": (ValueError, r"segment_ids must be in \[0, 2\), got 4", {**SEGMENTS, "segment_ids": IDS}),
    "segments width": (ValueError, r"segment_weight must have shape \(G, 8\), got \(2, 1\)", {**SEGMENTS, "segment_weight": torch.ones(2, 1)}),
    "no segments": (ValueError, r"segment_weight must have a row, got \(0, 8\)", {"segment_weight": torch.ones(0, 8)}),
    "norm_weight shape": (ValueError, r"norm_weight must have shape \(8\), got \(7,\)", {"norm_weight": torch.ones(7)}),
    "norm_bias type": (TypeError, "norm_bias must be a tensor, got int", {"norm_bias": 1}),
    "kind": (ValueError, "kind must be 'layer' or 'rms', got 'batch'", {"kind": "batch"}),
    "eps negative": (ValueError, "eps must be None or a finite number of at least 0, got -1", {"eps": -1}),
    "eps type": (TypeError, "eps must be None or a finite number of at least 0, got 'x'", {"eps": "x"}),
    "scale": (ValueError, "scale must be a finite number, got inf", {"scale": float("inf")}),
    "dropout": (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    "seed": (ValueError, "seed must be a 64-bit int.*got 'x'", {"seed": "x", "dropout_p": 0.1}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(
        monkeypatch, fasttx.embed, BAD[name],
        input_ids=IDS, token_weight=TOKENS, position_weight=POSITIONS,
    )  # fmt: skip


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        embed(IDS, TOKENS.double(), backend="cpu")
