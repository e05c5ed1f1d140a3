"""Training loops: shared code, and one folder per pipeline."""
