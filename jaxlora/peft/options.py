"""Every option of `adapter_config.json`: which are applied, which change nothing, and why the others are refused.

From `LoraConfig` of peft 0.21.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxlora.peft.tensors import shorten

# Every field of LoraConfig with the value that leaves it out; this is also what `new_config` starts from.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Read by `AdapterConfig.from_dict`, or without any effect on a finished adapter.
_APPLIED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"}
_APPLIED |= {"layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
}
_WITHOUT_EFFECT |= {"megatron_core", "revision", "runtime_config", "task_type", "ensure_weight_tying", "eva_config"}
_WITHOUT_EFFECT |= {"loftq_config", "corda_config", "lora_ga_config"}  # used only by the `init_lora_weights` of the same name
_REASONS = {
    "alora_invocation_tokens": "activated LoRA applies from some tokens on",
    "bias": "trained biases are not applied",
    "fan_in_fan_out": "the adapter was made for a base model with transposed layers",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "the adapter was made for another stack of layers",
    "lora_bias": "biases of lora_B are not applied",
    "modules_to_save": "modules that were trained in full are not applied",
    "target_parameters": "only whole linear layers can be adapted",
    "trainable_token_indices": "trained embeddings are not applied",
    "use_dora": "DoRA is not plain LoRA",
    "use_qalora": "QALoRA is not plain LoRA",
}
# Initialisations that leave the base model as it is. The others move a part of the base weights into the adapter.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def refusals(raw: Mapping[str, Any]) -> list[str]:
    """Why a config can't be applied, for each option that would change the answer and is not applied here."""
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(raw.get('peft_type'))}, only LORA is served")
    for key, value in raw.items():
        if key in _APPLIED or key in _WITHOUT_EFFECT or value in (None, False, DEFAULTS.get(key)) or value in ([], {}, ""):
            continue
        reason = _REASONS.get(key, "it is not plain LoRA" if key in DEFAULTS else "this option is not known here")
        problems.append(f"{shorten(key)} is {shown(value)}, which can't be served: {reason}")
    init = raw.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        problems.append(
            f"init_lora_weights is {shown(init)}, which changes the base weights; convert the adapter to plain LoRA first"
            " (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    return problems


def shown(value: Any) -> str:
    """A value of the file as it may stand in a message."""
    return shorten(json.dumps(value, default=repr), 60)
