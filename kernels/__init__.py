"""The operations that training spends its time in, one per file, each with its plain PyTorch reference."""
