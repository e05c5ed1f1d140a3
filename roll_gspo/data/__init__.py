"""Data: reading rows, builtin tasks, chat templates, and samplers of prompts and conversations."""
