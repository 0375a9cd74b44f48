"""What else a model goes through, patched: a row a family, a test a cell.

Elsewhere: outputs, options, caches, generate (static cache too) and output_attentions in
test_hf_models.py and test_hf_families.py; losses, autocast and 32 training steps in
test_hf_losses.py. LoRA needs peft, the Trainer accelerate; without them those cells are skipped.
"""

import copy
import json
import pickle

import pytest
import torch

import fasttx

from .hf_models import FAMILIES, MODELS
from .test_hf_losses import HEADS, labelled

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

KINDS = (*MODELS, *FAMILIES)
every = pytest.mark.parametrize("kind", KINDS)


def loss_of(model, kind) -> torch.Tensor:
    return model(**labelled(kind)).loss


def gradients(model, kind) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, kind).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def pair(kind, **options):
    theirs = HEADS[kind](**options).train()
    ours = copy.deepcopy(theirs)
    fasttx.patch(ours, strict=True)
    return ours, theirs


def same(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@every
def test_names_and_classes(kind):
    ours, theirs = pair(kind)
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    assert list(dict(ours.named_buffers())) == list(dict(theirs.named_buffers()))
    for (a, x), (b, y) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert a == b
        assert isinstance(x, type(y))
        assert type(x).__name__ == type(y).__name__  # what sharding and device maps go by
        assert str(x) == str(y)


@every
def test_state_dict(kind):
    ours, theirs = pair(kind)
    before = {k: v.data_ptr() for k, v in theirs.state_dict().items()}
    fasttx.patch(theirs)
    assert {k: v.data_ptr() for k, v in theirs.state_dict().items()} == before
    fasttx.unpatch(theirs)
    state = {k: v + 0.25 for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    torch.testing.assert_close(loss_of(ours, kind), loss_of(theirs, kind), rtol=1e-4, atol=1e-5)


@every
def test_hooks(kind):
    """Every module whose hooks run unpatched has them run patched, forward and backward."""
    calls = []
    for model in pair(kind):
        seen = [set(), set()]
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *a, n=name, s=seen[0]: s.add(n))
            if name and not list(module.children()):
                module.register_full_backward_hook(lambda *a, n=name, s=seen[1]: s.add(n))
        gradients(model, kind)
        calls.append(seen)
    assert calls[0] == calls[1]


@every
def test_save_pretrained(kind, tmp_path):
    ours, theirs = pair(kind)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    loaded = type(theirs).from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(loss_of(loaded, kind), loss_of(theirs, kind))
    assert fasttx.patch(loaded, strict=True).replaced


@every
def test_unpatch_restores_exactly(kind):
    model, untouched = HEADS[kind](), HEADS[kind]()
    report = fasttx.patch(model, strict=True, logits=True)
    assert fasttx.patch(model, strict=True) == report  # twice is once
    loss_of(model, kind)
    fasttx.unpatch(model)
    loss_of(untouched, kind)
    for (name, a), (_, b) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert type(a) is type(b), name
        assert vars(a).keys() == vars(b).keys(), name
        if hasattr(a, "config"):
            assert vars(a.config) == vars(b.config), name
    theirs, ours = gradients(untouched, kind), gradients(model, kind)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(kind, how):
    ours, _ = pair(kind)
    twin = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(loss_of(twin, kind), loss_of(ours, kind))
    fasttx.unpatch(twin)
    assert not any(type(m).__module__.startswith("fasttx.") for m in twin.modules())
    assert any(type(m).__module__.startswith("fasttx.") for m in ours.modules())


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    ours, theirs = pair(kind)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()  # as transformers does for frozen embeddings
    same(gradients(ours, kind), gradients(theirs, kind))


COMPILED = [k if k == "gpt2" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", COMPILED)
def test_compile(kind):
    """One graph, forward and backward, with fasttx's ops in it."""
    torch._dynamo.reset()
    one = {"t5": "num_layers", "gpt2": "n_layer", "bloom": "n_layer"}.get(kind, "num_hidden_layers")
    options = {"encoder_layers": 1, "decoder_layers": 1} if kind == "bart" else {one: 1}
    ours, theirs = pair(kind, **options)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    ours.config.use_cache = theirs.config.use_cache = False
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    got = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, kind).items()}
    same(got, gradients(theirs, kind))
    assert not any("scaled_dot_product" in target for target in seen)


TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn", "c_fc"],
    "bart": ["q_proj", "v_proj", "fc1"],
    "t5": ["q", "v", "wi_0"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "llama": ["q_proj", "v_proj", "gate_proj"],
}


@every
@pytest.mark.parametrize("first", ["patched first", "adapted first"])
def test_lora(kind, first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    models = []
    for patched in (True, False):
        model = HEADS[kind]()
        if patched and first == "patched first":
            fasttx.patch(model, strict=True)
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=TARGETS[kind], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if patched and first == "adapted first":
            assert not fasttx.patch(model).skipped
        models.append(model.train())
    ours, theirs = models
    torch.testing.assert_close(loss_of(ours, kind), loss_of(theirs, kind), rtol=1e-5, atol=1e-6)
    grads = gradients(ours, kind)
    assert grads
    assert all("lora" in name for name in grads)
    same(grads, gradients(theirs, kind))


@every
def test_accelerate(kind):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    ours, theirs = pair(kind)
    wrapped, optimizer = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), 0.1))
    accelerator.backward(loss_of(wrapped, kind))
    same({n: p.grad for n, p in ours.named_parameters()}, gradients(theirs, kind))
    optimizer.step()
    accelerate.hooks.add_hook_to_module(theirs, accelerate.hooks.ModelHook(), append=True)
    skipped = {e.name: e.reason for e in fasttx.patch(theirs).skipped}
    assert "patch the model before it is dispatched" in skipped[""]


@every
def test_trainer(kind, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    given = labelled(kind)
    rows = [{k: v[i] for k, v in given.items()} for i in range(3)] * 2
    results = []
    for model in pair(kind):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
    assert len(results[0]) == 3
    assert results[0] == pytest.approx(results[1], rel=1e-4)
