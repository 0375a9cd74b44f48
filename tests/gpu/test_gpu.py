"""What only a GPU can show: real launches on streams, in graphs, beyond 2^31 elements, again and
again."""

import threading

import pytest
import torch

import fasttx
from fasttx.choice import promoted
from fasttx.op import OPS
from tests.gpu.calls import CALLS, results
from tests.gpu.test_calls import compare_with_plain

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPARED = [n for n, c in CALLS.items() if c.plain is not None]
# Their doors copy counts to the host, which a capture refuses.
UNCAPTURABLE = ()


def _op_of(text: str) -> str:
    """The op that a call or a test is named after; attention where none is."""
    names = sorted({op.public for op in OPS.values()}, key=len, reverse=True)
    return next((name for name in names if name in text), "attention")


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def first(request, monkeypatch):
    """The backend whose kernels go first in the op's tables, so that each of them is run."""
    given = request.node.callspec.params
    name = _op_of(given.get("name", request.node.originalname))
    ops = [op for op in OPS.values() if op.public == name]
    if not any(k.backend == request.param for op in ops for k in op.tables["cuda"]):
        pytest.skip(f"{name} has no kernels of backend {request.param}")
    if request.param == "cuda" and given.get("dtype") is torch.float32:
        pytest.skip("CUDA C++ kernels are for 16 bits")
    for op in ops:
        tables = {**op.tables, "cuda": promoted(op.tables["cuda"], request.param)}
        monkeypatch.setattr(op, "tables", tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", COMPARED)
def test_small_against_fp64(name, dtype):
    compare_with_plain(name, DEVICE, dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", COMPARED)
def test_large_against_fp64(name, dtype):
    compare_with_plain(name, DEVICE, dtype, 13)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in UNCAPTURABLE])
def test_graph_capture_and_replay(name):
    """New values in the captured inputs give new answers, without any work on the host."""
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, 1)
    other = call.make(DEVICE, torch.bfloat16, 1)
    leaves = {n: t.detach().requires_grad_(n in call.leaves) for n, t in x.items()}

    def step():
        out = call.ours(**leaves)
        weights = torch.ones_like(out)
        wanted = [leaves[n] for n in call.leaves]
        return [out, *(torch.autograd.grad(out, wanted, weights) if wanted else ())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for n, t in leaves.items():
            t.copy_(other[n])
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", list(CALLS))
def test_a_stream_of_ones_own(name):
    """Inputs made on a stream that is still busy: a launch elsewhere would read them too early."""
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, 1)
    want = results(call.ours, x, call.leaves)
    late = {n: torch.zeros_like(t) for n, t in x.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for n, t in late.items():
            t.copy_(x[n])
        got = results(call.ours, late, call.leaves)
    stream.synchronize()
    assert all(map(torch.equal, got, want))


def _changes_in_1000_runs(name: str, scale: int) -> int:
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, scale)
    want = results(call.ours, x, call.leaves)
    changed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for got, first in zip(results(call.ours, x, call.leaves), want, strict=True):
            changed += (got != first).logical_and(first == first).sum()
    return changed.item()


@pytest.mark.parametrize("name", list(CALLS))
def test_1000_runs_are_bit_equal(name):
    assert _changes_in_1000_runs(name, 2) == 0


