"""What was measured to be the fastest goes first, where its measurement says so."""
# ruff: noqa: E501 (tables, one case a line)

import json
import re

import pytest
import torch

import fasttx
from fasttx import choice, choice_tables, cli, machine
from fasttx.op import OPS
from fasttx.ops.linear import linear_fwd

X, W = torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16()
ENTRY = {
    "dtypes": {"x": "bfloat16"},
    "sizes": {"x.rows": [4, 64], "weight.0": [1, 4]},
    "given": {"activation": [0, 1], "residual": False, "keep": False},
    "layout": {"weight": "rows"},
    "backend": "torch",
    "ms": {"torch": 0.1, "cpu": 0.2},
    "gain": [2.0, 1.9, 2.1],
}


def table(*entries, op="linear_fwd", **changes) -> dict:
    return {
        "machine": machine.cpu_class(),
        "threads": torch.get_num_threads(),
        "fasttx": fasttx.__version__,
        "torch": torch.__version__,
        "ops": {op: list(entries)},
    } | changes


def text(*tables) -> str:
    return json.dumps({"schema": choice_tables.SCHEMA, "tables": tables})


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(*tables, users=(...)): the committed tables and the user's."""
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTTX_TUNE", raising=False)

    def set(*tables, users=()):
        path = tmp_path / "committed.json"
        path.write_text(text(*tables))
        monkeypatch.setattr(choice_tables, "COMMITTED", path)
        if users:
            choice_tables.write(choice_tables.user_file(), list(users))
        choice.forget()

    yield set
    monkeypatch.undo()
    choice.forget()


def chosen(x=X, weight=W, **options) -> str:
    return fasttx.explain(fasttx.linear, x, weight, **options).chosen("linear_fwd")


def test_the_fastest_goes_first(measured):
    measured()
    assert chosen() == "cpu"
    measured(table(ENTRY))
    assert chosen() == chosen(activation="gelu") == "torch"
    torch.testing.assert_close(fasttx.linear(X, W), torch.nn.functional.linear(X, W))
    assert linear_fwd.pick((X, W, None, None, 0, False)).backend == "torch"
    assert linear_fwd.pick((X, W, None, None, 0, False), "cpu").backend == "cpu"


OTHER_CALLS = [
    {"activation": "relu"},
    {"residual": torch.randn(6, 4).bfloat16()},
    {"x": X[:3]},
    {"weight": torch.randn(5, 8).bfloat16()},
    {"weight": W.t().contiguous().t()},
    {"x": X.float(), "weight": W.float()},
    {"x": X.clone().requires_grad_(), "activation": "gelu"},
]


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_other_calls_are_as_before(measured, call):
    measured(table(ENTRY))
    assert chosen(**call) == "cpu"


@pytest.mark.parametrize(
    "change", [{"machine": "another machine"}, {"threads": 99}, {"torch": "1.0.0"}]
)
def test_other_machines_threads_and_versions_are_as_before(measured, change):
    measured(table(ENTRY, **change))
    assert chosen() == "cpu"


def test_needs_has_the_last_word(measured):
    measured(table(ENTRY | {"backend": "cuda", "ms": {"cuda": 1.0}}))
    assert chosen() == "cpu"


@pytest.fixture
def runs(monkeypatch):
    """The backends of linear_fwd that really ran."""
    found = []
    for kernel in linear_fwd.tables["cpu"]:
        if kernel.backend in ("cpu", "torch") and kernel.unavailable() is None:

            def run(*args, function=kernel.function, backend=kernel.backend):
                found.append(backend)
                return function(*args)

            monkeypatch.setattr(kernel, "function", run)
    return found


