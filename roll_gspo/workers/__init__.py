"""Processes of this machine that run code of users and models: start, messages, output, limits, end."""
