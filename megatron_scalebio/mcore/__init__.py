"""Both models on Megatron-Core: the only folder that builds and drives its modules."""
