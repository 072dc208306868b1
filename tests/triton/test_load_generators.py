"""What NVIDIA's load generators send is answered, and `make perf` reads what perf_analyzer leaves.

perf_analyzer sends the inputs of `bench.perf` as tensors of shape [1, 1]. genai-perf 0.0.16 (`--endpoint-type kserve --backend vllm`) has it send what its
`inputs/converters/vllm_converter.py` makes; aiperf 0.13.0 posts what `endpoints/template_endpoint.py` makes of `bench/aiperf.json`. Both were recorded.
"""

import json
from typing import Any

import numpy as np
import pytest

from bench import perf

from .conftest import ADAPTERS
from .harness import Grpc, Http

GENAI_PERF = {
    "text_input": ["and O courteous Tybalt honest gentleman"],
    "exclude_input_in_output": [True],
    "stream": [True],
    "sampling_parameters": ['{"max_tokens":"8"}'],
    "lora_name": ["alice/attention"],
}
AIPERF = {
    "text_input": "and O courteous Tybalt honest gentleman",
    "stream": True,
    "max_tokens": 8,
    "sampling_parameters": '{"ignore_eos": true}',
    "lora_name": "alice/attention",
}


def sent(grpc: Grpc, inputs: dict[str, list[Any]]) -> list[dict[str, list]]:
    """The responses to one entry of perf_analyzer's input data, with the shapes that it gives to inputs of a model with batches."""
    tensors = {
        name: (np.array([values], np.bool_ if isinstance(values[0], bool) else np.object_), "BOOL" if isinstance(values[0], bool) else "BYTES")
        for name, values in inputs.items()
    }
    return list(grpc.stream(tensors=tensors))


@pytest.mark.parametrize("names", [[""], ADAPTERS[:2]])
def test_perf_analyzer_gets_answers_of_the_length_and_adapters_that_it_asks_for(grpc, names):
    data = perf.input_data(["Once", "upon", "a time"], 8, names)["data"]
    assert [inputs["lora_name"] for inputs in data] == [[names[index % len(names)]] for index in range(3)]
    for inputs in data:
        *_, last = sent(grpc, inputs)
        assert last["num_output_tokens"] == [8] and last["adapter_name"] == [inputs["lora_name"][0].encode()]


def test_genai_perf_is_answered(grpc):
    responses = sent(grpc, GENAI_PERF)
    assert len(responses) > 1 and all(len(response["text_output"]) == 1 for response in responses)
    assert responses[-1]["adapter_name"] == [b"alice/attention"]


def test_aiperf_is_answered(server):
    responses = list(Http(server).stream(**AIPERF))
    assert len(responses) > 1 and all("text_output" in response for response in responses)
    assert responses[-1]["num_output_tokens"] == 8 and responses[-1]["adapter_name"] == "alice/attention"


def test_a_table_is_made_of_what_perf_analyzer_leaves(tmp_path):
    report, export = tmp_path / "report.csv", tmp_path / "export.json"
    report.write_text("Concurrency,Inferences/Second,Response Throughput,p50 latency\n4,2.784,44.5469,1670643\n")
    requests = [{"timestamp": 5_000_000, "response_timestamps": [5_000_000 + first, 5_000_000 + last]} for first, last in ((10**7, 10**8), (3 * 10**7, 3 * 10**8))]
    export.write_text(json.dumps({"experiments": [{"experiment": {"mode": "concurrency", "value": 4}, "requests": requests}]}))
    assert perf.measured(report, export) == ("2.8", "44.5", "200 / 290", "20 / 29")
