"""generate beside other models' results: padding, streams, interruptions, draws, bad input, and
steps that are recorded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fasttx
from fasttx import models, nn
from fasttx.models import decoding, families
from fasttx.models.generate import generate
from fasttx.models.replay import record

VOCABULARY = 50


def make(family="gpt2", **given):
    torch.manual_seed(3)
    values = {
        "gpt2": {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 24,
            "n_head": 3,
            "n_layer": 2,
            "n_positions": 40,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        "bloom": {"architectures": ["BloomForCausalLM"], "hidden_size": 24, "n_head": 3,
                  "n_layer": 2},
        "t5": {
            "architectures": ["T5ForConditionalGeneration"],
            "d_model": 24,
            "d_kv": 8,
            "num_heads": 3,
            "d_ff": 40,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        },
        "bart": {
            "architectures": ["BartForConditionalGeneration"],
            "d_model": 24,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "max_position_embeddings": 40,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        "marian": {
            "architectures": ["MarianMTModel"],
            "d_model": 24,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "max_position_embeddings": 40,
            "decoder_start_token_id": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "forced_eos_token_id": None,
        },
    }[family]  # fmt: skip
    config = families.configured(
        {"model_type": family, "vocab_size": VOCABULARY, **values, **given}
    )
    head = models.ConditionalGeneration if family in SEQ2SEQ else models.CausalLM
    model = head(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 1.5 * p.shape[-1] ** -0.5)
    return model


SEQ2SEQ = ("t5", "bart", "marian")
FAMILIES = ("gpt2", "bloom", *SEQ2SEQ)


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_one_by_one(family, beams):
    """Whatever stands on which side of a row, or in its middle."""
    model, ids = make(family), ids_of(4, 7)
    mask = torch.tensor(
        [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0]]
    )
    options = {"max_new_tokens": 10, "eos_token_id": [7, 11], "pad_token_id": 2, "num_beams": beams}
    together = model.generate(ids, mask, **options)
    prompt = 1 if family in SEQ2SEQ else 7
    if family not in SEQ2SEQ:
        assert torch.equal(together[:, :7], ids)
    for row, visible, tokens in zip(ids, mask.bool(), together[:, prompt:], strict=True):
        if family in SEQ2SEQ and not visible[0]:
            continue  # an encoder's positions count from the first column, hidden or not
        alone = model.generate(row[visible][None], **options)
        alone = alone[0, 1 if family in SEQ2SEQ else int(visible.sum()) :]
        assert tokens[: len(alone)].tolist() == alone.tolist()
        assert (tokens[len(alone) :] == 2).all()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_gives_what_a_step_gives(family, beams, monkeypatch):
    model, ids = make(family), ids_of(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5]) if family in ("gpt2", "bloom") else None
    options = {"max_new_tokens": 30, "eos_token_id": [], "num_beams": beams}
    recorded = []
    original = decoding.record

    def record(function):
        out, recording = original(function)
        recorded.append(recording)
        return out, recording

    monkeypatch.setattr(decoding, "record", record)
    got = model.generate(ids, mask, **options)
    assert len(recorded) == 1 and recorded[0] is not None
    assert len(recorded[0].parts) < 12  # nearly all of it is native
    monkeypatch.setenv("FASTTX_GRAPH", "0")
    assert torch.equal(got, model.generate(ids, mask, **options))
    assert len(recorded) == 1


def test_hooks_see_every_step():
    model, ids, calls = make(), ids_of(1, 4), []
    plain = model.generate(ids, max_new_tokens=20, eos_token_id=[])
    model.transformer.stack.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids, max_new_tokens=20, eos_token_id=[]), plain)
    assert len(calls) == 20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_recording_holds(mode):
    """New tensors, tensors written to, views, and nothing for what nobody reads; a value read or
    drawn is no step to make again."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8)

    with mode():
        x, count = torch.randn(2, 8), torch.zeros(2)

        def step():
            (x * 5).exp()
            count.add_(1)
            y = fasttx.linear(x.t().contiguous().t(), weight, activation="relu")
            return (y.reshape(4, 4).sum(0) + count[0]).view(2, 2)

        first, recording = record(step)
        first = first.clone()
        assert len(recording.program) == 1 and len(recording.parts) <= 6
        x.normal_()
        expected = step()
        count.sub_(1)
        assert torch.equal(recording.run(), expected) and not torch.equal(expected, first)

        for reads in (
            lambda: x * x.sum().item(),
            lambda: x * float(x[0, 0]),
            lambda: x if torch.equal(x, x) else -x,
            lambda: x if (x > 0).any() else -x,
            lambda: x * torch.randn(8),
            lambda: torch.nn.functional.dropout(x, 0.5),
        ):
            assert record(reads)[1] is None
        assert record(lambda: torch.nn.functional.dropout(x, 0.5, training=False))[1] is not None


