"""A Hugging Face tokenizer from a GGUF file's metadata.

A GGUF file holds the vocabulary, the merges, each token's type and the chat template, but only the *name* of its
pre-tokenizer; what stands behind a name is llama.cpp's source (`llm_tokenizer_bpe` in src/llama-vocab.cpp). Knows the one
named `smollm`.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlora.errors import SetupError

# `enum llama_token_type`; the others are ordinary entries of the vocabulary.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any], dict[str, str]]:
    """The contents of tokenizer.json, of tokenizer_config.json (with the chat template) and of special_tokens_map.json.

    Raises:
        SetupError: the file's tokenizer is of another kind.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise SetupError(f"the file's tokenizer is {kind[0]!r} with pre-tokenizer {kind[1]!r}; known is 'gpt2' with 'smollm'")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]

    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # Digits one by one, then GPT-2's splits: Transformers' own conversion from GGUF leaves out the first.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {index: token for index, token in enumerate(tokens) if types[index] in (_CONTROL, _USER_DEFINED)}
    for index, token in added.items():
        tokenizer.add_tokens([AddedToken(token, special=types[index] == _CONTROL, normalized=False)])

    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in _SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    config = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": types[index] == _CONTROL,
            }
            for index, token in added.items()
        },
        **special,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        # Transformers then takes tokenizer.json as it is; the class of a model family would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tokenizer, config, special
