"""Writes the tables of ops, README.md's and docs/ops.md's, from the data that picks kernels:
python -m tools.support_table"""

from collections.abc import Iterator
from pathlib import Path

from fasttx.explain import last_gpu_run
from fasttx.op import OPS, Needs

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- ops table -->", "<!-- end ops table -->"
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "inplace": "in place"}


def kernels() -> Iterator[tuple[str, str, str, str, Needs]]:
    """(public function, device, backend, direction, needs) of every kernel."""
    for op in OPS.values():
        suffix = op.name.removeprefix(op.public + "_")
        for device, table in op.tables.items():
            for kernel in table:
                direction = DIRECTIONS.get(suffix, suffix)
                yield op.public, device, kernel.backend, direction, kernel.needs


def short_table() -> str:
    """A row an op: which directions C++ SIMD, Triton and CUDA C++ have, and when a GPU ran them."""
    columns = {("cpu", "cpu"): {}, ("cuda", "triton"): {}, ("cuda", "cuda"): {}}
    for op, device, backend, direction, _ in kernels():
        if (device, backend) in columns:
            columns[device, backend].setdefault(op, []).append(direction)
    rows = []
    for op in sorted(columns["cpu", "cpu"]):
        runs = {b: last_gpu_run(op, b) for b in ("triton", "cuda") if op in columns["cuda", b]}
        same = len(set(runs.values())) == 1
        ran = runs["triton"] if same else "; ".join(f"{b}: {when}" for b, when in runs.items())
        rows.append((op, *(", ".join(c.get(op, ["-"])) for c in columns.values()), ran))
    return _markdown(
        ("op", "CPU: C++ SIMD", "GPU: Triton", "GPU: CUDA C++", "last run on a GPU"), rows
    )


def full_table() -> str:
    """A row a backend of an op on a device, with its dtypes and limits."""
    directions: dict[tuple, list[str]] = {}
    for *names, direction, needs in kernels():
        directions.setdefault((*names, *_summary(needs)), []).append(direction)
    rows = []
    for (*names, dtypes, limits), both in sorted(directions.items(), key=lambda row: row[0][:2]):
        op, device, backend = names
        ran = last_gpu_run(op, backend) if device == "cuda" and backend != "reference" else ""
        rows.append((*names, ", ".join(both), dtypes, limits, ran))
    head = ("op", "device", "backend", "direction", "dtypes", "limits", "last run on a GPU")
    return _markdown(head, rows)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _summary(needs: Needs) -> tuple[str, str]:
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in needs.dtypes or ()) or "any floating"
    limits = []
    for key, (low, high) in needs.sizes.items():
        name, _, dim = key.partition(".")
        if high < 2**31 - 256:
            limits.append(f"{low} <= {name}.shape[{dim}] <= {high}")
        elif low:
            limits.append(f"{low} <= {name}.shape[{dim}]")
    lie = {"rows": "in rows of 16 bytes", "either": "in rows or columns of 16 bytes"}
    limits += [f"{name} {lie.get(how, f'as {how}')}" for name, how in needs.matrices.items()]
    limits += [f"no {name}" for name in needs.absent]
    limits += [f"sm_{needs.sm}"] if needs.sm else []
    limits += ["=".join(needs.env)] if needs.env else []
    limits += ["by name"] if needs.by_name else []
    return dtypes, "; ".join(limits)


TABLES = {"README.md": short_table, "docs/ops.md": full_table}


def parts(text: str) -> tuple[str, str, str]:
    """What stands before a page's table, the table, what stands after it."""
    before, _, rest = text.partition(BEGIN + "\n")
    table, _, after = rest.partition("\n" + END)
    return before + BEGIN + "\n", table, "\n" + END + after


if __name__ == "__main__":
    for name, table in TABLES.items():
        page = ROOT / name
        before, _, after = parts(page.read_text())
        page.write_text(before + table() + after)
