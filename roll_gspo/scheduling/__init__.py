"""Scheduling of rollouts: staleness bounds, assignment of requests to engines, and simulation. Pure Python."""
