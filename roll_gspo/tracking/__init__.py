"""Where figures go while a run lives: metrics.jsonl, rollout dumps, trackers, the console and run.log."""
