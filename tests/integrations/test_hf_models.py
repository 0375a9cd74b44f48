"""Patched models against unpatched ones and fp64, on small random BERT and RoBERTa models."""

from itertools import pairwise

import pytest
import torch

import fasttx

from .hf_models import (
    CAUSAL,
    DTYPES,
    MODELS,
    batch,
    bert,
    floating,
    gradients,
    hold,
    hold_gradients,
    output,
    roberta,
    triple,
    visible,
)

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.attention runs on the plain PyTorch"),
    pytest.mark.usefixtures("reference_allowed"),
]


def compare(model, given, dtype, *, backward=False):
    ours, theirs, exact = triple(model, dtype)
    low, wide = floating(given, dtype), floating(given, torch.float64)
    with torch.no_grad():
        hold("output", output(ours, low), output(theirs, low), output(exact, wide))
    if backward:
        grads = (gradients(m.train(), g) for m, g in ((ours, low), (theirs, low), (exact, wide)))
        hold_gradients(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_encoder(kind, padding, dtype):
    compare(MODELS[kind](), batch(kind, padding), dtype, backward=True)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 64, "num_attention_heads": 4},
        {"hidden_size": 33, "num_attention_heads": 1},
        {"hidden_size": 12, "num_attention_heads": 12},
        {"hidden_size": 272, "num_attention_heads": 2, "num_hidden_layers": 1},
    ],
    ids=lambda o: f"{o['hidden_size']}x{o['num_attention_heads']}",
)
def test_head_sizes(options):
    compare(bert(**options), batch(padding="left", rows=2), torch.float32, backward=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (5, 2)], ids=str)
def test_lengths(shape):
    compare(bert(), batch(padding="right", rows=shape[0], length=shape[1]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_causal_decoder(kind, padding, dtype):
    model = MODELS[kind](CAUSAL[kind], is_decoder=True, use_cache=False)
    compare(model, batch(kind, padding), dtype, backward=True)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_cross_attention(kind, padding):
    model = MODELS[kind](CAUSAL[kind], is_decoder=True, add_cross_attention=True, use_cache=False)
    g = torch.Generator().manual_seed(4)
    given = batch(kind, padding)
    given["encoder_hidden_states"] = torch.randn(3, 6, 35, generator=g)
    if padding != "none":
        given["encoder_attention_mask"] = batch(padding=padding, length=6)["attention_mask"]
    compare(model, given, torch.float32, backward=True)
    compare(model, given, torch.bfloat16)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_cache(kind, padding, cross):
    """Prefill, then four tokens at once, then one by one: as the whole sequence in one call."""
    model = MODELS[kind](CAUSAL[kind], is_decoder=True, add_cross_attention=cross)
    fasttx.patch(model, strict=True)
    given, extra = batch(kind, padding), {}
    if cross:
        extra["encoder_hidden_states"] = torch.randn(3, 6, 35)
        extra["encoder_attention_mask"] = batch(padding="right", length=6)["attention_mask"]
    mask = given.get("attention_mask", torch.ones(3, 11).long())
    at = (mask.cumsum(1) * mask + 1) if kind == "roberta" else torch.arange(11).expand(3, 11)
    with torch.no_grad():
        whole = model(**given, **extra, position_ids=at, use_cache=False).logits
        cache, pieces = None, []
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11)):
            step = {k: v[:, start:stop] for k, v in given.items() if k != "attention_mask"}
            if padding != "none":
                step["attention_mask"] = mask[:, :stop]
            step["position_ids"] = at[:, start:stop]
            out = model(**step, **extra, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    got, seen = torch.cat(pieces, 1), visible(given)
    torch.testing.assert_close(got[seen], whole[seen], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_generate(kind):
    """Greedy tokens of a left-padded batch are the unpatched model's, with either kind of cache."""
    model = MODELS[kind](CAUSAL[kind], is_decoder=True)
    given = batch(kind, "left", length=6)
    given.pop("token_type_ids", None)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for cache in ("dynamic", "static"):
        settings["cache_implementation"] = cache
        theirs = model.generate(**given, **settings, disable_compile=True)
        fasttx.patch(model, strict=True)
        ours = model.generate(**given, **settings, disable_compile=True)
        fasttx.unpatch(model)
        assert torch.equal(ours, theirs)


def test_encoder_decoder_of_two_configs():
    """transformers gives each half a second config object after building it; both must be set."""
    import transformers

    encoder = bert().config
    decoder = bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True).config
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    torch.manual_seed(5)
    model = transformers.EncoderDecoderModel(config).eval()
    before = [c._attn_implementation for c in (config, config.encoder, config.decoder)]
    given = batch(padding="right")
    given.pop("token_type_ids")
    given["decoder_input_ids"] = batch(length=4)["input_ids"]
    with torch.no_grad():
        theirs = model(**given).logits
        report = fasttx.patch(model, strict=True)
        assert sum(e.kind.endswith("Attention") for e in report.replaced) == 6
        for half in (model.encoder, model.decoder, model.decoder.bert):
            assert half.config._attn_implementation == "fasttx"
        torch.testing.assert_close(model(**given).logits, theirs, rtol=1e-5, atol=1e-5)
    fasttx.unpatch(model)
    assert [c._attn_implementation for c in (config, config.encoder, config.decoder)] == before
    for module in model.modules():
        assert getattr(getattr(module, "config", None), "_attn_implementation", None) != "fasttx"


@pytest.mark.parametrize("form", ["bool", "additive", "per head", "one for all rows"])
def test_user_masks_in_four_dimensions(form):
    g = torch.Generator().manual_seed(6)
    shape = {"per head": (3, 5, 11, 11), "one for all rows": (1, 1, 1, 11)}.get(
        form, (3, 1, 11, 11)
    )
    mask = torch.rand(shape, generator=g) < 0.6
    mask |= torch.eye(11, dtype=torch.bool) if shape[2] == 11 else torch.arange(11) == 3
    if form != "bool":
        bias = torch.randn(shape, generator=g, dtype=torch.float64)
        mask = bias.masked_fill(~mask, torch.finfo(torch.float32).min)
    given = {**batch(padding="none"), "attention_mask": mask}
    ours, theirs, exact = triple(bert(), torch.float32)
    low, wide = floating(given, torch.float32), floating(given, torch.float64)
    with torch.no_grad():
        results = [m(**x).last_hidden_state for m, x in ((ours, low), (theirs, low), (exact, wide))]
    hold(form, *results)


def test_masks_of_other_shapes_or_dtypes_are_refused():
    model, given = bert(), batch(padding="none")
    fasttx.patch(model)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, keys\]"):
        model(**given, attention_mask=torch.ones(3, 11, 11))
    with pytest.raises((TypeError, ValueError), match="attn_mask"):
        model(**given, attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.long))


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_output_attentions(padding, decoder):
    """The maps are those of the eager model, and the outputs stay right; also with gradients."""
    model = bert("BertLMHeadModel" if decoder else "BertModel", "eager", is_decoder=decoder)
    given = {**batch(padding=padding), "output_attentions": True}
    if decoder:
        given["use_cache"] = False
    theirs = model(**given)
    fasttx.patch(model, strict=True)
    ours = model(**given)
    assert len(ours.attentions) == 2
    seen = visible(given)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[seen], b.transpose(1, 2)[seen])
    torch.testing.assert_close(ours[0][seen], theirs[0][seen], rtol=1e-5, atol=1e-5)
    plain = model(**{k: v for k, v in given.items() if k != "output_attentions"})
    torch.testing.assert_close(plain[0][seen], theirs[0][seen], rtol=1e-5, atol=1e-5)


