"""LoRA: train adapters (adapters), read LoRA files (read) and write them (write)."""
