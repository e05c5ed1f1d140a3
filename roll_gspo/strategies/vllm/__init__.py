"""The vLLM engine: generate. `engine/` imports vLLM, the modules beside it do not."""