def test_output_attentions_from_the_config():
    model, given = bert(attn="eager", output_attentions=True), batch()
    theirs = model(**given).attentions
    fasttx.patch(model)
    torch.testing.assert_close(model(**given).attentions[1][0], theirs[1][0])
    fasttx.unpatch(model)
    assert model.config.output_attentions is True


def test_dropout_follows_the_mode():
    model, given = bert(attention_probs_dropout_prob=0.5), batch()
    with torch.no_grad():
        expected = output(model, given)
        fasttx.patch(model)
        torch.testing.assert_close(output(model, given), expected, rtol=1e-5, atol=1e-5)
        model.train()
        torch.manual_seed(7)
        first, second = output(model, given), output(model, given)
        torch.manual_seed(7)
        assert torch.equal(output(model, given), first)
        assert not torch.equal(first, second)
        outputs = torch.stack([output(bert_like, given) for bert_like in [model] * 30])
    assert outputs.std(0).mean() > 0.02  # the probabilities are dropped, not only seeded


def test_dropout_in_training_is_fasttx_dropout():
    """One attention call in training equals the op with the same seed: rate, scale and bits."""
    from fasttx.integrations.hf_attention import attention_forward

    module = bert(attention_probs_dropout_prob=0.3).encoder.layer[0].attention.self.train()
    q, k, v = torch.randn(3, 2, 5, 9, 7).unbind(0)
    torch.manual_seed(8)
    ours, _ = attention_forward(module, q, k, v, None, dropout=0.3, scaling=0.5)
    torch.manual_seed(8)
    direct = fasttx.attention(q, k, v, dropout_p=0.3, scale=0.5)
    assert torch.equal(ours, direct.transpose(1, 2))
    ours, _ = attention_forward(module.eval(), q, k, v, None, dropout=0.3, scaling=0.5)
    assert torch.equal(ours, fasttx.attention(q, k, v, scale=0.5).transpose(1, 2))


