"""`patch(model, unpad=True)`: encoders without the padding, against transformers and fp64."""

import copy
import pickle

import pytest
import torch

import fasttx

from .hf_models import (
    bart,
    batch,
    bert,
    floating,
    gpt2,
    gradients,
    hold,
    hold_gradients,
    output,
    roberta,
    t5,
    triple,
)
from .test_hf_losses import HEADS, labelled

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.attention runs on the plain PyTorch"),
    pytest.mark.usefixtures("reference_allowed"),
]


ENCODERS = {
    "bert": bert,
    "roberta": roberta,
    "t5": lambda **options: t5("T5EncoderModel", **options),
    "bart": lambda **options: bart("BartModel", **options).encoder.eval(),
}
every = pytest.mark.parametrize("kind", ENCODERS)


def given(kind: str, padding: str) -> dict:
    """A batch; with holes a row of padding alone too."""
    found = batch("bert" if kind == "bert" else "", "right" if padding == "holes" else padding)
    if padding == "holes":
        mask = (
            torch.rand(found["input_ids"].shape, generator=torch.Generator().manual_seed(5)) < 0.5
        )
        mask[0, :2] = True
        mask[1] = False
        found["attention_mask"] = mask.long()
    return found


def unpadded(model: torch.nn.Module) -> torch.nn.Module:
    ours = copy.deepcopy(model)
    fasttx.patch(ours, strict=True, unpad=True)
    return ours


def packs(model, batch: dict, **arguments) -> bool:
    """Whether the layers saw no padding: what comes out there is 0."""
    hidden = batch["attention_mask"] == 0
    assert hidden.any()
    with torch.no_grad():
        return not model(**batch, **arguments).last_hidden_state[hidden].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@every
def test_outputs_and_gradients(kind, padding, dtype):
    _, theirs, exact = triple(ENCODERS[kind](), dtype)
    ours = unpadded(theirs)
    batch = given(kind, padding)
    low, wide = floating(batch, dtype), floating(batch, torch.float64)
    with torch.no_grad():
        hold("output", output(ours, low), output(theirs, low), output(exact, wide))
    hold_gradients(
        *(gradients(m.train(), g) for m, g in ((ours, low), (theirs, low), (exact, wide)))
    )
    assert packs(ours.eval(), batch) is not (kind == "t5" and padding == "holes")


def test_families_of_berts_code():
    """Each has an encoder of its own class, which takes the packed batch."""
    from fasttx.integrations.hf_families import ENCODERS as known

    tried = 0
    for path in known:
        module, name = path.split(".")[1:]
        package = path.split(".")[0]
        if not name.endswith("Encoder") or package in ("bart", "data2vec"):
            continue
        theirs = getattr(transformers.models, package)
        config = next(
            getattr(theirs, n) for n in dir(theirs) if n.endswith("Config") and "Onnx" not in n
        )
        prefix = name.removesuffix("Encoder")
        torch.manual_seed(1)
        model = getattr(theirs, f"{prefix}Model")._from_config(
            config(vocab_size=61, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
                   intermediate_size=48, max_position_embeddings=48, pad_token_id=1,
                   enable_pronunciation=False, enable_shape=False)
        ).eval()  # fmt: skip
        batch = given("roberta", "right")
        ours = unpadded(model)
        assert packs(ours, batch), path
        seen = batch["attention_mask"].bool()
        with torch.no_grad():
            got, plain = (m(**batch).last_hidden_state[seen] for m in (ours, model))
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5, msg=path)
        tried += 1
    assert tried >= 6