def test_a_direct_call_asks_first(measured, runs):
    """Once a call went straight to the first kernel, another one still goes where it was measured
    to be faster."""
    measured(table(ENTRY))
    other = torch.randn(2, 8).bfloat16()
    fasttx.linear(other, W)
    if linear_fwd.direct.get(None) is None:
        pytest.skip("the native library is not available")
    assert linear_fwd.direct[None]((other, W, None, None, 0, False)) is not NotImplemented
    assert linear_fwd.direct[None]((X, W, None, None, 0, False)) is NotImplemented
    fasttx.linear(X, W)
    fasttx.linear(X, W, backend="cpu")
    assert runs == ["cpu", "torch", "cpu"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert linear_fwd.direct[None]((X, W, None, None, 0, False)) is not NotImplemented
    finally:
        torch.set_num_threads(threads)


def test_training_asks_first_too(measured):
    """Whatever short way a call with a gradient takes once it is known."""
    entry = ENTRY | {"sizes": {"x.rows": [4, 64]}, "dtypes": {}, "given": {}, "layout": {}}
    measured(table(entry, op="softmax_fwd"))
    bad = torch.full((4, 5), -torch.inf, requires_grad=True)
    for rows in (2, 2, 4, 2, 4):
        x = torch.randn(rows, 5, requires_grad=True)
        told = fasttx.explain(fasttx.softmax, x).chosen("softmax_fwd")
        assert told == ("torch" if rows == 4 else "cpu")
        y = fasttx.softmax(x)
        torch.testing.assert_close(y, torch.softmax(x, -1))
        y.square().sum().backward()
    seen = []
    (kernel,) = (
        k for k in OPS["softmax_fwd"].table((bad, None, 1.0, False, False, False, False))
        if k.backend == "torch"
    )  # fmt: skip
    own, kernel.function = kernel.function, lambda *args: seen.append(1) or own(*args)
    fasttx.softmax(bad)
    assert seen == [1]


def test_a_direct_call_of_an_op_without_choices_is_as_before(measured):
    """It costs nothing: the function is the library's own."""
    measured(table(ENTRY))
    q = torch.randn(1, 1, 2, 8)
    fasttx.attention(q, q, q)
    call = OPS["attention_fwd"].direct.get(None)
    if call is None:
        pytest.skip("the native library is not available")
    assert type(call).__name__ == "builtin_function_or_method"


def test_what_was_found_for_a_call_is_kept(measured, monkeypatch):
    """Calls that differ in nothing that an entry looks at are looked up once."""
    measured(table(*[ENTRY | {"sizes": {"x.rows": [n, n]}} for n in range(4, 40)]))
    found = choice.choices("linear_fwd", torch.device("cpu"), linear_fwd.at)
    looked = []
    first = choice.Choices._first
    monkeypatch.setattr(
        choice.Choices, "_first", lambda self, args: looked.append(args) or first(self, args)
    )

    def ask(rows, weight=W, residual=None, activation=0):
        x = torch.randn(rows, 8).bfloat16()
        return found((x, weight, None, residual, activation, False)) is not None

    calls = [
        ((6,), True),
        ((3,), False),
        ((6, W.t().contiguous().t()), False),
        ((6, W, torch.randn(6, 4).bfloat16()), False),
        ((6, W, None, 2), False),
        ((6, None), False),
    ]
    for _ in range(2):
        for call, fits in calls:
            assert ask(*call) is fits
    assert len(looked) == 7  # a call without a weight is never kept
    monkeypatch.setattr(choice, "MOST_KNOWN", 3)
    for rows in range(50, 60):
        assert not ask(rows)
    assert len(found.known) <= 3
    assert ask(6)


def test_gradients_and_compiled_calls_follow_the_choice(measured):
    entry = ENTRY | {"given": {}, "sizes": {}, "layout": {}}
    measured(table(entry, op="linear_bwd", ops={"linear_fwd": [entry], "linear_bwd": [entry]}))
    leaves = [t.clone().requires_grad_() for t in (X, W)]
    told = fasttx.explain(fasttx.linear, *leaves)
    assert told.chosen("linear_fwd") == told.chosen("linear_bwd") == "torch"
    with torch.no_grad():
        expected = torch.nn.functional.linear(X, W)
    for function in (fasttx.linear, torch.compile(fasttx.linear, backend="aot_eager")):
        out = function(*leaves)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        wanted = torch.autograd.grad(
            torch.nn.functional.linear(*leaves), leaves, torch.ones_like(out)
        )
        torch.testing.assert_close(grads, wanted, rtol=0.05, atol=0.05)


def leaf(*shape):
    return lambda dtype: torch.randn(shape).to(dtype).requires_grad_()


ANGLES = torch.rand(6, 8)
PADDING = torch.arange(6) < 4
# op: (the argument whose dtype the entry names, what its door takes, the call).
TRAINED = {
    "add_norm": ("x", (leaf(6, 8), leaf(6, 8), leaf(8)), lambda x, r, w, **o: fasttx.add_norm(x, r, weight=w, **o)),
    "embed": ("token_weight", (leaf(9, 8), leaf(7, 8), leaf(8)), lambda t, p, w, **o: fasttx.embed(torch.arange(6)[None], t, p, norm_weight=w, **o)),
    "cross_entropy": ("logits", (leaf(6, 8),), lambda x, **o: fasttx.cross_entropy(x, torch.arange(6), **o)),
    "softmax": ("x", (leaf(4, 5),), lambda x, **o: fasttx.softmax(x, **o)),
    "attention": ("q", 3 * (leaf(1, 2, 6, 8),), lambda q, k, v, **o: fasttx.attention(q, k, v, PADDING, is_causal=True, **o)),
    "rope": ("q", (leaf(1, 2, 6, 8), leaf(1, 2, 6, 8)), lambda q, k, **o: torch.cat(fasttx.rope(q, k, ANGLES.cos(), ANGLES.sin(), **o))),
    "linear_cross_entropy": ("x", (leaf(6, 8), leaf(9, 8)), lambda x, w, **o: fasttx.linear_cross_entropy(x, w, torch.arange(6), reduction="none", **o)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_torch_runs_both_directions_where_it_was_the_fastest(name, measured, monkeypatch):
    """And nowhere else: calls of another dtype go straight to the first kernel in between."""
    of, made, call = TRAINED[name]
    ran, both = [], [f"{name}_fwd", f"{name}_bwd"]
    for op in both:
        (kernel,) = (k for k in OPS[op].tables["cpu"] if k.backend == "torch")
        assert kernel.unavailable() is None

        def run(*args, own=kernel.function, op=op):
            ran.append(op)
            return own(*args)

        monkeypatch.setattr(kernel, "function", run)
    measured()
    leaves = [make(torch.float32) for make in made]
    assert {fasttx.explain(call, *leaves).chosen(op) for op in both} == {"cpu"}
    entry = ENTRY | {"dtypes": {of: "float32"}, "sizes": {}, "given": {}, "layout": {}}
    measured(table(ops={both[0]: [entry], both[1]: [entry | {"dtypes": {}}]}))
    assert {fasttx.explain(call, *leaves).chosen(op) for op in both} == {"torch"}
    for dtype in 3 * (torch.bfloat16, torch.float32):
        leaves, found = [make(dtype) for make in made], []
        for options in ({}, {"backend": "reference"}):
            out = call(*leaves, **options)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        if dtype is torch.float32:
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert ran == 3 * [both[1], *both]


def test_dropout_keeps_its_own_bits(measured):
    """A measured "torch" never runs a call whose bits are fasttx's."""
    entry = {"backend": "torch", "ms": {"torch": 0.1, "cpu": 0.2}, "gain": [2.0, 1.9, 2.1]}
    names = [n for n, op in OPS.items() if "torch" in op.backends() and "seed" in op.at]
    assert "ffn_fwd" in names
    measured(table(ops={n: [entry] for n in names}))
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    told = fasttx.explain(fasttx.ffn, x, w, None, w, None, dropout_p=0.5, seed=3)
    assert told.chosen("ffn_fwd") == "cpu"
    assert fasttx.explain(fasttx.ffn, x, w, None, w, None).chosen("ffn_fwd") == "torch"
    for name in names:
        (kernel,) = (k for k in OPS[name].tables["cpu"] if k.backend == "torch")
        assert "seed" in kernel.needs.absent


def test_explain_says_where_a_choice_is_from(measured):
    measured(table(ENTRY, date="2026-11-23"))
    told = str(fasttx.explain(fasttx.linear, X, W))
    assert re.search(
        r"-> linear_fwd +torch +measured 2.00x \[1.90, 2.10\] as fast \(torch 0.1", told
    )
    assert "fasttx's own table, 2026-11-23" in told
    assert "measured" not in str(fasttx.explain(fasttx.linear, X[:3], W))


def test_the_user_s_table_stands_in_the_place_of_the_committed_one(measured):
    measured(table(ENTRY), users=[table()])
    assert chosen() == "cpu"
    measured(table(), users=[table(ENTRY)])
    assert chosen() == "torch"
    assert str(choice_tables.user_file()) in str(fasttx.explain(fasttx.linear, X, W))
    measured(table(), users=[table(ENTRY, fasttx="0.0.1")])
    assert chosen() == "cpu"
    measured(table(ENTRY), users=[table(threads=99)])
    assert chosen() == "torch"


def test_without_tables(measured, monkeypatch):
    monkeypatch.setenv("FASTTX_TUNE", "0")
    measured(table(ENTRY), users=[table(ENTRY)])
    assert chosen() == "cpu"


DAMAGED = [
    ("", "it is no JSON"),
    ('{"schema": "fasttx-choices/1", "tables"', "it is no JSON"),
    ("[" * 100000, "it is no JSON"),
    ("[]", "its schema is not fasttx-choices/1"),
    ('{"schema": "fasttx-choices/2", "tables": []}', "its schema is not fasttx-choices/1"),
    ('{"schema": "fasttx-choices/1"}', "it has no list of tables"),
    (text({"machine": "here"}), "a table needs threads, int"),
    (text(table(ENTRY, ops={"linear_fwd": {}})), "linear_fwd must have a list of entries"),
    (text(table([])), "must be an object"),
]
CHANGES = [
    ({"dtypes": {"x": "float8"}}, "must have as dtypes float32"),
    ({"dtypes": {"x": []}}, "must have as dtypes float32"),
    ({"sizes": {"x": [1, 2]}}, "must have sizes like"),
    ({"sizes": {"x.0": [1]}}, "must have sizes like"),
    ({"sizes": {"x.0": [1.5, True]}}, "must have sizes like"),
    ({"sizes": []}, "must have as its sizes an object"),
    ({"given": {"activation": 0}}, "must have as given a bool or the list"),
    ({"layout": {"weight": "odd"}}, "must have as layouts rows, columns, other"),
    ({"ms": {}}, "must name the times measured and as its backend the fastest"),
    ({"ms": {"cpu": 0.2}}, "must name the times measured and as its backend the fastest"),
    ({"ms": {"torch": "0.2"}}, "must have as its ms a number for each backend"),
    ({"backend": "cpu"}, "must name the times measured and as its backend the fastest"),
    ({"backend": "nonsense", "ms": {"nonsense": 1}}, "must name the times measured"),
    ({"gain": [1.1, 1.02, 1.2]}, "must have as its gain .median, low, high. with low at"),
    ({"gain": 2.0}, "must have as its gain"),
]  # fmt: skip
DAMAGED += [(text(table(ENTRY | change)), words) for change, words in CHANGES]


@pytest.mark.parametrize(("damaged", "words"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_table_of_the_user_is_ignored_with_a_warning(measured, damaged, words):
    measured(table(ENTRY))
    path = choice_tables.user_file()
    path.parent.mkdir()
    path.write_text(damaged)
    path.chmod(0o600)
    choice.forget()
    with pytest.warns(RuntimeWarning, match=f"choices.json is ignored: .*{words}"):
        assert chosen() == "torch"
    assert chosen() == "torch"  # told once
    with pytest.raises(ValueError, match=words):
        choice_tables.read(damaged)


def test_what_others_can_write_is_ignored(measured):
    measured(table(), users=[table(ENTRY)])
    choice_tables.user_file().chmod(0o666)
    choice.forget()
    with pytest.warns(RuntimeWarning, match="others than its owner may write it"):
        assert chosen() == "cpu"
    path = choice_tables.user_file()
    path.unlink()
    path.mkdir()
    choice.forget()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert chosen() == "cpu"


def test_a_user_without_a_home(measured, monkeypatch):
    def homeless():
        raise RuntimeError("could not determine home directory.")

    monkeypatch.delenv("FASTTX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(choice_tables.Path, "home", homeless)
    measured(table(ENTRY))
    assert chosen() == "torch"
    assert "set FASTTX_CACHE" in dict(cli._choices())["yours"]


def test_an_argument_that_an_op_lacks_is_ignored_with_a_warning(measured):
    measured(table(ENTRY | {"given": {"nonsense": [1]}}))
    with pytest.warns(RuntimeWarning, match="the op has no argument nonsense"):
        assert chosen() == "cpu"


def test_written_at_once_and_for_its_owner(measured, monkeypatch):
    measured(users=[table(ENTRY)])
    path = choice_tables.user_file()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    before = path.read_text()
    monkeypatch.setattr(choice_tables.os, "replace", _full_disk)
    with pytest.raises(OSError, match="disk is full"):
        choice_tables.write(path, [table()])
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]
    with pytest.raises(ValueError, match="must name the times measured"):
        choice_tables.write(path, [table(ENTRY | {"ms": {}})])
    assert path.read_text() == before


def _full_disk(*paths):
    raise OSError("the disk is full")


def test_tables_are_merged_by_machine_threads_and_versions():
    first, second = table(ENTRY, threads=1), table(ENTRY, threads=2)
    tables = choice_tables.merged([first], second)
    assert tables == [first, second]
    other = table(op="ffn_fwd", threads=1)
    first_again, third = choice_tables.merged(tables, other)[::-1], table(threads=1)
    assert first_again[0]["ops"] == {"ffn_fwd": [], "linear_fwd": [ENTRY]}
    assert choice_tables.merged(tables, third)[-1]["ops"] == {"linear_fwd": []}


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FASTTX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"FASTTX_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/fasttx"),
        ({"FASTTX_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/fasttx"),
    ],
)
def test_folder(monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(choice_tables.cache_folder()) == folder


def test_the_committed_data_can_be_read():
    for found in choice_tables.read(choice_tables.COMMITTED.read_text()):
        assert re.fullmatch(r"[0-9a-f]{7,40}\+?", found["commit"])
        for op, entries in found["ops"].items():
            for entry in entries:
                assert choice._named(entry) <= set(OPS[op].at)
                assert entry["backend"] in OPS[op].backends()
