"""Reinforcement learning from verifiable rewards."""
