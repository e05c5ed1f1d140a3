"""Model architectures, sizes, tiny builtin models, and the mapping between weight layouts."""
