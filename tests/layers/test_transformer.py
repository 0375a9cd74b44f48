"""fasttx.nn's encoder and decoder layers, their stacks and the Transformer beside torch's."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasttx.layers as fnn
from fasttx.testing import recorded_calls

from .compare import configurations, run, same, twin
from .test_attention import masks

LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
CLASSES = (*LAYERS, "TransformerEncoder", "TransformerDecoder", "Transformer")
ACTIVATIONS = ("relu", "gelu", F.relu, F.gelu, F.silu, nn.GELU("tanh"), nn.ReLU(), torch.tanh)


@pytest.fixture(autouse=True)
def _quiet():
    """torch's constructors warn where torch would not use nested tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        yield


def layer_options(rng, layers=True):
    H = rng.choice((1, 2, 3))
    options = {
        "d_model": H * rng.choice((4, 8, 12)),
        "nhead": H,
        "dim_feedforward": rng.choice((1, 7, 32)),
        "dropout": 0.0,
        "activation": rng.choice(ACTIVATIONS if layers else ACTIVATIONS[:4]),
        "layer_norm_eps": rng.choice((1e-5, 1e-3)),
        "batch_first": rng.random() < 0.5,
        "norm_first": rng.random() < 0.5,
        "bias": rng.random() < 0.7,
        "dtype": rng.choice((torch.float32, torch.bfloat16)),
    }
    return options


def tokens(options, B, S, batched=True):
    shape = (B, S) if options["batch_first"] else (S, B)
    return torch.randn((*(shape if batched else (S,)), options["d_model"]), dtype=options["dtype"])


def pair(name, *args, **options):
    # Modules that are options are shared otherwise, and .double() would reach both.
    options = copy.deepcopy(options)
    return getattr(fnn, name)(*args, **options), getattr(nn, name)(*copy.deepcopy(args), **options)


def ready(rng, ours, theirs):
    twin(ours, theirs)
    training = rng.random() < 0.5
    return ours.train(training), theirs.train(training)


@configurations
def test_encoder_layer(rng):
    options = layer_options(rng)
    ours, theirs = ready(rng, *pair("TransformerEncoderLayer", **options))
    batched, B, S = rng.random() < 0.85, rng.randint(1, 3), rng.randint(1, 9)
    given = masks(rng, B, options["nhead"], S, S, options["dtype"], batched)
    given = {_source(name): value for name, value in given.items()}
    same(ours, theirs, {"src": tokens(options, B, S, batched)}, given)


def _source(name):
    return {"key_padding_mask": "src_key_padding_mask", "attn_mask": "src_mask"}.get(name, name)


@configurations
def test_decoder_layer(rng):
    options = layer_options(rng)
    ours, theirs = ready(rng, *pair("TransformerDecoderLayer", **options))
    B, S, T, batched = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9), rng.random() < 0.85
    H, dtype = options["nhead"], options["dtype"]
    given = _decoder_masks(rng, B, H, S, T, dtype, batched)
    inputs = {
        "tgt": tokens(options, B, S, batched),
        "memory": tokens(options, B, T, batched),
    }
    same(ours, theirs, inputs, given)


def _decoder_masks(rng, B, H, S, T, dtype, batched=True):
    own = masks(rng, B, H, S, S, dtype, batched)
    cross = masks(rng, B, H, S, T, dtype, batched, causal=False)
    names = {"key_padding_mask": "key_padding_mask", "attn_mask": "mask", "is_causal": "is_causal"}
    return {
        f"{side}_{names[name]}": value
        for side, given in (("tgt", own), ("memory", cross))
        for name, value in given.items()
    }


@configurations
def test_encoder(rng):
    options = layer_options(rng)
    stack = {"num_layers": rng.randint(1, 2), "enable_nested_tensor": rng.random() < 0.7}
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**copy.deepcopy(options)),
        norm=_final_norm(rng, nn, options),
        **stack,
    )
    ours = fnn.TransformerEncoder(
        fnn.TransformerEncoderLayer(**copy.deepcopy(options)),
        norm=theirs.norm and fnn.LayerNorm(options["d_model"], dtype=options["dtype"]),
        **stack,
    )
    ours, theirs = ready(rng, ours, theirs)
    batched, B, S = rng.random() < 0.9, rng.randint(1, 4), rng.randint(1, 9)
    given = masks(rng, B, options["nhead"], S, S, options["dtype"], batched)
    if given.get("is_causal"):
        given["is_causal"] = rng.choice((True, None))
    given = {
        {"attn_mask": "mask", "key_padding_mask": "src_key_padding_mask"}.get(n, n): v
        for n, v in given.items()
    }
    shown = None
    hidden = given.get("src_key_padding_mask")
    if hidden is not None and hidden.dtype is torch.bool:
        shown = ~(hidden.t() if batched and not options["batch_first"] else hidden)[..., None]
    same(ours, theirs, {"src": tokens(options, B, S, batched)}, given, shown)