def test_packed_sequences_stay_apart():
    """cu_seq_lens as transformers' flash attention takes them: equal to one row a sequence."""
    model = bert()
    fasttx.patch(model)
    ids = batch(padding="none", rows=1, length=15)["input_ids"]
    bounds = [0, 4, 5, 15]
    cu = torch.tensor(bounds, dtype=torch.int32)
    at = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    sizes = {"max_length_q": 10, "max_length_k": 10}
    packed = {
        "input_ids": ids,
        "position_ids": at,
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        **sizes,
    }
    with torch.no_grad():
        together = model(**packed).last_hidden_state[0]
        for a, b in pairwise(bounds):
            alone = model(input_ids=ids[:, a:b]).last_hidden_state[0]
            torch.testing.assert_close(together[a:b], alone, rtol=1e-5, atol=1e-5)
        mask = (torch.arange(15) != 3).long()[None]
        with pytest.raises(ValueError, match="cu_seq_lens"):
            model(**packed, attention_mask=mask)
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(**packed, output_attentions=True)


@pytest.mark.parametrize("kind", MODELS)
def test_training_steps(kind):
    """Losses of 12 steps of masked-LM training: no further from fp64 than the unpatched model's."""
    cls = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[kind]
    given = batch(kind, "right", rows=4, length=13)
    labels = given["input_ids"].masked_fill(~visible(given), -100)

    def train(model):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(**given, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    ours, theirs, exact = (train(m) for m in triple(MODELS[kind](cls), torch.float32))
    assert ours[-1] < 0.8 * ours[0]
    hold("losses", ours, theirs, exact)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing():
    ours, theirs, exact = triple(roberta(), torch.float32)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    given = batch("roberta", "left")
    hold_gradients(*(gradients(m.train(), given) for m in (ours, theirs, exact)))


def test_autocast():
    ours, theirs, exact = triple(bert(), torch.float32)
    given = batch(padding="left")
    with torch.no_grad():
        gold = output(exact, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, plain = output(ours, given), output(theirs, given)
    assert got.dtype == plain.dtype
    hold("autocast", got.bfloat16(), plain.bfloat16(), gold)


@pytest.mark.parametrize("case", ["encoder", "encoder without padding", "decoder"])
def test_compile(case):
    """fullgraph, forward and backward; the graph holds fasttx's op and no other attention."""
    torch._dynamo.reset()
    decoder = case == "decoder"
    model = bert(*(["BertLMHeadModel"] if decoder else []), is_decoder=decoder, num_hidden_layers=1)
    given = batch(padding="none" if "without" in case else "left")
    if decoder:
        given["use_cache"] = False
    fasttx.patch(model, strict=True)
    expected = gradients(model, given)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    got = gradients(torch.compile(model, fullgraph=True, backend=backend), given)
    got = {n.removeprefix("_orig_mod."): g for n, g in got.items()}
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5)
    assert not any("scaled_dot_product" in target for target in seen)


def test_compile_dynamic():
    """No new graph for other lengths and sides of padding; with dropout, equal to eager's."""
    torch._dynamo.reset()
    model = roberta(num_hidden_layers=1, attention_probs_dropout_prob=0.2).train()
    fasttx.patch(model, strict=True)
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for padding, length in (("left", 11), ("right", 7), ("left", 9)):
        given = batch("roberta", padding, length=length)
        results = []
        for m in (compiled, model):
            torch.manual_seed(length)
            results.append(gradients(m, given))
        for name, grad in results[1].items():
            torch.testing.assert_close(results[0]["_orig_mod." + name], grad, rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert len(set(counts)) == 1


def test_export():
    model, given = bert("BertLMHeadModel", is_decoder=True), {**batch(padding="left")}
    given["use_cache"] = False
    fasttx.patch(model, strict=True)
    with torch.no_grad():
        expected = output(model, given)
        program = torch.export.export(model, (), given)
        torch.testing.assert_close(output(program.module(), given), expected)
    ops = [str(node.target) for node in program.graph.nodes]
    assert ops.count("fasttx.attention_fwd.default") == 2


@pytest.mark.slow
@pytest.mark.headers
def test_compile_by_inductor():
    torch._dynamo.reset()
    model, given = bert(num_hidden_layers=1), batch(padding="left")
    fasttx.patch(model)
    with torch.no_grad():
        expected = output(model, given)
        got = output(torch.compile(model, fullgraph=True), given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
