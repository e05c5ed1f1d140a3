"""The megatron-core engine: train, score and value. `engine/` imports megatron-core, the modules beside it do not."""
