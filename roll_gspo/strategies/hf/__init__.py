"""Plain transformers and torch: train, score, value and generate. The readable reference of the other engines."""
