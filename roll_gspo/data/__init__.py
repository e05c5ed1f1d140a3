"""Prompts: reading rows, generated tasks, chat templates, and the order in which they are sampled."""
