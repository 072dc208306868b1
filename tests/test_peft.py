"""PEFT's format: what PEFT wrote is read as PEFT reads it, and what is written here comes back as it was."""

import hashlib
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from jaxlora import peft
from jaxlora.errors import AdapterInvalid
from jaxlora.peft import patterns
from jaxlora.peft.tensors import TensorFile
from tests.adapter_folders import BASE, BFLOAT16, LIMITS, adapter, folder, tensors_of, write_raw

REFERENCES = pathlib.Path(__file__).parent / "references" / "peft"
RECORDED = json.loads((REFERENCES / "recorded.json").read_text())["modules"]
WITH_OUTPUT_LAYER = peft.Limits(8, 1 << 20, output_layer=True)


@pytest.mark.parametrize("name", [name for name in RECORDED if not name.startswith("refused")])
def test_folders_of_peft_have_the_ranks_and_scales_that_peft_gives_them(name):
    read = peft.read(REFERENCES / name, BASE, WITH_OUTPUT_LAYER)
    assert {module: [pair.rank, pair.scale] for module, pair in read.modules.items()} == RECORDED[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("refused_dora", "use_dora"),
        ("refused_pissa", "init_lora_weights"),
        ("refused_olora", "init_lora_weights"),
        ("refused_modules_to_save", "modules_to_save"),
        ("refused_lora_bias", "lora_bias"),
        ("refused_embedding", "lora_embedding_A"),
        ("refused_trainable_tokens", "trainable_token_indices"),
        ("refused_replication", "layer_replication"),
    ],
)
def test_folders_of_peft_that_are_not_plain_lora_are_refused_by_name(name, reason):
    with pytest.raises(AdapterInvalid, match=reason):
        peft.validate(REFERENCES / name, BASE, WITH_OUTPUT_LAYER)


