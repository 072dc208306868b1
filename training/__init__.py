"""Fine-tuning of LoRA adapters on the served base model: one script a method (`python -m training.sft`), and what the scripts share.

Uses the forward pass of `jaxlora`. Knows no server: publishing goes through the adapter store and `client`.
"""
