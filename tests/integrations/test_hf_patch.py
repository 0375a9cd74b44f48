"""patch and unpatch: the report, strictness, what stays as it was, registration."""

import ast
import copy
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fasttx
from fasttx.integrations import _on_import
from fasttx.integrations.hf_families import BERT_LIKE, BERT_POST_NORM

from .hf_models import MODELS, batch, bert, gradients, output, roberta

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def implementations(model) -> set:
    configs = [getattr(m, "config", None) for m in model.modules()]
    return {c._attn_implementation for c in configs if c is not None}


def attention(entries) -> list:
    return [e for e in entries if e.kind.endswith("Attention")]


def opt():
    """A model that fasttx does not know."""
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=8, ffn_dim=8, num_attention_heads=2, num_hidden_layers=1
    )
    return transformers.OPTModel(config)


def tiny(config_cls, **extra):
    return config_cls(
        vocab_size=61,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=40,
        **extra,
    )


@pytest.mark.parametrize("kind", MODELS)
def test_report_and_unpatch(kind):
    model = MODELS[kind]()
    report = fasttx.patch(model)
    names = [e.name for e in attention(report.replaced)]
    assert names == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    kinds = {e.kind for e in report.replaced}
    assert {"LayerNorm", f"{type(model).__name__[:-5]}SelfOutput"} < kinds
    assert not report.skipped
    assert implementations(model) == {"fasttx"}
    lines = str(report).splitlines()
    count = len(report.entries)
    assert lines[0] == f"{type(model).__name__}: {count} of {count} modules run fasttx"
    row = r"  encoder\.layer\.\*\.attention\.self +2 x \w+SelfAttention +replaced"
    assert sum(bool(re.fullmatch(row, line)) for line in lines) == 1
    assert fasttx.patch(model) == report
    fasttx.unpatch(model)
    assert implementations(model) == {"sdpa"}
    fasttx.unpatch(model)
    assert implementations(model) == {"sdpa"}


@pytest.mark.parametrize("before", ["eager", "sdpa", "flex_attention"])
def test_unpatch_leaves_nothing_behind(before):
    model, untouched = bert(attn=before), bert(attn=before)
    fasttx.patch(model)
    fasttx.unpatch(model)
    for (name, a), (_, b) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys(), name
    assert vars(model.config) == vars(untouched.config)


def test_an_implementation_chosen_after_patching_is_kept():
    model = bert()
    fasttx.patch(model)
    model.set_attn_implementation("eager")
    fasttx.unpatch(model)
    assert implementations(model) == {"eager"}


def test_patching_in_pieces_and_undoing_in_one():
    model = bert("BertForMaskedLM")
    fasttx.patch(model.bert)
    fasttx.patch(model)
    fasttx.unpatch(model)
    assert implementations(model) == {"sdpa"}
    fasttx.patch(model)
    fasttx.unpatch(model.bert)
    assert implementations(model) == {"sdpa"}


def test_a_module_that_holds_models():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.other, self.head = bert(), opt(), nn.Linear(35, 2)

    model = Classifier()
    report = fasttx.patch(model)
    assert {e.name.split(".")[0] for e in report.replaced} == {"text"}
    (skipped,) = report.skipped
    assert (skipped.name, skipped.kind) == ("other.decoder.layers.0.self_attn", "OPTAttention")
    assert skipped.reason.startswith("not in fasttx's table (bert, ")
    assert implementations(model.text) == {"fasttx"}
    assert implementations(model.other) == {"sdpa"}
    with pytest.raises(
        NotImplementedError,
        match=r"(?s)changed nothing.*other\.decoder\.layers\.\*\.self_attn.*not in",
    ):
        fasttx.patch(model, strict=True)
    fasttx.unpatch(model)
    assert implementations(model.text) == {"sdpa"}


def test_strict_changes_nothing():
    model = opt()
    with pytest.raises(NotImplementedError, match="1 x OPTAttention"):
        fasttx.patch(model, strict=True)
    assert not fasttx.patch(model).replaced
    assert implementations(model) == {"sdpa"}
    convolutional = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    )
    assert fasttx.patch(convolutional).entries == ()
    with pytest.raises(NotImplementedError, match="no attention module was found"):
        fasttx.patch(convolutional, strict=True)


