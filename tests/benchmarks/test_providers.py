"""Whom fasttx is measured beside: found by import, checked like fasttx."""

from types import SimpleNamespace

import pytest
import torch
from fasttx.benchmarks import providers
from fasttx.benchmarks.models import families
from fasttx.benchmarks.ops import attention, find, generic
from fasttx.benchmarks.ops.attention_case import Case
from fasttx.benchmarks.rows import Run

CPU = torch.device("cpu")
EVERY = providers.find()


@pytest.mark.parametrize("name", EVERY)
def test_what_a_provider_has(name):
    provider = EVERY[name]
    assert name == provider.NAME
    assert provider.LABEL
    assert isinstance(provider.COMPILES, bool)
    assert provider.reason() is None or len(provider.reason()) > 10
    done = ("attention", "op", "model_forward", "generation")
    assert any(hasattr(provider, f) for f in done)


def test_who_is_known():
    wanted = {"fasttx", "sdpa", "eager", "torch_compile", "flex_attention", "onnxruntime", "liger"}
    wanted |= {"flash_attn", "xformers", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"}
    wanted |= {"cuda_graph", "ctranslate2", "ctranslate2_int8", "torchao_int8"}
    assert wanted <= set(EVERY)


@pytest.mark.parametrize("name", ["sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_of_sdpa(name, direction):
    case = Case("decoder", 1, 2, 8, 8, 16, "fp32", causal=True)
    problem, run = attention.Problem(case, CPU), Run("test", "now", {})
    chosen = {n: EVERY[n] for n in ("sdpa", name)}
    rows = attention.measure(problem, direction, chosen, 1, 0.0, run, everything=True)
    assert [row.provider for row in rows] == ["sdpa", name]
    assert all(row.ok for row in rows)
    assert attention.measure(problem, direction, {name: EVERY[name]}, 1, 0.0, run) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"causal": True}, {"padding": 0.5}, {"bias": "relative"}])
def test_flex_attention(options):
    provider = EVERY["flex_attention"]
    if why := provider.reason():
        pytest.skip(why)
    case = Case("encoder", 2, 2, 32, 32, 16, "fp32", **options)
    problem, run = attention.Problem(case, CPU), Run("test", "now", {})
    rows = attention.measure(problem, "forward", {"flex": provider}, 1, 0.0, run, everything=True)
    assert rows[0].ok, rows[0].why
    assert attention.measure(problem, "backward", {"flex": provider}, 1, 0.0, run, True) == []


def test_an_op_of_a_provider():
    """It is checked and timed with the case's own contenders; None: it has no such op."""
    case = find("softmax").plain((4, 16), "fp32")
    peer = SimpleNamespace(LABEL="peer", op=lambda case: lambda x: torch.softmax(x["x"], -1))
    none = SimpleNamespace(LABEL="none", op=lambda case: None)
    ours = SimpleNamespace(reason=lambda: None)
    rows = generic.measure(
        generic.Problem(case, CPU), "forward", {"fasttx": ours, "peer": peer, "none": none}, 1, 0.0,
        Run("test", "now", {}),
    )  # fmt: skip
    assert {row.provider: (row.label, row.ok) for row in rows}["peer"] == ("peer", True)
    assert "none" not in {row.provider for row in rows}


@pytest.mark.slow
def test_onnxruntime(monkeypatch):
    transformers = pytest.importorskip("transformers")
    provider = EVERY["onnxruntime"]
    if why := provider.reason():
        pytest.skip(why)
    tiny = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=90, intermediate_size=64, **tiny)

    def make(dtype):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).to(dtype).eval()

    source = families.Source("tiny", "tiny", "masked", make, {"forward": ((2, 12),)})
    for dtype in ("fp32", "bf16"):
        run = Run("test", "now", {})
        bench = families.Bench(source, dtype, CPU, run, beside={"onnxruntime": provider})
        rows = {r.provider: r for r in bench.measure(1, 0.0, direction="forward", size=(2, 12))}
        if dtype == "fp32":
            assert rows["onnxruntime"].ok, rows["onnxruntime"].why
        else:
            assert "onnxruntime" not in rows
            assert "float32" in run.skipped[-1]["why"]


@pytest.fixture
def small():
    """A BERT of a width as a source: small(width)."""
    transformers = pytest.importorskip("transformers")

    def source(width):
        config = transformers.BertConfig(
            vocab_size=90, num_hidden_layers=1, hidden_size=width, num_attention_heads=2,
            intermediate_size=width,
        )  # fmt: skip

        def make(dtype):
            torch.manual_seed(0)
            return transformers.BertForMaskedLM(config).to(dtype).eval()

        return families.Source("tiny", "tiny", "masked", make, {"forward": ((2, 12),)})

    return source


def _beside(source, dtype, **peers):
    run = Run("test", "now", {})
    bench = families.Bench(source, dtype, CPU, run, beside=peers)
    rows = bench.measure(1, 0.0, direction="forward", size=(2, 12))
    return {row.provider: row for row in rows}, run.skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("torchao_int8", "fp32", 0.1),
        ("torchao_int8_weights", "fp32", 0.1),
        ("torchao_int4_weights", "bf16", 0.5),
    ],
)
def test_torchao_tells_its_error(name, dtype, most, small):
    provider = EVERY[name]
    if why := provider.reason():
        pytest.skip(why)
    before = torch._inductor.config.coordinate_descent_tuning
    rows, skipped = _beside(small(128), dtype, **{name: provider})
    assert not skipped
    row = rows[name]
    assert row.ok is False and row.ratio is None and 1e-5 < row.error < most
    assert "relative RMS error" in row.why
    assert torch._inductor.config.coordinate_descent_tuning == before


@pytest.mark.slow
def test_what_torchao_cannot_quantize_is_left_out(small):
    provider = EVERY["torchao_int4_weights"]
    if why := provider.reason():
        pytest.skip(why)
    for width, dtype, words in ((64, "bf16", "none of these shapes"), (128, "fp32", "bfloat16")):
        rows, (left_out,) = _beside(small(width), dtype, torchao_int4_weights=provider)
        assert "torchao_int4_weights" not in rows
        assert words in left_out["why"]


def test_a_peer_that_fails_is_left_out_in_its_words(small):
    def broken(model, batch, threads):
        raise ImportError("Requires mslk >= 1.0.0\nand more")

    peer = SimpleNamespace(NAME="peer", LABEL="peer", model_forward=broken)
    rows, skipped = _beside(small(32), "fp32", peer=peer)
    assert {"fasttx", "sdpa"} <= set(rows) and "peer" not in rows
    assert skipped == [{"what": "peer: tiny fp32", "why": "ImportError: Requires mslk >= 1.0.0"}]
