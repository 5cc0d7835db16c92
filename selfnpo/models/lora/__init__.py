"""LoRA: adapters to train (adapters), files of others (read), files of ours (write)."""
