"""Every Triton kernel compiled ahead of time for GPUs that are not there."""

import pytest
from fasttx.kernels.compile_check import TARGETS

from .ahead import run

SIXTEEN_BIT_MATRIX = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}


def compiled(*arguments):
    return run("fasttx.kernels.compile_check", "--jobs", "2", *arguments)


def label(row):
    return f"{row['kernel']} on {row['arch']}, {row['config']}, tile {row['tile']}"


def assert_sound(rows):
    """Compiles, spills nothing, fits in shared memory, and uses the matrix unit it should."""
    faults = []
    for row in rows:
        if "error" in row:
            faults.append(f"{label(row)}: {row['error']}")
            continue
        if row["spills"]:
            faults.append(f"{label(row)}: spills {row['spills']} bytes")
        if row["shared"] > row["limit"]:
            faults.append(f"{label(row)}: {row['shared']} bytes of shared memory")
        if row["kernel"] == "expand_table_kernel":
            continue
        config = row["config"]
        fp32 = config.get("dtype") == "fp32"
        if fp32 and bool(row["tf32"]) != bool(config.get("tf32")):
            faults.append(f"{label(row)}: {row['tf32']} TF32 instructions")
        # The warpgroup instructions of sm_90 and sm_100 take 64 rows or more.
        rows = row["tile"][1 if "columns" in row["kernel"] else 0]
        unit = SIXTEEN_BIT_MATRIX[row["arch"]] if rows >= 64 or "mma" not in row else "mma"
        if not fp32 and not row[unit]:
            faults.append(f"{label(row)}: no {unit} instruction")
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="session")
def rows():
    return compiled()


def test_every_kernel_and_target_is_compiled(rows):
    kernels = {row["kernel"] for row in rows if row["arch"] == "sm90"}
    assert kernels == {
        "expand_table_kernel",
        "attention_fwd_kernel",
        "attention_bwd_rows_kernel",
        "attention_bwd_columns_kernel",
        "attention_bwd_mask_kernel",
    }
    assert {row["arch"] for row in rows} == set(TARGETS)


def test_kernels_are_sound(rows):
    assert_sound(rows)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)  # over an hour of compiling on two cores
def test_every_configuration_is_sound():
    assert_sound(compiled("--all"))
