"""Makes the folders in tests/references/peft with PEFT itself, and records what PEFT made of them.

In an environment with torch, transformers and peft:

    python tests/references/make_peft_folders.py

Each folder is an adapter on a tiny random Llama (`TINY`, the same as in tests/adapter_folders.py). `recorded.json` beside them
holds, for each, rank and scale of every module that PEFT adapts.
"""

import json
import pathlib
import shutil

import peft
import torch
import transformers

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all_linear_rslora": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3, "^model.layers.2.self_attn.v_proj": 1},
        "alpha_pattern": {"self_attn.k_proj": 3, r"layers\.(0|2)\..*_proj": 5},
        "use_rslora": True,
    },
    "regex": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[12]\.(self_attn\.[qv]|mlp\.down)_proj"},
    "some_layers": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one_layer_by_pattern": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "excluded": {"r": 2, "lora_alpha": 4, "target_modules": ALL, "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]},
    "full_paths": {"r": 2, "lora_alpha": 4, "target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.gate_proj"]},
    "output_layer": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"]},
    "bfloat16": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    "float16": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    "gaussian": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    # Refused: their answers need more than y = Wx + sBAx.
    "refused_dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": True},
    "refused_pissa": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "refused_olora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "olora"},
    "refused_modules_to_save": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "refused_lora_bias": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_bias": True},
    "refused_embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "refused_trainable_tokens": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "refused_replication": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layer_replication": [[0, 3], [2, 3]]},
}


def make(folder: pathlib.Path, name: str, options: dict) -> dict[str, list[float]]:
    """Writes one adapter with random weights; returns rank and scale by module path, as PEFT has them after loading it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    if name in ("bfloat16", "float16"):
        model.to(getattr(torch, name))
    model.save_pretrained(folder, save_embedding_layers=False if name == "output_layer" else "auto")
    (folder / "README.md").unlink(missing_ok=True)
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), folder)
    return {
        key.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
        for key, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and "default" in module.r
    }


def main() -> None:
    here = pathlib.Path(__file__).parent / "peft"
    shutil.rmtree(here, ignore_errors=True)
    recorded = {name: make(here / name, name, options) for name, options in CONFIGS.items()}
    (here / "recorded.json").write_text(json.dumps({"peft": peft.__version__, "modules": recorded}, indent=1))


if __name__ == "__main__":
    main()