@pytest.mark.parametrize("do", [fasttx.patch, fasttx.unpatch], ids=["patch", "unpatch"])
def test_what_is_no_model(do):
    for bad in (None, "bert-base-uncased", {"model": 1}, nn.TransformerEncoder):
        with pytest.raises(TypeError, match=f"fasttx.{do.__name__}: model must be"):
            do(bad)
    with pytest.raises(TypeError, match=r"got the class .*BertModel"):
        do(transformers.BertModel)


def test_nothing_to_replace():
    report = fasttx.patch(nn.Linear(2, 2))
    assert str(report) == "Linear: 0 of 0 modules run fasttx"
    with pytest.raises(NotImplementedError, match="Linear: no attention module was found"):
        fasttx.patch(nn.Linear(2, 2), strict=True)
    fasttx.unpatch(nn.Linear(2, 2))


def test_changed_attention_is_left_alone():
    model = bert()
    own = type(model.encoder.layer[0].attention.self)

    class RenamedAttention(own):
        pass

    class Overridden(own):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    second = model.encoder.layer[1].attention.self
    second.__class__ = RenamedAttention
    assert len(attention(fasttx.patch(model).replaced)) == 2
    fasttx.unpatch(model)
    second.__class__ = Overridden
    entries = {e.name: e for e in fasttx.patch(model).entries}
    names = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert [entries[name].reason for name in names] == [
        "shares its config with encoder.layer.1.attention.self, which cannot be replaced",
        "Overridden overrides the forward of BertSelfAttention",
    ]
    assert implementations(model) == {"sdpa"}
    second.__class__ = own
    second.forward = second.forward
    (skipped,) = [e for e in fasttx.patch(model).skipped if e.name == names[1]]
    assert skipped.reason == "its forward was replaced on the instance"
    second._hf_hook = object()
    assert not fasttx.patch(model).skipped
    large = bert(hidden_size=257, num_attention_heads=1)
    assert "head size 257 is above 256" in fasttx.patch(large).skipped[0].reason


def test_parameters_hooks_and_names_stay():
    model, given = bert("BertForMaskedLM"), batch(padding="left")
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    modules = [id(m) for m in model.modules()]
    names = dict(model.named_parameters()).keys()
    calls = []
    attention = model.bert.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda *a: calls.append("after"))
    attention.query.register_forward_pre_hook(lambda *a: calls.append("before"))
    fasttx.patch(model)
    output(model, given)
    assert calls == ["before", "after"]
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert [id(m) for m in model.modules()] == modules
    assert dict(model.named_parameters()).keys() == names


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched_and_can_be_unpatched(copier):
    model, given = bert(), batch()
    fasttx.patch(model)
    twin = copier(model)
    assert implementations(twin) == {"fasttx"}
    assert torch.equal(output(twin, given), output(model, given))
    fasttx.unpatch(twin)
    assert implementations(twin) == {"sdpa"}
    assert implementations(model) == {"fasttx"}


def test_saving_and_loading(tmp_path):
    model, given = roberta(), batch("roberta")
    model.save_pretrained(tmp_path / "before")
    fasttx.patch(model)
    model.save_pretrained(tmp_path / "after")
    configs = [(tmp_path / n / "config.json").read_text() for n in ("before", "after")]
    assert configs[0] == configs[1]
    assert "fasttx" not in json.loads(configs[1]).values()
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("before", "after")]
    assert weights[0] == weights[1]
    plain = transformers.RobertaModel.from_pretrained(tmp_path / "after")
    assert implementations(plain) == {"sdpa"}
    named = transformers.RobertaModel.from_pretrained(
        tmp_path / "after", attn_implementation="fasttx"
    )
    torch.testing.assert_close(output(named, given), output(model, given))
    assert len(attention(fasttx.patch(named).replaced)) == 2
    fasttx.unpatch(named)
    assert implementations(named) == {"fasttx"}  # chosen by name, not by patch


