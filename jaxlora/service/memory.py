"""Whether a server with these settings fits the base model and the machine, told before anything is loaded.

Plain arithmetic on settings and the model's shape.
"""

from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.errors import SetupError
from jaxlora.int8_size import SCALE_BYTES, WEIGHT_BYTES
from jaxlora.kv_length import cache_length
from jaxlora.lora_size import fill_up
from jaxlora.settings import Settings

_BYTES = {"auto": 4, "float32": 4, "bfloat16": 2}  # `auto` at its largest, since the backend is not known yet


def check_length(settings: Settings, config: ModelConfig) -> None:
    """Raises SetupError if sequences may get longer than the base model's positions."""
    if settings.max_seq_len > config.max_positions:
        raise SetupError(f"MAX_SEQ_LEN: {settings.max_seq_len} is over the {config.max_positions} positions of the base model")


def memory_estimate(settings: Settings, config: ModelConfig) -> dict[str, int]:
    """Bytes by purpose: `weights`, `kv_cache`, `adapters` (the bank on the device), `history` (penalties) and `working`."""
    size = _BYTES[settings.dtype]
    linears = config.linear_paths()
    products = sum(at.in_features * at.out_features for at in linears.values())
    in_bank = [at for path, at in linears.items() if path != OUTPUT_LAYER or settings.lora_output_layer]
    rank_row = sum(at.in_features + fill_up(at.out_features) for at in in_bank)
    adapter_row = rank_row + SCALE_BYTES * len(in_bank) if settings.lora_quantization == "int8" else size * rank_row
    slots = settings.max_slots + settings.reserved_slots
    length = cache_length(settings.max_seq_len, settings.prefill_chunk)
    return {
        "weights": int(products * (WEIGHT_BYTES if settings.quantization == "int8" else size)) + size * config.vocab_size * config.hidden_size,
        "kv_cache": 2 * size * slots * length * config.num_layers * config.num_kv_heads * config.head_dim,
        "adapters": settings.lora_slots * fill_up(settings.max_lora_rank) * adapter_row,
        "history": 5 * slots * config.vocab_size,
        "working": 4 * 4 * settings.max_lora_rank * rank_row + 512 * 1024 * 1024,
    }
