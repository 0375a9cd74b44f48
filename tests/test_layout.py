"""The house: every op has its file in every room, arrows point one way, files stay small, the
import stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "fasttx/ops").glob("*.py") if not p.stem.startswith("_"))
ROOMS = {
    "fasttx/reference": ".py",
    "kernels": ".py",
    "csrc/cpu": ".cpp",
    "tests/ops": ".py",
    "benchmarks/ops": ".py",
}
SOURCES = [
    p
    for s in ("py", "cpp", "h", "cu", "cuh")
    for p in ROOT.rglob(f"*.{s}")
    if not {".venv", "build", "dist"} & set(p.relative_to(ROOT).parts[:-1])
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", ROOMS)
def test_every_op_has_its_file_in_every_room(op, room):
    stem = f"test_{op}" if room == "tests/ops" else op
    found = list((ROOT / room).glob(f"{stem}*{ROOMS[room]}"))
    assert found, f"{room}/{stem}{ROOMS[room]} is missing"


RULES = [
    (
        "kernels",
        ("fasttx.ops", "fasttx.layers", "fasttx.models", "fasttx.integrations", "fasttx.reference"),
    ),
    (
        "fasttx/reference",
        ("fasttx.ops", "fasttx.kernels", "fasttx.layers", "fasttx.integrations", "triton"),
    ),
    (
        "fasttx/ops",
        (
            "fasttx.kernels",
            "fasttx.layers",
            "fasttx.models",
            "fasttx.integrations",
            "triton",
            "transformers",
        ),
    ),
    (
        "fasttx/layers",
        (
            "fasttx.op.",
            "fasttx.kernels",
            "fasttx.reference",
            "fasttx.models",
            "fasttx.integrations",
            "triton",
        ),
    ),
    (
        "fasttx/models",
        ("fasttx.kernels", "fasttx.reference", "fasttx.integrations", "triton", "transformers"),
    ),
    ("fasttx/integrations", ("fasttx.kernels", "fasttx.reference", "triton")),
    ("fasttx/training", ("fasttx.kernels", "fasttx.reference", "triton", "transformers")),
    (
        "fasttx/inspect",
        ("fasttx.kernels", "fasttx.reference", "triton", "transformers", "matplotlib"),
    ),
]


@pytest.mark.parametrize(("room", "forbidden"), RULES)
def test_arrows_point_one_way(room, forbidden):
    for path in sorted((ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        late = {
            n
            for f in ast.walk(tree)
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
            for n in ast.walk(f)
        }
        top = [
            n
            for n in ast.walk(tree)
            if n not in late and isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        names = _imports(top, path)
        bad = {
            n for n in names if any(n == f or n.startswith(f.rstrip(".") + ".") for f in forbidden)
        }
        assert not bad, f"{path.relative_to(ROOT)} imports {', '.join(sorted(bad))}"


def _imports(nodes: list, path: Path) -> set[str]:
    """Absolute dotted names, relative ones resolved."""
    package = list(path.relative_to(ROOT).parts[:-1])
    if package[0] in ("kernels", "benchmarks"):
        package = ["fasttx", *package]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {stem} | {f"{stem}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    budget = 200 if path == ROOT / "fasttx/op.py" else 600
    lines = len(path.read_text().splitlines())
    assert lines <= budget, f"{lines} lines: split it by meaning (budget {budget})"


def test_outputs_are_allocated_in_alloc_alone():
    """A kernel fills what it is given: no Triton launcher or native op makes a tensor the caller
    sees."""
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert "torch/extension.h" not in path.read_text(), path


def test_import_is_light():
    """No Triton, no transformers, no native library, no CUDA context before they are needed."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fasttx\nnew = set(sys.modules) - "
        "before\n"
        "bad = [m for m in new if m.split('.')[0] in ('triton', 'transformers', 'matplotlib', "
        "'rich', 'typer')]\n"
        "assert not bad, bad\nassert not hasattr(torch.ops.fasttx_native, "
        "'attention_fwd_cpu')\nassert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
