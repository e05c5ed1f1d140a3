"""Training loops: what all of them share, and one folder per pipeline."""
