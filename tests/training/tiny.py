"""transformers' models of every family, small enough to train in a test."""


def model(family: str, tokenizer, **changed):
    import torch
    import transformers

    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.bos,
           "eos_token_id": tokenizer.eos, "vocab_size": tokenizer.vocab_size}  # fmt: skip
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 80}  # fmt: skip
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "max_position_embeddings": 80}  # fmt: skip
    start = {"decoder_start_token_id": tokenizer.pad}
    name, cls, sizes = {
        "bert": ("BertConfig", "BertForMaskedLM", bert),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", bert),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2,
                                                   "n_positions": 64}),
        "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2,
                                                      "n_head": 2}),
        "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 16, "d_ff": 64,
                                                          "num_layers": 2, "num_heads": 2} | start),
        "bart": ("BartConfig", "BartForConditionalGeneration", bart | start),
    }[family]  # fmt: skip
    config = getattr(transformers, name)(**ids | sizes | changed)
    return getattr(transformers, cls)(config)