class Stream:
    def __init__(self, stop_after=None):
        self.values, self.ended, self.stop_after = [], 0, stop_after

    def put(self, value):
        assert value.device.type == "cpu"
        self.values.append(value)
        if self.stop_after is not None and len(self.values) > self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_stream_gets_the_prompt_and_every_step(family):
    model, stream = make(family), Stream()
    out = model.generate(ids_of(2, 4), max_new_tokens=6, eos_token_id=[], streamer=stream)
    first, *steps = stream.values
    assert torch.equal(torch.cat((first, torch.stack(steps, 1)), 1), out)
    assert stream.ended == 1


def test_transformers_own_streamer(capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Words:
        def decode(self, ids, **options):
            return "".join(f"{i} " for i in ids)

    out = make().generate(
        ids_of(1, 3), max_new_tokens=4, eos_token_id=[], streamer=transformers.TextStreamer(Words())
    )
    assert capsys.readouterr().out == "".join(f"{i} " for i in out[0].tolist()) + "\n"


@pytest.mark.parametrize("step", [1, 3, 12])
def test_an_interruption_leaves_nothing_behind(step):
    model, ids = make(), ids_of(2, 4)
    options = {"max_new_tokens": 20, "eos_token_id": []}
    expected = model.generate(ids, **options)
    model.train()
    model.transformer.stack.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, streamer=Stream(step), **options)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(model.generate(ids, **options), expected)


def test_it_stops_when_every_row_has_ended():
    model, ids = make(), ids_of(3, 4)
    free = model.generate(ids, max_new_tokens=20, eos_token_id=[])[:, 4:]
    ends = free[:, 2].tolist()  # each row ends at its third token or before
    count = 0
    original = model.decode

    def decode(*args):
        nonlocal count
        count += 1
        return original(*args)

    model.decode = decode
    out = model.generate(ids, max_new_tokens=20, eos_token_id=ends, pad_token_id=2)[:, 4:]
    assert out.shape[1] <= 3 and count == out.shape[1]
    for row, whole in zip(out.tolist(), free.tolist(), strict=True):
        end = next(i for i, token in enumerate(whole) if token in ends)
        assert row[: end + 1] == whole[: end + 1]
        assert all(token == 2 for token in row[end + 1 :])


def test_the_result_is_a_plain_tensor():
    model, ids = make(), ids_of(1, 4)
    out = model.generate(ids.int(), max_new_tokens=3)
    assert out.dtype is torch.int64 and not out.is_inference()
    model(out, labels=out).loss.backward()


@pytest.mark.parametrize("recorded", [True, False])
def test_computed_positions_grow(recorded, monkeypatch):
    """Past the 512 of a sinusoidal table; and training may use what grew."""
    if not recorded:
        monkeypatch.setenv("FASTTX_GRAPH", "0")
    model, ids = make("marian"), ids_of(1, 4)
    out = model.generate(ids, max_new_tokens=560, eos_token_id=[], pad_token_id=2)
    with torch.no_grad():
        logits = model(ids, decoder_input_ids=out[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), out[:, 1:])
    model(ids, decoder_input_ids=out, labels=out).loss.backward()