@every
def test_what_would_see_the_difference_keeps_the_padding(kind):
    theirs, batch = ENCODERS[kind](), given(kind, "right")
    ours = unpadded(theirs)
    padded = copy.deepcopy(theirs)
    fasttx.patch(padded, strict=True)
    assert packs(ours, batch)
    assert not packs(padded, batch)
    with torch.no_grad():
        a, b = (m(**batch, output_hidden_states=True) for m in (ours, padded))
        assert len(a.hidden_states) == len(b.hidden_states) > 1
        assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))
        a, b = (m(**batch, output_attentions=True) for m in (ours, padded))
        assert all(torch.equal(x, y) for x, y in zip(a.attentions, b.attentions, strict=True))
        assert packs(ours, batch)  # the hooks that collected them stay, and say nothing
        a, b = (m(**batch, return_dict=False) for m in (ours, padded))
        assert isinstance(a, tuple)
        torch.testing.assert_close(*(x[0][batch["attention_mask"] > 0] for x in (a, b)))
    shapes = []
    part = next(m for n, m in ours.named_modules() if n.endswith(("intermediate", "fc1", "wi_0")))
    handle = part.register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    assert not packs(ours, batch)
    assert shapes == [batch["input_ids"].shape]
    handle.remove()
    ours.set_attn_implementation("eager")
    assert not packs(ours, batch)


@every
def test_nothing_or_little_hidden(kind):
    ours, batch = unpadded(ENCODERS[kind]()), given(kind, "none")
    padded = copy.deepcopy(ours)
    fasttx.unpatch(padded)
    fasttx.patch(padded)
    full = torch.ones_like(batch["input_ids"])
    one = full.clone()
    one[0, -1] = 0
    with torch.no_grad():
        for mask in (None, full, one):
            a, b = (m(**batch, attention_mask=mask).last_hidden_state for m in (ours, padded))
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "bart"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_loss_of_a_step(kind, checkpointing):
    """Labels of real tokens alone: the same loss and gradients, checkpointed (reentrant) or not."""
    theirs = HEADS[kind]().train()
    ours = unpadded(theirs)
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        ours.enable_input_require_grads()
    found, batch = [], labelled(kind)
    assert (batch["attention_mask"] == 0).any()
    for model in (ours, theirs):
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, grad in found[1][1].items():
        if grad is not None:
            torch.testing.assert_close(found[0][1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generate(kind):
    theirs, batch = HEADS[kind](), given(kind, "right")
    ours = unpadded(theirs)
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


@every
def test_unpatch_and_copies(kind):
    theirs, batch = ENCODERS[kind](), given(kind, "right")
    ours = pickle.loads(pickle.dumps(unpadded(theirs)))
    assert packs(ours, batch)
    report = fasttx.patch(ours, unpad=True)
    assert [e.kind for e in report.replaced if e.kind.endswith(("Encoder", "Stack"))]
    fasttx.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert not packs(ours, batch)


def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    batch = given("bert", "right")
    model = peft.get_peft_model(
        bert(), peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    ).eval()
    ours = unpadded(model)
    assert packs(ours, batch)
    torch.testing.assert_close(output(ours, batch), output(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_code_stays_padded():
    torch._dynamo.reset()
    model, batch = bert(), given("bert", "right")
    ours = torch.compile(unpadded(model), backend="eager")
    assert not packs(ours, batch)
    torch.testing.assert_close(output(ours, batch), output(model, batch), rtol=1e-4, atol=1e-5)


def test_models_without_such_an_encoder_are_refused():
    model = gpt2()
    with pytest.raises(ValueError, match=r"unpad=True needs an encoder.*GPT2LMHeadModel has none"):
        fasttx.patch(model, unpad=True)
    assert not any(type(m).__module__.startswith("fasttx.") for m in model.modules())
    with pytest.raises(ValueError, match="unpad=True"):
        fasttx.patch(bert("BertLMHeadModel", is_decoder=True), unpad=True)


def test_an_encoder_with_other_attention_is_reported():
    report = fasttx.patch(
        bert(hidden_size=514, num_attention_heads=2, num_hidden_layers=1), unpad=True
    )
    [encoder] = [e for e in report.entries if e.kind == "BertEncoder"]
    assert encoder.reason == "some of its attention cannot be replaced"