def _final_norm(rng, module, options):
    if rng.random() < 0.5:
        return None
    return module.LayerNorm(options["d_model"], dtype=options["dtype"])


@configurations
def test_decoder(rng):
    options = layer_options(rng)
    layers = rng.randint(1, 2)
    theirs = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(**copy.deepcopy(options)), layers, _final_norm(rng, nn, options)
    )
    ours = fnn.TransformerDecoder(
        fnn.TransformerDecoderLayer(**copy.deepcopy(options)),
        layers,
        theirs.norm and fnn.LayerNorm(options["d_model"], dtype=options["dtype"]),
    )
    ours, theirs = ready(rng, ours, theirs)
    B, S, T = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
    given = _decoder_masks(rng, B, options["nhead"], S, T, options["dtype"])
    same(ours, theirs, {"tgt": tokens(options, B, S), "memory": tokens(options, B, T)}, given)


@configurations
def test_transformer(rng):
    options = layer_options(rng, layers=False) | {
        "num_encoder_layers": rng.randint(0, 2),
        "num_decoder_layers": rng.randint(1, 2),
    }
    options["num_encoder_layers"] = max(1, options["num_encoder_layers"])
    ours, theirs = ready(rng, *pair("Transformer", **options))
    B, S, T = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
    H, dtype = options["nhead"], options["dtype"]
    given = _decoder_masks(rng, B, H, S, T, dtype)
    given.pop("memory_is_causal", None)
    hidden = torch.rand(B, T) < 0.3
    hidden[:, 0] = False
    if rng.random() < 0.5:
        # Padding of the source is hidden from the decoder too; what stands there is undefined.
        given["src_key_padding_mask"] = hidden
        given["memory_key_padding_mask"] = hidden
        given.pop("memory_mask", None)
    same(ours, theirs, {"src": tokens(options, B, T), "tgt": tokens(options, B, S)}, given)


@pytest.mark.parametrize("norm_first", [True, False])
def test_bf16_error_is_no_larger_than_torchs(norm_first):
    options = {"activation": "gelu", "dropout": 0.0, "norm_first": norm_first, "batch_first": True}
    ratios = {}
    for seed in range(15):
        torch.manual_seed(seed)
        ours, theirs = pair("TransformerEncoderLayer", 32, 2, 64, dtype=torch.bfloat16, **options)
        twin(ours, theirs)
        x = torch.randn(2, 6, 32, dtype=torch.bfloat16)
        gold = run(copy.deepcopy(theirs).double(), {"src": x.double()}, {}, None)
        for (name, value), (_, a), (_, b) in zip(
            gold,
            run(ours, {"src": x}, {}, None),
            run(theirs, {"src": x}, {}, None),
            strict=True,
        ):
            ratios.setdefault(name, []).append((a - value).norm() / (b - value).norm())
    worst = {name: torch.stack(found).median().item() for name, found in ratios.items()}
    assert max(worst.values()) <= 1.1, worst


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name):
    ours, theirs = getattr(fnn, name), getattr(nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("name", [*LAYERS, "Transformer"])
def test_constructor_draws_torchs_values_and_shows_the_same(name):
    made = []
    for module in (fnn, nn):
        torch.manual_seed(5)
        options = {"num_encoder_layers": 1, "num_decoder_layers": 1} if "L" not in name else {}
        made.append(getattr(module, name)(d_model=8, nhead=2, dim_feedforward=16, **options))
    ours, theirs = (m.state_dict() for m in made)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert repr(made[0]) == repr(made[1])


def encoder(**options):
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True} | options
    return fnn.TransformerEncoder(fnn.TransformerEncoderLayer(**options), 2)


@pytest.mark.parametrize("gradients", [True, False])
def test_padding_is_removed_once_and_comes_back_zero(gradients):
    model = encoder(dropout=0.0)
    x = torch.randn(3, 6, 8)
    x[0, 3:] = torch.nan
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[0, 3:] = hidden[1, :2] = hidden[2, 2:4] = True
    with torch.set_grad_enabled(gradients), recorded_calls() as calls:
        out = model(x, src_key_padding_mask=hidden)
    assert [a[0].shape[2] for op, a, _ in calls if op.name == "attention_fwd"] == [11, 11]
    assert not out[hidden].any() and out.isfinite().all()
    for b in range(3):
        alone = model(x[b : b + 1, ~hidden[b]])[0]
        torch.testing.assert_close(out[b, ~hidden[b]], alone)