@pytest.mark.parametrize("name", ["attention", "bfloat16", "float16"])
def test_tensors_are_those_that_the_safetensors_package_reads(name):
    with TensorFile(REFERENCES / name / peft.WEIGHTS_FILE, 1 << 20) as file:
        ours = dict(file.arrays())
    theirs = safetensors.numpy.load_file(REFERENCES / name / peft.WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        assert array.dtype == theirs[key].dtype and array.shape == theirs[key].shape
        assert array.tobytes() == theirs[key].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path, dtype):
    first = folder(
        tmp_path / "first", dtype=dtype, lora_alpha=8.0, target_modules=["v_proj", "q_proj"], alpha_pattern={"v_proj": 3.0}
    )
    second = tmp_path / "second"
    second.mkdir()
    peft.write(second, peft.read(first, BASE, LIMITS))
    for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    config = json.loads((first / peft.CONFIG_FILE).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert type(config["lora_alpha"]) is int and type(config["alpha_pattern"]["v_proj"]) is int
    with safetensors.safe_open(first / peft.WEIGHTS_FILE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_written_is_read_back(tmp_path):
    random = np.random.default_rng(1)
    for case in range(20):
        options = {
            "r": int(random.integers(1, 8)),
            "lora_alpha": float(random.choice([1, 2.5, 16])),
            "use_rslora": bool(random.integers(2)),
            "target_modules": "all-linear"
            if case % 3 == 0
            else sorted(random.choice(["q_proj", "o_proj", "up_proj", "2.mlp.down_proj"], 2, False)),
            "rank_pattern": {r"layers\.1\..*": int(random.integers(1, 8))} if case % 2 else {},
            "alpha_pattern": {"q_proj": 7} if case % 4 else {},
        }
        written = adapter(case, [np.float32, BFLOAT16][case % 2], **options)
        path = tmp_path / str(case)
        path.mkdir()
        peft.write(path, written)
        read = peft.read(path, BASE, LIMITS)
        assert read.config == written.config and read.modules.keys() == written.modules.keys()
        for module, pair in written.modules.items():
            assert (read.modules[module].scale, read.rank) == (pair.scale, written.rank)
            assert read.modules[module].a.tobytes() == pair.a.tobytes() and read.modules[module].b.tobytes() == pair.b.tobytes()


def test_writing_refuses_modules_that_their_config_does_not_describe(tmp_path):
    made = adapter()
    pair = made.modules["model.layers.0.self_attn.q_proj"]
    wrong = peft.LoraAdapter(made.modules | {"model.layers.0.self_attn.q_proj": peft.LoraPair(pair.a, pair.b, 9.0)}, made.config)
    with pytest.raises(AdapterInvalid, match="scale 9"):
        peft.write(tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


def test_info_and_hashes_are_those_of_the_files(tmp_path):
    path = folder(tmp_path / "a", rank_pattern={"v_proj": 5})
    info = peft.validate(path, BASE, LIMITS)
    data = (path / peft.WEIGHTS_FILE).read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest() and info.nbytes == len(data)
    assert (info.rank, info.target_modules, info.num_modules) == (5, ("q_proj", "v_proj"), 6)


def test_what_was_accepted_is_read_by_its_hashes(tmp_path):
    path = folder(tmp_path / "a", rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 3})
    info = peft.validate(path, BASE, LIMITS)
    known, checked = peft.read_published(path, info.sha256, info.config_sha256, info.nbytes), peft.read(path, BASE, LIMITS)
    assert known.config == checked.config and known.modules.keys() == checked.modules.keys()
    for name, pair in checked.modules.items():
        other = known.modules[name]
        assert pair.scale == other.scale and pair.a.dtype == other.a.dtype
        np.testing.assert_array_equal(pair.a, other.a)
        np.testing.assert_array_equal(pair.b, other.b)


@pytest.mark.parametrize("change", ["a bit", "shorter", "longer", "config"])
def test_what_is_no_longer_what_was_accepted_is_refused(tmp_path, change):
    path = folder(tmp_path / "a")
    info = peft.validate(path, BASE, LIMITS)
    changed = path / (peft.CONFIG_FILE if change == "config" else peft.WEIGHTS_FILE)
    data = changed.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    changed.write_bytes({"a bit": flipped, "shorter": data[:-1], "longer": data + b" ", "config": data + b" "}[change])
    with pytest.raises(AdapterInvalid, match=f"{changed.name} is not the one that was published"):
        peft.read_published(path, info.sha256, info.config_sha256, info.nbytes)


def test_the_output_layer_is_adapted_only_where_that_is_allowed(tmp_path):
    path = folder(tmp_path / "a", target_modules=["q_proj", "lm_head"])
    assert "lm_head" in peft.read(path, BASE, WITH_OUTPUT_LAYER).modules
    with pytest.raises(AdapterInvalid, match="LORA_OUTPUT_LAYER"):
        peft.validate(path, BASE, LIMITS)


def test_options_without_effect_and_unknown_ones_that_are_off_are_accepted(tmp_path):
    made = adapter()
    config = dict(made.config) | {"lora_dropout": 0.1, "peft_version": "9.9", "eva_config": {"rho": 2.0}, "some_new_option": None}
    config |= {"another_new_option": False, "init_lora_weights": "eva", "bias": "none"}
    assert peft.validate(write_raw(tmp_path / "a", config, tensors_of(made)), BASE, LIMITS).rank == 2


@pytest.mark.parametrize(
    ("key", "name", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attnXq_proj", True),  # an unescaped dot is any character
        ("layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", False),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("^model.layers.0", "model.layers.0", True),
        ("^layers.0", "model.layers.0", False),
        (r"layers\.\d+\.mlp\..*", "model.layers.12.mlp.up_proj", True),
        ("q_proj|v_proj", "a.v_proj", True),
        ("proj", "a.q_proj", False),
    ],
)
def test_pattern_keys_match_as_in_peft(key, name, matches):
    assert patterns.Matcher().key(key, name) is matches
    assert (re.match(rf"(.*\.)?({key})$", name) is not None) is matches


@pytest.mark.parametrize(
    "pattern",
    ["(" * 9 + "a" + ")" * 9, "((a{1000}){1000}){1000}", "a" * 5000, "(", "(?:foo){e<=1}", "[[:alpha:]]", "*", r"\p{L}", "(?R)"],
    ids=lambda pattern: pattern[:12],
)
def test_expressions_that_could_take_memory_or_mean_something_else_are_refused_before_they_are_used(pattern):
    assert patterns.check(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.(0|1|2).*(q_proj|v_proj)",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))",
        r"^(?!.*visual).*(?:q_proj|up_proj).*",
        r"model\.layers\.(?:[0-9]|1[0-9])\.self_attn\.[qkv]_proj",
    ],
)
def test_expressions_that_people_use_match_as_in_re(pattern):
    assert patterns.check(pattern) is None
    matcher = patterns.Matcher()
    for name in BASE.linear_paths():
        assert matcher.full(pattern, name) is (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_never_ends_is_refused_in_time(tmp_path, monkeypatch, field):
    monkeypatch.setattr(patterns.Matcher.__init__, "__defaults__", (0.05,))
    slow = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(?!\1)y|z"
    made = adapter()
    path = write_raw(tmp_path / "a", dict(made.config) | {field: {slow: 2} if "pattern" in field else slow}, tensors_of(made))
    with pytest.raises(AdapterInvalid, match="take longer than"):
        peft.validate(path, BASE, LIMITS)


def test_reading_needs_no_jax():
    code = "import sys, jaxlora.peft, jaxlora.adapters; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
