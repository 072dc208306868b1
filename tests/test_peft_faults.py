"""Every fault that an adapter folder can have is refused, with all of them named at once, and never takes the reader down."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxlora import peft
from jaxlora.errors import AdapterInvalid
from jaxlora.peft.tensors import TensorFile
from tests.adapter_folders import BASE, LIMITS, adapter, folder, tensors_of, write_raw

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG_FAULTS = {
    "dora": ({"use_dora": True}, "use_dora is true"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, 'bias is "all"'),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
    "fast pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "an init that is not known": ({"init_lora_weights": "next_year"}, "init_lora_weights"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "activated lora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "replicated layers": ({"layer_replication": [[0, 3]]}, "layer_replication"),
    "target parameters": ({"target_parameters": ["a.b"]}, "target_parameters"),
    "an unknown option": ({"use_next_year": True}, "use_next_year is true"),
    "another method": ({"peft_type": "ADALORA"}, 'peft_type is "ADALORA"'),
    "no method": ({"peft_type": None}, "peft_type"),
    "rank zero": ({"r": 0}, "r is 0"),
    "rank true": ({"r": True}, "r is true"),
    "rank as text": ({"r": "2"}, 'r is "2"'),
    "alpha as text": ({"lora_alpha": "4"}, "lora_alpha"),
    "alpha as a list": ({"lora_alpha": [4]}, "lora_alpha"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "rslora as text": ({"use_rslora": "yes"}, "use_rslora"),
    "rank pattern as a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank pattern with a bad rank": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
    "rank pattern with a bad key": ({"rank_pattern": {"(": 2}}, "regular expression"),
    "alpha pattern with a bad value": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
    "no targets": ({"target_modules": None}, "target_modules is null"),
    "empty targets": ({"target_modules": []}, "target_modules"),
    "targets of another type": ({"target_modules": {"q_proj": 1}}, "target_modules"),
    "targets as a bad expression": ({"target_modules": "(q_proj"}, "regular expression"),
    "targets that do not exist": (
        {"target_modules": ["q_proj", "v_proj", "c_attn"]},
        "names no linear layer of this base model: c_attn",
    ),
    "targets without weights": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "have no weights: .*k_proj"),
    "weights without targets": ({"target_modules": ["q_proj"]}, "not selected by target_modules: .*v_proj"),
    "all-linear with weights missing": ({"target_modules": "all-linear"}, "have no weights"),
    "another rank": ({"r": 3}, "ranks that differ from adapter_config.json: model.layers.0.self_attn.q_proj has 2, not 3"),
    "another rank by pattern": ({"rank_pattern": {"1.self_attn.v_proj": 4}}, "model.layers.1.self_attn.v_proj has 2, not 4"),
    "layers to transform of another type": ({"layers_to_transform": "1"}, "layers_to_transform"),
    "layers to transform with an expression": (
        {"target_modules": ".*[qv]_proj", "layers_to_transform": [0]},
        "need target_modules to be a list",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_config_faults_are_named(tmp_path, change, message):
    made = adapter()
    with pytest.raises(AdapterInvalid, match=message):
        peft.validate(write_raw(tmp_path / "a", dict(made.config) | change, tensors_of(made)), BASE, LIMITS)


def replaced(key, value):
    return lambda tensors: tensors | {key: value}


def without(*keys):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def poisoned(value, dtype):
    def change(tensors):
        array = tensors[f"{Q0}.lora_B.weight"].astype(dtype)
        array[-1, -1] = value
        return tensors | {f"{Q0}.lora_B.weight": array}

    return change


ONES = np.ones
TENSOR_FAULTS = {
    "a key of another base model": (
        replaced("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", ONES((2, 16))),
        "c_attn",
    ),
    "a key without the prefix": (replaced("model.layers.0.self_attn.q_proj.lora_A.weight", ONES((2, 16))), "no LoRA weights"),
    "a key with an adapter's name": (replaced(f"{Q0}.lora_A.default.weight", ONES((2, 16))), "no LoRA weights"),
    "a magnitude vector": (replaced(f"{Q0}.lora_magnitude_vector", ONES(16)), "no LoRA weights"),
    "a bias": (replaced(f"{Q0}.lora_B.bias", ONES(16)), "no LoRA weights"),
    "a whole module": (replaced("base_model.model.lm_head.weight", ONES((32, 16))), "weights of whole modules"),
    "A without B": (without(f"{Q0}.lora_B.weight"), "lora_A without lora_B: model.layers.0.self_attn.q_proj"),
    "B without A": (without(f"{Q0}.lora_A.weight"), "lora_B without lora_A: model.layers.0.self_attn.q_proj"),
    "a module that is missing": (without(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"), "have no weights"),
    "no tensors at all": (lambda tensors: {}, "no tensors"),
    "a layer that does not exist": (
        replaced(f"{Q0.replace('.0.', '.3.')}.lora_A.weight", ONES((2, 16))),
        r"this base model has 3\)",
    ),
    "A transposed": (
        lambda tensors: tensors | {f"{Q0}.lora_A.weight": ONES((16, 2))},
        r"sizes that do not fit .*not \[r, 16\] and \[16, r\]",
    ),
    "B of the wrong size": (replaced(f"{Q0}.lora_B.weight", ONES((8, 2))), "sizes that do not fit"),
    "A with three axes": (replaced(f"{Q0}.lora_A.weight", ONES((1, 2, 16))), r"not \[r, in\] and \[out, r\]"),
    "A with rank zero": (replaced(f"{Q0}.lora_A.weight", ONES((0, 16))), r"not \[r, in\] and \[out, r\]"),
    "different ranks of A and B": (replaced(f"{Q0}.lora_B.weight", ONES((16, 3))), "different ranks of lora_A and lora_B"),
    "NaN": (poisoned(np.nan, np.float32), "NaN or infinity in .*lora_B"),
    "infinity": (poisoned(-np.inf, np.float32), "NaN or infinity"),
    "NaN in float16": (poisoned(np.nan, np.float16), "NaN or infinity"),
    "infinity in bfloat16": (poisoned(np.inf, ml_dtypes.bfloat16), "NaN or infinity"),
    "whole numbers": (replaced(f"{Q0}.lora_A.weight", ONES((2, 16), np.int32)), "types other than F32, F16, BF16: .*I32"),
    "float64": (replaced(f"{Q0}.lora_A.weight", ONES((2, 16), np.float64)), "types other than F32, F16, BF16: .*F64"),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensor_faults_are_named(tmp_path, change, message):
    made = adapter()
    tensors = change(tensors_of(made))
    tensors = {
        key: value.astype(np.float32) if value.dtype == np.float64 and "F64" not in message else value
        for key, value in tensors.items()
    }
    with pytest.raises(AdapterInvalid, match=message):
        peft.validate(write_raw(tmp_path / "a", made.config, tensors), BASE, LIMITS)


def test_a_rank_over_the_limit_is_refused_with_the_limit(tmp_path):
    with pytest.raises(AdapterInvalid, match=r"ranks over the limit 8 \(MAX_LORA_RANK\).*has 9"):
        peft.validate(folder(tmp_path / "a", r=9), BASE, LIMITS)


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILE_FAULTS = {
    "empty": (b"", "truncated"),
    "shorter than a length": (b"\0\0\0", "truncated"),
    "a header longer than the file": (header({}, length=100), "truncated"),
    "a huge header": (header({}, length=1 << 62), "its header would have"),
    "no JSON": (header(b"{]"), "no valid JSON"),
    "a header that is a list": (header([1]), "no JSON object"),
    "a nest of lists": (header(b"[" * 100_000), "no valid JSON"),
    "not UTF-8": (header(b'{"\xff": 1}'), "no valid JSON"),
    "a key twice": (header(b'{"a": 1, "a": 2}'), "twice"),
    "data missing": (header({"a": F32}, bytes(4)), "truncated: its header promises 8"),
    "data too long": (header({"a": F32}, bytes(12)), "4 bytes that no tensor accounts for"),
    "overlapping tensors": (header({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "the same data twice": (header({"a": F32, "b": F32}, bytes(8)), "overlaps"),
    "a hole": (header({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)), "hole"),
    "a shape that lies": (header({"a": F32 | {"shape": [3]}}, bytes(8)), "needs 12 bytes"),
    "a shape that overflows": (header({"a": F32 | {"shape": [1 << 40, 1 << 40]}}, bytes(8)), "needs"),
    "a negative shape": (header({"a": F32 | {"shape": [-2]}}, bytes(8)), "shape"),
    "a shape of booleans": (header({"a": F32 | {"shape": [True, 2]}}, bytes(8)), "shape"),
    "offsets backwards": (header({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)), "data_offsets"),
    "an unknown type": (header({"a": F32 | {"dtype": "F31"}}, bytes(8)), "F31 is unknown"),
    "an entry that is no object": (header({"a": 3}), "its entry is not"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "no safetensors file"),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(100), "no safetensors file"),
}


@pytest.mark.parametrize(("data", "message"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_files_that_lie_are_refused(tmp_path, data, message):
    path = folder(tmp_path / "a")
    (path / peft.WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(AdapterInvalid, match=message):
        peft.validate(path, BASE, LIMITS)


def test_every_truncation_is_refused(tmp_path):
    path = folder(tmp_path / "a")
    data = (path / peft.WEIGHTS_FILE).read_bytes()
    for length in range(0, len(data), 37):
        (path / peft.WEIGHTS_FILE).write_bytes(data[:length])
        with pytest.raises(AdapterInvalid, match="truncated"):
            peft.validate(path, BASE, LIMITS)


def test_flipped_header_bytes_are_refused_or_read_as_the_safetensors_package_reads_them(tmp_path):
    path = folder(tmp_path / "a") / peft.WEIGHTS_FILE
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(400):
        flipped = bytearray(data)
        flipped[random.integers(0, 700)] ^= 1 << random.integers(0, 8)
        path.write_bytes(flipped)
        try:
            with TensorFile(path, 1 << 20) as file:
                ours = {name: (at.dtype, list(at.shape)) for name, at in file.tensors.items()}
        except AdapterInvalid:
            continue
        theirs = dict(safetensors.deserialize(bytes(flipped)))
        assert ours == {name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items()}


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = folder(tmp_path / "a")
    with open(path / peft.WEIGHTS_FILE, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterInvalid, match=r"has 1099511627776 bytes, the limit is 1048576 \(MAX_ADAPTER_FILE_BYTES\)"):
        peft.validate(path, BASE, LIMITS)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "optimizer.PT", "x.pkl"])
def test_pickles_are_refused_whatever_lies_beside_them(tmp_path, name):
    path = folder(tmp_path / "a")
    (path / name).write_bytes(b"")
    with pytest.raises(AdapterInvalid, match=f"{name}: pickled files are never loaded"):
        peft.validate(path, BASE, LIMITS)


@pytest.mark.parametrize("name", [peft.CONFIG_FILE, peft.WEIGHTS_FILE])
def test_links_pipes_folders_and_missing_files_are_refused(tmp_path, name):
    secret = tmp_path / "secret"
    path = folder(tmp_path / "a")
    (path / name).rename(secret)
    for make, message in [
        (lambda file: None, "is missing"),
        (lambda file: file.symlink_to(secret), "is a symbolic link"),
        (lambda file: os.mkfifo(file), "is not a regular file"),
        (lambda file: file.mkdir(), "is not a regular file"),
    ]:
        make(path / name)
        with pytest.raises(AdapterInvalid, match=f"{name} {message}"):
            peft.validate(path, BASE, LIMITS)
        if os.path.lexists(path / name):
            (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000, " " * (1 << 20) + "{}", "\ud800"]
)
def test_configs_that_are_no_json_objects_are_refused(tmp_path, text):
    path = folder(tmp_path / "a")
    (path / peft.CONFIG_FILE).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(AdapterInvalid, match="adapter_config.json"):
        peft.validate(path, BASE, LIMITS)


def test_all_problems_are_named_at_once_and_none_shows_a_path(tmp_path):
    made = adapter()
    tensors = poisoned(np.nan, np.float32)(tensors_of(made))
    tensors = without(f"{Q0.replace('.0.', '.1.')}.lora_B.weight")(tensors) | {"x.lora_A.weight": np.ones((2, 2), np.float32)}
    path = write_raw(tmp_path / "a", dict(made.config) | {"use_dora": True, "bias": "all"}, tensors)
    (path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterInvalid) as caught:
        peft.validate(path, BASE, LIMITS)
    for part in ("use_dora", "bias", "NaN or infinity", "lora_A without lora_B", "x.lora_A.weight", "adapter_model.bin"):
        assert part in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_messages_stay_short_however_much_is_wrong(tmp_path):
    tensors = {f"base_model.model.{'x' * 500}.{number}.lora_A.weight": np.ones((1, 1), np.float32) for number in range(2000)}
    config = dict(adapter().config) | {"y" * 5000: "z" * 5000}
    with pytest.raises(AdapterInvalid) as caught:
        peft.validate(write_raw(tmp_path / "a", config, tensors), BASE, peft.Limits(8, 1 << 24))
    assert len(str(caught.value)) < 3000 and "1995 more" in str(caught.value)
