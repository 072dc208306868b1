"""A stream of tokens reads as all of them decoded at once, for every kind of tokenizer that the supported models come with."""

import json
import pathlib
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from jaxlora.text import Detokenizer, Tokenizer

TEXTS = [row["text"] for row in json.loads(
    pathlib.Path(__file__).with_name("references").joinpath("llama_cpp_tokens.json").read_text()
)["rows"]]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(decoder, normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """A tokenizer of Llama 2's kind: pieces learnt from some of the texts, bytes for everything else."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS[:60], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    pieces = [*SPECIAL, *BYTES, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    made.decoder = decoder
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    return Tokenizer(made, {"eos_token": "</s>"})


def llama_2() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(
        decoders.Sequence(steps), normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


def no_leading_space() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(decoders.Sequence(steps), normalizers.Replace(" ", "▁"))


def metaspace() -> Tokenizer:
    return sentencepiece(decoders.Metaspace(), pre_tokenizer=pre_tokenizers.Metaspace())


def metaspace_with_bytes() -> Tokenizer:
    steps = [decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(decoders.Sequence(steps), pre_tokenizer=pre_tokenizers.Metaspace())


@pytest.fixture(scope="module", params=["default", llama_2, no_leading_space, metaspace, metaspace_with_bytes])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.from_folder(request.getfixturevalue("default_model")) if request.param == "default" else request.param()


@pytest.fixture(scope="module")
def byte_level(default_model) -> Tokenizer:
    return Tokenizer.from_folder(default_model)


def stream(tokenizer: Tokenizer, ids, prompt_ids=()) -> str:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def test_random_ids_over_the_whole_vocabulary(tokenizer):
    rng = random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randint(0, 40))]
        assert stream(tokenizer, ids) == tokenizer.decode(ids), ids


def test_rows_of_bytes_that_are_mostly_no_text(tokenizer):
    """Ids whose pieces are single bytes: broken, overlong, surrogate and truncated sequences of every kind."""
    rng = random.Random(1)
    # The bytes that begin, continue or break characters, and a letter.
    wanted = [0x20, 0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    by_byte = {piece: token for token in range(tokenizer.vocab_size) if isinstance(piece := tokenizer.pieces.get(token), bytes)}
    singles = [by_byte[bytes([byte])] for byte in wanted if bytes([byte]) in by_byte] or list(range(20))
    singles.append(tokenizer.eos_token_ids[0])
    for _ in range(3000):
        ids = rng.choices(singles, k=rng.randint(1, 9))
        assert stream(tokenizer, ids) == tokenizer.decode(ids), ids


def test_texts_in_every_script(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert stream(tokenizer, ids) == tokenizer.decode(ids), text


def test_an_answer_continues_its_prompt(tokenizer):
    """Wherever a text is cut into prompt and answer, the answer's stream is the rest of the text."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        if "\N{REPLACEMENT CHARACTER}" in whole:
            continue
        prompt = ""
        for cut in range(1, len(ids)):
            # A character that is cut in two counts to the answer.
            prompt = max(prompt, tokenizer.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}"), key=len)
            assert stream(tokenizer, ids[cut:], ids[:cut]) == whole[len(prompt) :], (text, cut)


def test_a_prompt_of_special_tokens_alone_is_no_beginning_of_a_text(tokenizer):
    ids = tokenizer.encode("hello world")
    eos = tokenizer.eos_token_ids[0]
    assert stream(tokenizer, ids, [eos, eos]) == tokenizer.decode(ids)


def test_leading_space_stays_after_a_prompt_and_goes_without_one():
    tokenizer = llama_2()
    prompt, answer = tokenizer.encode("the capital is"), tokenizer.encode("the")
    assert stream(tokenizer, answer) == "the"
    assert stream(tokenizer, answer, prompt) == " the"


def test_text_comes_out_as_soon_as_it_is_certain(byte_level):
    for text in TEXTS:
        detokenizer, seen, ids = Detokenizer(byte_level), "", byte_level.encode(text)
        for count, token in enumerate(ids, 1):
            seen += detokenizer.push(token)
            assert seen == byte_level.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}"), text


def test_an_emoji_of_several_parts_never_shows_a_broken_one(byte_level):
    ids = byte_level.encode("a 👨‍👩‍👧 b")
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) > 10 and "".join(pieces) == "a 👨‍👩‍👧 b"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_only_the_end_of_a_prompt_is_read(byte_level):
    class Watched(list):
        def __reversed__(self):
            for count, token in enumerate(super().__reversed__()):
                assert count < 3, "read the whole prompt"
                yield token

    assert stream(byte_level, byte_level.encode(" world"), Watched(byte_level.encode("hello " * 1000))) == " world"