@pytest.mark.parametrize("name", ["attention", "attention causal", "attention relative"])
def test_1000_runs_in_order_are_bit_equal(name):
    """Of tiles of keys that all add to one dq: three and more, whose sum depends on the order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert _changes_in_1000_runs(name, 7) == 0
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", list(CALLS))
def test_two_threads(name):
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, 1)
    want = results(call.ours, x, call.leaves)
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = results(call.ours, x, call.leaves)
                torch.cuda.current_stream().synchronize()
                if not all(map(torch.equal, got, want)):
                    wrong.append(name)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("name", list(CALLS))
def test_the_current_device_is_another(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    call = CALLS[name]
    x = call.make("cuda:1", torch.bfloat16, 1)
    with torch.cuda.device(1):
        want = results(call.ours, x, call.leaves)
    with torch.cuda.device(0):
        got = results(call.ours, x, call.leaves)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith("linear_cross_entropy")])
def test_no_call_waits_for_the_device(name):
    """linear_cross_entropy alone counts its labels on the host."""
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, 1)
    results(call.ours, x, call.leaves)
    leaves = {n: t.detach().requires_grad_(n in call.leaves) for n, t in x.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call.ours(**leaves)
        if call.leaves:
            torch.autograd.grad(out, [leaves[n] for n in call.leaves], torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", list(CALLS))
def test_compiled_whole(name):
    call = CALLS[name]
    x = call.make(DEVICE, torch.bfloat16, 1)
    fullgraph = not name.startswith("linear_cross_entropy")
    got = results(torch.compile(call.ours, fullgraph=fullgraph), x, call.leaves)
    for ours, eager in zip(got, results(call.ours, x, call.leaves), strict=True):
        assert torch.equal(ours, eager)


def test_65536_batches_and_heads():
    q, k, v = (torch.randn(4096, 16, 16, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    x = {"query": q, "key": k, "value": v}
    got = results(lambda **x: fasttx.attention(**x), x, tuple(x))
    for at in (slice(0, 4), slice(-4, None)):
        want = results(
            lambda **x: fasttx.attention(**x), {n: t[at] for n, t in x.items()}, tuple(x)
        )
        assert torch.equal(got[0][at], want[0])


def _bytes_free() -> int:
    return torch.cuda.mem_get_info()[0]


def test_attention_beyond_2_31_elements():
    """The last head of the last batch is as the same call on it alone."""
    if _bytes_free() < 40 << 30:
        pytest.skip(f"needs 40 GiB, {_bytes_free() >> 30} are free")
    q, k, v = (
        torch.randn(17, 32, 32768, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    assert q.numel() > 2**31
    out = fasttx.attention(q, k, v, is_causal=True, window=(512, None))
    last = fasttx.attention(
        q[-1:, -1:], k[-1:, -1:], v[-1:, -1:], is_causal=True, window=(512, None)
    )
    assert torch.equal(out[-1:, -1:], last)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_add_norm_beyond_2_31_elements(kind):
    if _bytes_free() < 40 << 30:
        pytest.skip(f"needs 40 GiB, {_bytes_free() >> 30} are free")
    x = torch.randn(2**21 + 5, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    out = fasttx.add_norm(x, weight=weight, kind=kind)
    out.backward(torch.ones_like(out))
    tail = x.detach()[-5:].requires_grad_()
    last = fasttx.add_norm(tail, weight=weight, kind=kind)
    last.backward(torch.ones_like(last))
    assert torch.equal(out[-5:], last) and torch.equal(x.grad[-5:], tail.grad)


def test_cross_entropy_beyond_2_31_elements():
    if _bytes_free() < 40 << 30:
        pytest.skip(f"needs 40 GiB, {_bytes_free() >> 30} are free")
    logits = torch.randn(2**14 + 3, 131072, device=DEVICE, dtype=torch.bfloat16)
    target = torch.randint(0, 131072, (len(logits),), device=DEVICE)
    loss = fasttx.cross_entropy(logits, target, reduction="none")
    assert torch.equal(loss[-3:], fasttx.cross_entropy(logits[-3:], target[-3:], reduction="none"))


def test_out_of_memory_leaves_the_process_usable():
    free = _bytes_free()
    hog = torch.empty(int(free * 0.9), dtype=torch.int8, device=DEVICE)
    q = torch.empty(1, 1, 1, 128, device=DEVICE, dtype=torch.bfloat16).expand(64, 64, 65536, 128)
    with pytest.raises(torch.OutOfMemoryError):
        fasttx.attention(q, q, q)
    del hog
    compare_with_plain("attention", DEVICE, torch.bfloat16, 1)


def test_attention_takes_memory_linear_in_the_length():
    peaks = []
    for S in (4096, 16384):
        q = torch.randn(1, 4, S, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fasttx.attention(q, q, q, is_causal=True).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        q.grad = None
    assert peaks[1] < 4.5 * peaks[0]
