"""The host of the two models: the only folder that builds and drives Megatron-Core modules."""
