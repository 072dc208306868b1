"""The tokenizer of the default model is llama.cpp's; other checkpoints' files are read as Transformers reads them."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from jaxlora.errors import InvalidRequest, SetupError
from jaxlora.text import Tokenizer

RECORDED = json.loads(pathlib.Path(__file__).with_name("references").joinpath("llama_cpp_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(default_model) -> Tokenizer:
    return Tokenizer.from_folder(default_model)


def small(**options) -> tokenizers.Tokenizer:
    """Byte level, one token a byte, with <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return made


def write(folder: pathlib.Path, made: tokenizers.Tokenizer, **config) -> pathlib.Path:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_ids_are_those_of_llama_cpp(tokenizer):
    different = [row["text"] for row in RECORDED["rows"] if tokenizer.encode(row["text"]) != row["ids"]]
    assert len(RECORDED["rows"]) > 260
    assert different == []


def test_text_without_special_tokens_survives_a_round_trip(tokenizer):
    for row in RECORDED["rows"]:
        if "<" not in row["text"]:
            assert tokenizer.decode(tokenizer.encode(row["text"])) == row["text"]


def test_ids_and_chat_are_those_of_transformers(tokenizer, default_model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(default_model)
    for row in RECORDED["rows"]:
        assert theirs(row["text"])["input_ids"] == row["ids"]
    for messages in (
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": role, "content": f"{role} 👋 12"} for role in ("system", "user", "assistant", "user")],
    ):
        for prompt in (True, False):
            want = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == want


def test_the_default_models_facts(tokenizer):
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([*ids, 49152, 10**6]) == "hello"
    assert tokenizer.token_text(10**6) == ""


def test_a_single_token_reads_as_it_is(tokenizer):
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert [tokenizer.token_text(token) for token in tokenizer.encode("Hello world")] == ["Hello", " world"]
    assert "\ufffd" in tokenizer.token_text(tokenizer.encode("🤖")[0])


def test_half_a_surrogate_pair_is_an_error_of_its_field(tokenizer):
    with pytest.raises(InvalidRequest) as error:
        tokenizer.encode("a\ud83d", field="stop_words")
    assert list(error.value.problems) == ["stop_words"]


def test_special_tokens_are_added_only_when_asked_for(tmp_path):
    made = small()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    tokenizer = Tokenizer.from_folder(write(tmp_path, made, bos_token="<s>", eos_token={"content": "</s>", "special": True}))
    assert tokenizer.encode("a")[0] == made.token_to_id("<s>")
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]
    assert tokenizer.eos_token_ids == (made.token_to_id("</s>"),)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_truncation_and_padding_left_in_the_file_do_not_apply(tmp_path):
    made = small()
    made.enable_truncation(3)
    made.enable_padding(length=8)
    assert len(Tokenizer.from_folder(write(tmp_path, made)).encode("abcdef")) == 6


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({}, None, None),
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": "A"}, "B", "B"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}, None, "D"),
        ({"chat_template": [{"name": "only", "template": "O"}]}, None, "O"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]}, None, None),
    ],
)
def test_the_chat_template_is_found_where_checkpoints_keep_it(tmp_path, config, file, expected):
    write(tmp_path, small(), **config)
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.has_chat_template == (expected is not None)
    if expected:
        assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == expected
    else:
        with pytest.raises(InvalidRequest, match="messages: .*no chat template"):
            tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("special_tokens_map.json", "[]")]
)
def test_a_broken_file_is_named(tmp_path, name, content):
    write(tmp_path, small())
    (tmp_path / name).write_text(content)
    with pytest.raises(SetupError, match=name):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Sequence([decoders.Strip(" ", 1, 0)]), None])
def test_a_decoder_that_can_not_be_streamed_is_refused_by_name(decoder):
    made = small()
    made.decoder = decoder
    name = "none" if decoder is None else "Strip" if isinstance(decoder, decoders.Sequence) else type(decoder).__name__
    with pytest.raises(SetupError, match=name):
        Tokenizer(made)
