"""Plain transformers and torch: train, score, value and generate. The readable reference for the other engines."""