def test_draws():
    """A generator decides; the share of each token is its probability, after the filters."""
    model, ids = make(), ids_of(1, 4)
    options = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 5}
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double() / 0.7
    most = logits.topk(5)
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected[most.indices] = most.values.softmax(0)
    drawn = model.generate(ids.expand(4000, 4), **options)[:, -1]
    share = drawn.bincount(minlength=VOCABULARY) / 4000
    assert (share - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5
    same = [
        model.generate(ids, **options | {"max_new_tokens": 9},
                       generator=torch.Generator().manual_seed(s))
        for s in (5, 5, 6)
    ]  # fmt: skip
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    greedy = model.generate(ids, max_new_tokens=9)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=True, top_p=0.0), greedy)


def test_padding_is_found_by_its_token():
    """As in transformers: only where the padding token is not an end token."""
    model, ids = make(), ids_of(2, 5)
    ids[1, :2] = 2
    mask = (ids != 2).long()
    options = {"max_new_tokens": 5, "pad_token_id": 2, "eos_token_id": 1}
    expected = model.generate(ids, mask, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    options["eos_token_id"] = 2
    without = model.generate(ids, torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, **options), without)


def test_defaults_are_the_models_own():
    ids = ids_of(1, 4)
    model = make(num_beams=3, length_penalty=2.0, no_repeat_ngram_size=2)
    explicit = make().generate(
        ids, max_new_tokens=8, num_beams=3, length_penalty=2.0, no_repeat_ngram_size=2
    )
    assert torch.equal(model.generate(ids, max_new_tokens=8), explicit)
    assert make(max_length=9).generate(ids, eos_token_id=[]).shape[1] == 9
    assert make().generate(ids, eos_token_id=[]).shape[1] == 24
    odd = families.configured(make().config.source, "config", {"typical_p": 0.5})
    with pytest.raises(ValueError, match=r"generation_config .* typical_p=0.5"):
        models.CausalLM(odd).generate(ids, max_new_tokens=2)


BAD = {
    "input_ids must be a tensor": {"input_ids": [[1, 2]]},
    "input_ids must be int64 or int32": {"input_ids": torch.ones(1, 3)},
    r"input_ids must be \[B, S\]": {"input_ids": torch.ones(3, dtype=torch.int64)},
    r"input_ids must be \[B, S\], B and S > 0": {"input_ids": torch.ones(1, 0, dtype=torch.int64)},
    r"input_ids must be in \[0, 50\), got 50": {"input_ids": torch.tensor([[3, 50]])},
    r"input_ids must be in \[0, 50\), got -1": {"input_ids": torch.tensor([[3, -1]])},
    "attention_mask must be a tensor": {"attention_mask": [[1, 1]]},
    "attention_mask must have input_ids' shape": {"attention_mask": torch.ones(1, 3)},
    "attention_mask must hold 0 and 1": {"attention_mask": torch.full((2, 4), 2)},
    "attention_mask must show a token in every row": {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    },
    "max_new_tokens must be an int of at least 1, got 0": {"max_new_tokens": 0},
    "max_new_tokens must be an int of at least 1, got 2.5": {"max_new_tokens": 2.5},
    "max_new_tokens must leave .* 40 positions, got 38 after 4": {"max_new_tokens": 38},
    "max_new_tokens must leave .* got 1099511627776 ": {"max_new_tokens": 1 << 40},
    "num_beams must be an int": {"num_beams": 0},
    "num_beams needs a vocabulary": {"num_beams": 2, "eos_token_id": list(range(50))},
    "length_penalty must be a finite number": {"length_penalty": float("nan")},
    "early_stopping must be": {"early_stopping": "sometimes"},
    "eos_token_id must be a token id or a list": {"eos_token_id": -1},
    "eos_token_id must be a token id or a list ": {"eos_token_id": [1, "2"]},
    "pad_token_id must be a token id": {"pad_token_id": 1.5},
    r"pad_token_id must be in \[0, 50\)": {"pad_token_id": 50},
    "temperature must be a finite number above 0": {"do_sample": True, "temperature": 0.0},
    "top_k must be an int": {"do_sample": True, "top_k": -1},
    r"top_p must be in \[0, 1\]": {"do_sample": True, "top_p": 1.5},
    "do_sample must be False with num_beams": {"do_sample": True, "num_beams": 2},
    "do_sample must be True or False": {"do_sample": "yes"},
    "repetition_penalty must be a finite number above 0": {"repetition_penalty": 0.0},
    "no_repeat_ngram_size must be an int": {"no_repeat_ngram_size": -2},
    "generator must be None or a torch.Generator": {"do_sample": True, "generator": 3},
    "streamer must be None with num_beams": {"streamer": Stream(), "num_beams": 2},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_runs(message, monkeypatch):
    model = make()
    monkeypatch.setattr(model, "new_cache", lambda *_: pytest.fail("memory was taken"))
    given = {"input_ids": ids_of(2, 4), "max_new_tokens": 5} | BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        generate(model, **given)


def test_the_last_position_is_used():
    out = make().generate(ids_of(1, 4), max_new_tokens=37, eos_token_id=[])
    assert out.shape[1] == 41  # the last token is never read
    with pytest.raises(ValueError, match="max_new_tokens must leave the sequence"):
        make("bart").generate(ids_of(1, 41), max_new_tokens=2)


def test_nan_weights_are_an_error():
    model = make()
    with torch.no_grad():
        model.transformer.stack.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must have a number"):
        model.generate(ids_of(1, 4), max_new_tokens=3)


def test_a_seq2seq_model_needs_a_start_token():
    ids = ids_of(1, 4)
    model = make("t5", decoder_start_token_id=None, pad_token_id=None)
    if model.config.decoder_start_token_id is None:
        with pytest.raises(ValueError, match="decoder_start_token_id must be given"):
            model.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"decoder_start_token_id must be in \[0, 50\)"):
        model.generate(ids, max_new_tokens=2, decoder_start_token_id=50)
    assert model.generate(ids, max_new_tokens=2, decoder_start_token_id=7)[0, 0] == 7


