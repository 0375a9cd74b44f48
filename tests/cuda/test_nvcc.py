"""Every CUDA kernel compiled for sm_80 and sm_90a: what it takes of the multiprocessor, and that
the instructions it is written for are there. The emulator's own kernels too: they hold every
header."""

import re
import shutil
import subprocess
from collections import Counter

import pytest

from .compiled import ARCHS, CUDA, everything, nvcc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc() is None, reason="no nvcc (FASTTX_NVCC names one)"),
    pytest.mark.timeout(900),  # the first compiles everything
]


def test_nothing_spills():
    resources, _ = everything()
    assert {r.arch for r in resources} == set(ARCHS)
    spilled = [r for r in resources if r.stack or r.stores or r.loads]
    assert not spilled, "\n".join(map(str, spilled))


# What is compiled more than once: folder and kernel. Of attention and of the products each dtype is
# an instance; elsewhere it is read at run time.
INSTANCES = {
    # 64 columns: the band alone, a bias, dropout; 128: the band alone, all; 256: all.
    ("sm80", "attention_fwd"): 2 * 6,
    ("sm80", "attention_bwd"): 2 * 3 * 2,  # 64, 128, 256 columns; rows kept, keys kept
    ("sm80", "attention_bwd_mask"): 3,
    ("sm80", "gemm"): 2,
    # 64 and 128 columns: the band alone, a bias, dropout; 256: the band alone, all.
    ("sm90", "attention_fwd"): 2 * 8,
    ("sm90", "attention_bwd_kernel"): 2 * 2 * 2,  # 64, 128 columns; the band alone, all
    ("sm90", "gemm"): 2 * 2,  # tiles of 128 and of 256 columns
    ("cuda", "attention_decode"): 4,  # 64, 128, 256 columns by 16 bytes, any by one number
    ("cuda", "rope_by_eight"): 2,  # halves, neighbours
}


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt to read names with")
def test_instantiations_are_few():
    kernels = {(r.source, r.kernel) for r in everything()[0] if (CUDA / r.source).is_file()}
    folders, names = zip(*sorted(kernels), strict=True)
    shown = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.replace("(anonymous namespace)::", "")
    found = Counter()
    for source, name in zip(folders, shown.splitlines(), strict=True):
        if template := re.match(r"void (?:\w+::)*(\w+)<", name):
            found[(CUDA / source).parent.name, template[1]] += 1
    assert found == INSTANCES
    assert found.total() <= 64


def test_memory_bound_kernels_leave_room_for_many_threads():
    """Registers of a thread, at most: with them 512 threads and more fit a multiprocessor."""
    resources, _ = everything()
    own = {p.name for p in CUDA.glob("*.cu")}  # sm80/, sm90/: tensor cores
    own -= {"attention_decode.cu"}  # and here: sums of 16 rows in registers
    crowded = [r for r in resources if r.source in own and r.registers > 128]
    assert not crowded, "\n".join(map(str, crowded))
    # All shared memory is asked for by the launch.
    assert not [r for r in resources if r.shared]


@pytest.mark.parametrize(
    ("source", "arch", "instructions"),
    [
        ("gemm_mma.cu", "80", ["mma.sync.aligned.m16n8k16", "cp.async.cg", "ldmatrix.sync"]),
        ("gemm_mma.cu", "80", [".trans.shared.b16", "bar.sync"]),
        ("gemm_wgmma.cu", "90a", ["wgmma.mma_async.sync.aligned.m64n256k16", "setmaxnreg.dec"]),
        ("gemm_wgmma.cu", "90a", ["cp.async.bulk.tensor.2d", "mbarrier.try_wait", "cp.reduce"]),
        ("lanes.cu", "90a", ["stmatrix.sync", "bar.arrive"]),
        ("add_norm_fwd.cu", "80", ["ld.global.L1::no_allocate.v4.u32", "st.global.v4.u32"]),
        ("rope.cu", "80", ["ld.global.L1::no_allocate.v4.u32", "cvt.rn.bf16x2.f32"]),
        ("softmax_fwd.cu", "80", ["ld.global.L1::no_allocate.v4.u32", "st.global.v4.u32"]),
        ("softmax_bwd.cu", "90a", ["ld.global.L1::no_allocate.v4.u32", "st.global.v4.u32"]),
        ("embed_fwd.cu", "80", ["ld.global.v4.u32", "st.global.v4.u32"]),
        ("embed_tables.cu", "80", ["ld.global.v4.u32", "st.global.v4.u32"]),
        ("attention_decode.cu", "80", ["mma.sync.aligned.m16n8k16", "ld.global.v4.u32"]),
        ("cache_append.cu", "80", ["ld.global.L1::no_allocate.v4.u32", "st.global.v4.u32"]),
        ("cross_entropy.cu", "80", ["ld.global.v4.u32", "ex2.approx.ftz.f32"]),
        ("sm80/attention_fwd_bf16.cu", "80", ["mma.sync.aligned.m16n8k16", "cp.async.cg"]),
        ("sm80/attention_fwd_f16.cu", "80", ["ldmatrix.sync.aligned.m8n8.x4.trans", "ex2.approx"]),
        ("sm80/attention_bwd_keys_bf16.cu", "80", ["mma.sync.aligned.m16n8k16", "cp.async.cg"]),
        ("sm80/attention_bwd_rows_f16.cu", "80", ["mma.sync.aligned.m16n8k16", "st.global.v4"]),
        ("sm80/gemm_bf16.cu", "80", ["mma.sync.aligned.m16n8k16.row.col.f32.bf16", "cp.async.cg"]),
        ("sm80/gemm_f16.cu", "80", ["ldmatrix.sync.aligned.m8n8.x4.trans", "st.global.v4.u32"]),
        ("sm90/gemm_bf16.cu", "90a", ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16"]),
        ("sm90/gemm_f16.cu", "90a", ["wgmma.mma_async.sync.aligned.m64n256k16.f32.f16"]),
        ("sm90/gemm_f16.cu", "90a", ["cp.async.bulk.tensor.2d", "mbarrier.try_wait", "setmaxnreg"]),
        ("sm90/attention_fwd_bf16.cu", "90a", ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16"]),
        ("sm90/attention_fwd_f16.cu", "90a", ["wgmma.mma_async.sync.aligned.m64n256k16.f32.f16"]),
        ("sm90/attention_fwd_bf16.cu", "90a", ["cp.async.bulk.tensor.4d", "mbarrier.try_wait"]),
        ("sm90/attention_fwd_bf16.cu", "90a", ["setmaxnreg.inc", "bar.arrive", "stmatrix.sync"]),
    ],
)
def test_instructions_are_there(source, arch, instructions):
    text = everything()[1][source, arch]
    assert not [i for i in instructions if i not in text]


def test_no_float_atomics():
    """Gradients are the same bits in every run. Counters of turns are whole numbers, and the bulk
    reduce-add of dq, which deterministic algorithms put in order, is another instruction."""
    for (source, _), text in everything()[1].items():
        if (CUDA / source).is_file():
            assert not re.search(r"\b(atom|red)\.\S*\.b?f(16|32|64)", text), source