@pytest.mark.parametrize("model_type", BERT_LIKE)
def test_every_family_of_the_table(model_type):
    """Its attention is BERT's, word for word, and the patched model gives the same answers."""
    file, prefix = BERT_LIKE[model_type]
    module = importlib.import_module(f"transformers.models.{file}")
    reference = importlib.import_module("transformers.models.bert.modeling_bert")

    def text(module, prefix, kind):
        source = ast.unparse(ast.parse(inspect.getsource(getattr(module, prefix + kind))))
        return source.replace(prefix, "Bert")

    kinds = ["SelfAttention", "CrossAttention"]
    if BERT_LIKE[model_type] in BERT_POST_NORM:
        kinds += ["SelfOutput", "Intermediate", "Output", "Layer"]
    for kind in kinds:
        same = text(module, prefix, kind) == text(reference, "Bert", kind)
        assert same, f"{prefix}{kind} is no longer BERT's"
    extra = {
        "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    }.get(model_type, {})
    # not the classes' own name: ErnieModel, but BertGenerationEncoder
    config_cls = transformers.AutoConfig.for_model(model_type).__class__
    name = {"bert-generation": "BertGenerationEncoder"}.get(model_type, f"{prefix}Model")
    model = getattr(module, name)(tiny(config_cls, **extra)).eval()
    assert model.config.model_type == model_type
    given = {"input_ids": torch.randint(3, 61, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    given["attention_mask"][1, 6:] = 0
    expected = output(model, given)
    assert len(attention(fasttx.patch(model, strict=True).replaced)) == 1
    torch.testing.assert_close(output(model, given), expected, rtol=1e-5, atol=1e-5)


def test_import_and_registration():
    """import fasttx imports no transformers; the name is there whichever comes first."""
    code = """
import sys, fasttx
assert not any(m.split(".")[0] == "transformers" for m in sys.modules)
finders = len(sys.meta_path)
try:
    fasttx.patch(None)
except TypeError:
    pass
import torch
assert not fasttx.patch(torch.nn.Linear(1, 1)).entries
assert not any(m.split(".")[0] == "transformers" for m in sys.modules)
from transformers import BertConfig, BertModel
config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
model = BertModel._from_config(config, attn_implementation="fasttx")
assert model.config._attn_implementation == "fasttx"
assert "fasttx.integrations._on_import" not in {type(f).__module__ for f in sys.meta_path}
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
assert "fasttx" in ALL_MASK_ATTENTION_FUNCTIONS
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_after_an_import(tmp_path, monkeypatch):
    """Right after the module, once, also after an import that failed; at once if it is there."""
    (tmp_path / "fasttx_first.py").write_text(
        "import os\n"
        "if os.environ.get('FASTTX_TEST_FAIL'):\n"
        "    raise ImportError('not today')\n"
        "ready = 1\n"
    )
    (tmp_path / "fasttx_then.py").write_text("import fasttx_first\nseen = fasttx_first.ready\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fasttx_first", "fasttx_then"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finders = list(sys.meta_path)
    _on_import.after("fasttx_first", "fasttx_then")
    _on_import.after("fasttx_first", "fasttx_then")
    assert len(sys.meta_path) == len(finders) + 1
    monkeypatch.setenv("FASTTX_TEST_FAIL", "1")
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("fasttx_first")
    assert "fasttx_then" not in sys.modules
    monkeypatch.delenv("FASTTX_TEST_FAIL")
    first = importlib.import_module("fasttx_first")
    assert sys.modules["fasttx_then"].seen == 1
    assert type(first.__loader__).__module__ != _on_import.__name__
    assert sys.meta_path == finders
    del sys.modules["fasttx_then"]
    _on_import.after("fasttx_first", "fasttx_then")
    assert "fasttx_then" in sys.modules
    assert sys.meta_path == finders
    (tmp_path / "fasttx_broken.py").write_text("raise ImportError('needs another version')\n")
    with pytest.warns(RuntimeWarning, match="fasttx_broken does not work with fasttx_first: needs"):
        _on_import.after("fasttx_first", "fasttx_broken")


def test_gradients_after_unpatch_are_the_models_own():
    model, given = bert(), batch(padding="left")
    before = gradients(model, given)
    fasttx.patch(model)
    fasttx.unpatch(model)
    after = gradients(model, given)
    assert all(torch.equal(before[n], after[n]) for n in before)
