"""The `config.pbtxt` files say what the table of fields says, and the ensemble hands everything on."""

import pytest
from tritonclient.grpc import model_config_pb2

from jaxlora.errors import SetupError
from jaxlora.service.fields import FIELDS, INPUT_IDS, OUTPUTS
from jaxlora.settings import Settings
from server import repository

TENSORS = {field.name: (field.type, [field.dims]) for field in FIELDS.values() if field.tensor}
IDS = {INPUT_IDS.name: (INPUT_IDS.type, [INPUT_IDS.dims])}
EXPECTED = {"tokenizer": TENSORS, "jax_lora": TENSORS | IDS, "llm": TENSORS}


def config(model: str) -> model_config_pb2.ModelConfig:
    return repository.config(repository.REPOSITORY, model)


def table(tensors) -> dict[str, tuple[str, list[int]]]:
    return {tensor.name: (model_config_pb2.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors}


@pytest.mark.parametrize("model", EXPECTED)
def test_the_inputs_are_the_fields_of_the_table_and_all_are_optional(model):
    assert table(config(model).input) == EXPECTED[model]
    assert all(tensor.optional for tensor in config(model).input)


@pytest.mark.parametrize("model", ["jax_lora", "llm"])
def test_the_outputs_are_those_of_the_table(model):
    assert {name: kind for name, (kind, _) in table(config(model).output).items()} == OUTPUTS


def test_the_ensemble_hands_every_input_to_both_steps_under_its_own_name():
    tokenizer, jax_lora = config("llm").ensemble_scheduling.step
    same = {name: name for name in TENSORS}
    assert (tokenizer.model_name, dict(tokenizer.input_map)) == ("tokenizer", same)
    assert (jax_lora.model_name, dict(jax_lora.input_map)) == ("jax_lora", same | {INPUT_IDS.name: INPUT_IDS.name})
    assert dict(tokenizer.output_map) == {INPUT_IDS.name: INPUT_IDS.name}
    assert dict(jax_lora.output_map) == {name: name for name in OUTPUTS}


def test_every_model_takes_the_same_number_of_rows():
    rows = {model: config(model).max_batch_size for model in EXPECTED}
    assert set(rows.values()) == {rows["llm"]} and rows["llm"] > 0


@pytest.mark.parametrize("model", ["tokenizer", "jax_lora"])
def test_requests_whose_lists_differ_in_length_can_come_together(model):
    assert {tensor.name for tensor in config(model).input if -1 in tensor.dims and not tensor.allow_ragged_batch} == set()


def test_only_the_model_that_streams_is_decoupled():
    decoupled = {model: config(model).model_transaction_policy.decoupled for model in repository.MODELS}
    assert decoupled == {model: model == "jax_lora" for model in repository.MODELS}


def test_every_parameter_is_a_setting():
    assert set(repository.parameters(repository.REPOSITORY)) <= set(Settings.names())


def test_what_an_adapter_is_checked_against_is_known_to_the_model_that_loads_it():
    checked, loads = (set(config(model).parameters) for model in ("adapters", "jax_lora"))
    assert checked <= loads


def test_models_that_disagree_on_a_parameter_are_told(tmp_path):
    for model, value in (("one", "3"), ("two", "4")):
        (tmp_path / model).mkdir()
        text = f'name: "{model}" parameters {{ key: "max_slots" value {{ string_value: "{value}" }} }}'
        (tmp_path / model / "config.pbtxt").write_text(text)
    assert repository.parameters(tmp_path, ("one",)) == {"max_slots": "3"}
    with pytest.raises(SetupError, match=r"max_slots: one/config.pbtxt says '3' and two/config.pbtxt '4'"):
        repository.parameters(tmp_path, ("one", "two"))


def test_a_malformed_config_is_told_with_its_line(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.pbtxt").write_text('name: "one"\nmax_batch: 3\n')
    with pytest.raises(SetupError, match="2:1.*max_batch"):
        repository.config(tmp_path, "one")


def test_a_copy_of_the_repository_has_the_models_and_no_adapters(tmp_path):
    source = tmp_path / "source"
    for file in ("adapters/config.pbtxt", "adapters/1/model.py", "adapters/users/alice/adapters/sql/1/adapter_config.json", "llm/users/x"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text("")
    copied = repository.copy(tmp_path / "copy", source)
    files = sorted(str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file())
    assert files == ["adapters/1/model.py", "adapters/config.pbtxt", "llm/users/x"]