def test_a_cache_repeats_and_reorders():
    cache = nn.KVCache(2, 2, 3, 6, 4, start=torch.tensor([1, 0], dtype=torch.int32))
    cache.advance(4)
    cache.keys.normal_(), cache.values.normal_()
    wide = cache.repeat(3, 8)
    assert wide.max_length == 8 and wide.filled == 4 and wide.start.tolist() == [1, 1, 1, 0, 0, 0]
    for held, copy in ((cache.keys, wide.keys), (cache.values, wide.values)):
        assert torch.equal(copy[:, :, :, :4], held.repeat_interleave(3, 1)[:, :, :, :4])
    wide.advance(2)
    wide.keys.normal_(), wide.values.normal_()
    before = wide.keys.clone(), wide.values.clone()
    rows = torch.tensor([1, 1, 0, 5, 4, 3])
    wide.reorder(rows, 4)
    for old, new in zip(before, (wide.keys, wide.values), strict=True):
        assert torch.equal(new[:, :, :, 4:6], old[:, rows][:, :, :, 4:6])
        assert torch.equal(new[:, :, :, :4], old[:, :, :, :4])
        assert torch.equal(new[:, :, :, 6:], old[:, :, :, 6:])
    assert wide.positions(2).tolist() == [[3, 4]] * 3 + [[4, 5]] * 3
    assert wide.positions(6)[0].tolist() == [0, 0, 1, 2, 3, 4]


def test_beams_share_a_memory():
    torch.manual_seed(0)
    layer = nn.CrossAttention(16, 2)
    x, memory = torch.randn(6, 1, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None]
    shared = layer(x, layer.project(memory), attn_mask=mask)
    apart = layer(x, memory.repeat_interleave(3, 0), attn_mask=mask.repeat_interleave(3, 0))
    assert (shared - apart).abs().max() < 1e-6


def test_threads_may_generate_side_by_side():
    model, ids = make(), ids_of(2, 4)
    expected = model.generate(ids, max_new_tokens=20)
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(lambda _: model.generate(ids, max_new_tokens=20), range(4)):
            assert torch.equal(out, expected)
