"""CTranslate2: greedy generation of converted models, in a process of its own.

Its threads would fight torch's for the cores in one process. A provider a way to compute: in the
row's own dtype, and with weights quantized to int8, whose error is told like any other. Checked are
the log probabilities of transformers' tokens.
"""

import importlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

from . import Skip
from ._found import missing

COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _provider(name: str, label: str, quantized: str | None) -> SimpleNamespace:
    def reason() -> str | None:
        return missing("ctranslate2") or missing("transformers")

    def generation(model, dtype: str, ids, tokens: int, threads: int):
        """(call, scores): generation as an `Apart`; scores(chosen) are the log probabilities
        [B, tokens] of the chosen ids after the prompt (of a seq2seq model: after its start)."""
        apart = importlib.import_module("...apart", __name__)
        compute = quantized or COMPUTE[dtype]
        types = importlib.import_module("ctranslate2").get_supported_compute_types("cpu")
        if ids.is_cuda:
            raise Skip("only its CPU kernels are compared")
        if compute not in types:
            raise Skip(f"it has no {compute} on this CPU")
        home = tempfile.TemporaryDirectory(prefix="fasttx-ctranslate2-")
        model.save_pretrained(home.name)
        arguments = {
            "folder": home.name, "compute": compute, "ids": ids.tolist(), "tokens": tokens,
            "seq2seq": model.config.is_encoder_decoder, "vocabulary": model.config.vocab_size,
        }  # fmt: skip
        try:
            call = apart.Apart("providers.ctranslate2:serve", arguments, threads)
        except RuntimeError as error:
            home.cleanup()
            raise Skip(f"its conversion failed: {error}") from error
        call.home = home

        if set(made := call()) != {tokens}:
            call.close()
            raise Skip(f"it made {made} tokens, not {tokens} a row")

        def scores(chosen):
            Path(home.name, "chosen.json").write_text(json.dumps(chosen.tolist()))
            return call("scores")

        return call, scores

    return SimpleNamespace(
        NAME=name, LABEL=label, COMPILES=True, EXTRA=True, reason=reason, generation=generation
    )


PROVIDERS = [
    _provider("ctranslate2", "CTranslate2", None),
    _provider("ctranslate2_int8", "CTranslate2, int8", "int8"),
]


def serve(
    folder: str, compute: str, ids: list, tokens: int, seq2seq: bool, vocabulary: int, threads: int
) -> dict:
    """In the process of its own: converts, loads, and gives its calls."""
    ctranslate2 = importlib.import_module("ctranslate2")
    _words(folder, vocabulary)
    _old_names(Path(folder, "config.json"))
    converter = importlib.import_module("ctranslate2.converters").TransformersConverter(folder)
    target = str(Path(folder, "converted"))
    quantization = compute if compute != "float32" else None
    converter.convert(target, quantization=quantization)
    options = {"device": "cpu", "intra_threads": threads, "inter_threads": 1}
    options["compute_type"] = compute
    texts = [[f"t{i}" for i in row] for row in ids]
    greedy = {"beam_size": 1, "max_batch_size": 0}

    def chosen() -> list[list[str]]:
        rows = json.loads(Path(folder, "chosen.json").read_text())
        return [[f"t{i}" for i in row] for row in rows]

    if seq2seq:
        model = ctranslate2.Translator(target, **options)
        ends = {"max_decoding_length": tokens, "min_decoding_length": tokens}

        def call():
            found = model.translate_batch(texts, **ends, **greedy, end_token=["t1"])
            return [len(row.hypotheses[0]) for row in found]

        def scores():
            after = [row[1:] for row in chosen()]
            found = model.score_batch(texts, after, max_batch_size=0)
            return [row.log_probs[: len(after[0])] for row in found]

        return {"call": call, "scores": scores}
    model = ctranslate2.Generator(target, **options)
    length = len(texts[0])
    # Without the prompt in the result, the lengths do not count it either.
    ends = {"max_length": tokens, "min_length": tokens}

    def call():
        found = model.generate_batch(
            texts, **ends, **greedy, include_prompt_in_result=False, end_token=["t1"]
        )
        return [len(row.sequences_ids[0]) for row in found]

    def scores():
        found = model.score_batch(chosen(), max_batch_size=0)
        return [row.log_probs[length - 1 :] for row in found]

    return {"call": call, "scores": scores}


def _old_names(path: Path) -> None:
    """What its converter asks of a config, and transformers 5 no longer writes."""
    config = json.loads(path.read_text())
    for name, value in (("normalize_before", False), ("normalize_embedding", True)):
        config.setdefault(name, value)
    path.write_text(json.dumps(config))


def _words(folder: str, vocabulary: int) -> None:
    """A tokenizer whose words are the ids: the converter wants one."""
    tokenizers = importlib.import_module("tokenizers")
    transformers = importlib.import_module("transformers")
    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", eos_token="t1", bos_token="t1", pad_token="t0"
    ).save_pretrained(folder)
