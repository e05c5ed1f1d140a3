"""Outputs during a run: metrics.jsonl, rollout files, trackers, the console and run.log."""
