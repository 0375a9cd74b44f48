"""patch and unpatch of models made of torch.nn's Transformers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fasttx

WIDTH = 24


class Translator(nn.Module):
    """What users write: embeddings, nn.Transformer, a norm and a head."""

    def __init__(self, batch_first=True, dropout=0.0, **options):
        super().__init__()
        self.tokens = nn.Embedding(31, WIDTH)
        self.body = nn.Transformer(
            WIDTH, 3, 2, 2, 40, dropout=dropout, batch_first=batch_first, **options
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 31)

    def forward(self, source, target):
        x, y = (self.tokens(ids) for ids in (source, target))
        if not self.body.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        hidden = self.body(
            x,
            y,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=x.dtype),
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
            tgt_is_causal=True,
        )
        hidden = hidden if self.body.batch_first else hidden.transpose(0, 1)
        return self.head(self.norm(hidden))


def made(**options) -> Translator:
    torch.manual_seed(0)
    return Translator(**options)


def batch():
    g = torch.Generator().manual_seed(1)
    source, target = (torch.randint(1, 31, (3, n), generator=g) for n in (9, 7))
    source[0, 6:] = 0
    return source, target


def loss_of(model) -> torch.Tensor:
    source, target = batch()
    logits = model(source, target[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


OPTIONS = [
    {},
    {"batch_first": False, "norm_first": True},
    {"activation": nn.functional.gelu, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients(options):
    theirs = made(**options).train()
    ours = copy.deepcopy(theirs)
    report = fasttx.patch(ours, strict=True)
    kinds = [e.kind for e in report.replaced]
    assert kinds.count("MultiheadAttention") == 6
    assert kinds.count("TransformerEncoderLayer") == kinds.count("TransformerDecoderLayer") == 2
    assert kinds.count("LayerNorm") == 13
    assert all(
        type(module).__module__.startswith("fasttx.layers")
        for name, module in ours.named_modules()
        if name in {e.name for e in report.replaced}
    )
    for training in (True, False):
        torch.testing.assert_close(
            ours.train(training)(*batch()), theirs.train(training)(*batch()), rtol=1e-4, atol=1e-5
        )
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "copier", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_unpatch_restores_exactly(copier):
    model, untouched = made(), made()
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    report = fasttx.patch(model)
    assert fasttx.patch(model) == report
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert str(model) == str(untouched)
    model = copier(model)
    fasttx.unpatch(model)
    for (name, a), (_, b) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert type(a) is type(b), name
        assert vars(a).keys() == vars(b).keys(), name
    assert torch.equal(loss_of(model), loss_of(untouched))


def test_layers_of_ones_own_stay():
    """fasttx.nn's modules run fasttx already: reported, and not unpatched to torch's."""
    model = nn.Sequential(fasttx.nn.TransformerEncoderLayer(WIDTH, 3, 40), nn.LayerNorm(WIDTH))
    report = fasttx.patch(model)
    assert [e.name for e in report.replaced] == ["1"]
    fasttx.unpatch(model)
    assert type(model[0]) is fasttx.nn.TransformerEncoderLayer
    assert type(model[0].norm1) is fasttx.nn.LayerNorm
    assert type(model[1]) is nn.LayerNorm


def test_what_is_not_replaced():
    class Noisy(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) + 1

    model = nn.ModuleDict(
        {
            "noisy": Noisy(WIDTH, 3, 40),
            "wide": nn.MultiheadAttention(600, 2),
            "held": nn.MultiheadAttention(WIDTH, 3),
        }
    )
    model["held"].forward = model["held"].forward
    reasons = {e.name: e.reason for e in fasttx.patch(model).skipped}
    assert reasons == {
        "noisy": "Noisy is a subclass of TransformerEncoderLayer, the class that is replaced",
        "wide": "its head size 300 is above 256, the kernels' largest",
        "held": "its forward was replaced on the instance",
    }
    with pytest.raises(NotImplementedError, match=r"(?s)changed nothing.*Noisy is a subclass"):
        fasttx.patch(model, strict=True)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(
        model["noisy"].eval()(x), copy.deepcopy(model["noisy"])(x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("training", [False, True])
def test_hooks(training):
    """Every module whose hooks run unpatched has them run patched, forward and backward."""
    calls = []
    for patched in (False, True):
        model = made().train(training)
        if patched:
            fasttx.patch(model, strict=True)
        seen = [set(), set()]
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *a, n=name, s=seen[0]: s.add(n))
            if name:
                module.register_full_backward_hook(lambda *a, n=name, s=seen[1]: s.add(n))
        gradients(model)
        calls.append(seen)
    assert calls[0][0] <= calls[1][0]
    assert calls[0][1] <= calls[1][1]


@pytest.mark.parametrize("place", range(2))
def test_a_backward_hook_on_a_layer(place):
    model = made()
    fasttx.patch(model, strict=True)
    seen = []
    model.body.encoder.layers[place].register_full_backward_hook(lambda *a: seen.append(1))
    gradients(model)
    assert seen == [1]


def test_in_one_model_with_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_attention_heads=3, num_hidden_layers=1, intermediate_size=32
    )
    model = nn.ModuleDict(
        {"text": transformers.BertModel(config), "mixer": nn.TransformerEncoderLayer(WIDTH, 3, 40)}
    )
    report = fasttx.patch(model, strict=True)
    names = [e.name for e in report.replaced]
    assert len(set(names)) == len(names)
    assert names.index("text.encoder.layer.0.attention.self") < names.index("mixer.self_attn")
    assert type(model["mixer"]) is fasttx.nn.TransformerEncoderLayer
    fasttx.unpatch(model)
    assert type(model["mixer"].self_attn) is nn.MultiheadAttention
    assert type(model["text"].embeddings.LayerNorm) is nn.LayerNorm


def test_compile():
    model = made().eval()
    expected = loss_of(model)
    fasttx.patch(model, strict=True)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_32_training_steps(dtype, monkeypatch):
    """Losses after 32 steps of AdamW: no further from fp64 than 1.5 x the unpatched model's."""
    monkeypatch.delenv("FASTTX_STRICT", raising=False)  # fp64 runs on the reference

    def train(model, patched):
        if patched:
            fasttx.patch(model, strict=True)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, eps=1e-4)
        losses = []
        for _ in range(32):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    ours, theirs = (train(made().to(dtype), patched) for patched in (True, False))
    exact = train(made().to(dtype).double(), False)
    assert ours[-1] < 0.97 * ours[0]
    errors = [(x - exact).square().mean().sqrt().item() for x in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps, errors


def test_dropout_leaves_the_mean_loss():
    """The means over 20 seeds agree within two standard errors, and the losses do vary."""
    model, losses = made(dropout=0.2).train(), []
    with torch.no_grad():
        for patched in (False, True):
            if patched:
                fasttx.patch(model, strict=True)
            drawn = []
            for seed in range(20):
                torch.manual_seed(1000 + seed)
                drawn.append(loss_of(model).double())
            losses.append(torch.stack(drawn))
    error = (losses[0].var() + losses[1].var()).div(20).sqrt()
    assert error > 0
    assert (losses[0].mean() - losses[1].mean()).abs() <= 2 * error