@pytest.mark.parametrize("why", ["mask", "flag", "floating", "nothing hidden"])
def test_padding_stays_where_it_cannot_or_need_not_go(why):
    model = encoder(dropout=0.0)
    x, hidden = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    hidden[0, 1:] = why != "nothing hidden"
    given = {"src_key_padding_mask": hidden}
    if why == "mask":
        given["mask"] = torch.rand(6, 6) < 0.2
        given["mask"][:, 0] = False
    elif why == "floating":
        given["src_key_padding_mask"] = torch.zeros(2, 6).masked_fill(hidden, -torch.inf)
    model.enable_nested_tensor = why != "flag"
    with recorded_calls() as calls:
        model(x, **given)
    sizes = {(a[0].shape[0], a[0].shape[2]) for op, a, _ in calls if op.name == "attention_fwd"}
    assert sizes == {(2, 6)}


def test_a_causal_mask_is_seen_as_one_and_not_read():
    model = encoder(dropout=0.0)
    x = torch.randn(2, 6, 8)
    out = model(x, mask=nn.Transformer.generate_square_subsequent_mask(6))
    for given in (
        {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
        {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    ):
        with recorded_calls() as calls:
            torch.testing.assert_close(model(x, **given), out)
        assert all(a[3] is None for op, a, _ in calls if op.name == "attention_fwd")


def test_hooks_and_replaced_parts_are_heard():
    layer = fnn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, seen = torch.randn(2, 4, 8), []
    before = layer(x)
    handle = layer.linear1.register_forward_hook(lambda *a: seen.append(1))
    torch.testing.assert_close(layer(x), before)
    assert seen == [1]
    handle.remove()
    layer.norm1 = nn.Identity()
    assert not torch.allclose(layer(x), before)

    class Doubled(fnn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    other = Doubled(8, 2, 16, dropout=0.0, batch_first=True)
    plain = fnn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain.load_state_dict(other.state_dict())
    assert not torch.allclose(other(x), plain(x))


def test_parts_can_be_frozen_and_dropout_switched_one_by_one():
    layer = fnn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    x = torch.randn(2, 4, 8)
    layer.eval()
    still = layer(x)
    layer.dropout1.train()
    assert not torch.equal(layer(x), still)
    for p in layer.self_attn.parameters():
        p.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.self_attn.in_proj_weight.grad is None and layer.linear1.weight.grad is not None


def test_dropout_is_right_on_average():
    """The last addition before the norm: E[x + dropout(f)] = x + f, by the pre-norm layer."""
    layer = fnn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, norm_first=True)
    x = torch.randn(1, 3, 8)
    for part in (layer.self_attn, layer.dropout, layer.dropout1):
        part.eval()
    expected = copy.deepcopy(layer).eval()(x).detach()
    draws = torch.stack([layer(x).detach() for _ in range(400)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 20 + 1e-6)
    assert error.max() < 5
    torch.manual_seed(4)
    first = layer.train()(x)
    torch.manual_seed(4)
    assert torch.equal(layer(x), first)


def test_custom_parts_of_a_transformer_stay_as_they_are():
    custom = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
    model = fnn.Transformer(8, 2, 1, 1, 16, custom_encoder=custom)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0].multihead_attn) is fnn.MultiheadAttention


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.Transformer(8, 2, 1, 1, 16)(torch.zeros(3, 2, 8), torch.zeros(3, 1, 8)),
        lambda m: m.Transformer(8, 2, 1, 1, 16)(torch.zeros(3, 2, 7), torch.zeros(3, 2, 7)),
        lambda m: m.TransformerEncoderLayer(8, 2, 16)(torch.zeros(3, 2, 7)),
        lambda m: m.TransformerEncoderLayer(8, 2, 16)(torch.zeros(3, 2, 8), is_causal=True),
        lambda m: m.TransformerEncoderLayer(8, 2, 16)(torch.zeros(3, 2, 8), torch.zeros(2, 2)),
        lambda m: m.TransformerEncoderLayer(8, 2, 16, activation="swish"),
        lambda m: m.TransformerEncoderLayer(8, 3, 16),
        lambda m: m.TransformerDecoderLayer(8, 2, 16)(torch.zeros(3, 2, 8), torch.zeros(4, 1, 8)),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(call):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(nn)
    with pytest.raises(type(theirs.value)) as ours:
        call(fnn)
    assert str(ours.value) == str(theirs.value)


def test_copies_pickles_and_compiles():
    layer = fnn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 4, 8)
    hidden = torch.tensor([[False] * 4, [False, False, True, True]])
    out = layer(x, src_key_padding_mask=hidden)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
    ):
        torch.testing.assert_close(other(x, src_key_padding_mask=hidden), out)


def test_nested_tensors_run_on_torch():
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    ours, theirs = (m.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval() for m in (fnn, nn))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for a, b in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises((AssertionError, RuntimeError)):
        ours.train()(nested)
