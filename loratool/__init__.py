"""loratool reads, writes and computes with LoRA-family adapters."""

__version__ = "0.1.0"
