"""Train, score and value with a transformers model whose parameters are sharded over the ranks."""
