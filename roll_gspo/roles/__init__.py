"""What a model is for: a role is a strategy together with the algorithm it serves."""
