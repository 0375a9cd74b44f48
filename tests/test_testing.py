"""The harness's own parts that no op's tests would miss."""

import pytest
import torch

import fasttx
from fasttx.testing import LAYOUTS, guarded_outputs, lay_out, on_device


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_device_keeps_every_layout(layout, monkeypatch):
    x = lay_out(torch.randn(3, 4, 6), layout)
    seen = []
    run = fasttx.op.Op.__call__
    monkeypatch.setattr(
        fasttx.op.Op, "__call__", lambda self, *a, **k: (seen.append(a[0]), run(self, *a, **k))[1]
    )
    with on_device("cpu"):
        got = fasttx.rms_norm(x)
    (there,) = seen
    assert (there.shape, there.stride()) == (x.shape, x.stride())
    assert there.data_ptr() != x.data_ptr() and torch.equal(there, x)
    torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, (6,), eps=1e-5))


def test_on_device_brings_back_what_an_op_mutates():
    cache = torch.zeros(2, 1, 2, 8, 4).transpose(0, 1)[0]
    new = torch.randn(2, 2, 3, 4)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    with on_device("cpu"):
        fasttx.cache_append(cache, cache.clone(), new, new, lengths)
    assert torch.equal(cache[0, :, :3], new[0]) and torch.equal(cache[1, :, 2:5], new[1])


def test_on_device_under_autograd_and_guards():
    x = torch.randn(5, 7, requires_grad=True)
    with on_device("cpu"), guarded_outputs():
        fasttx.layer_norm(x).square().sum().backward()
    other = x.detach().requires_grad_()
    fasttx.layer_norm(other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_on_device_leaves_traced_calls_alone():
    x = torch.randn(5, 7)
    with on_device("cpu"):
        compiled = torch.compile(fasttx.rms_norm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), fasttx.rms_norm(x))
        torch.func.vmap(lambda row: fasttx.rms_norm(row, backend="reference"))(x)
