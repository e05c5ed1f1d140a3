"""Roles: each combines a strategy with the algorithm that it serves."""
