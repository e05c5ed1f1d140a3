"""Metrics of episodes by name, part of the table in `names.py`: (meaning, unit, reduction)."""

from __future__ import annotations

_EPISODES = "mean over episodes that did not fail"
_TURNS = "mean over turns"

EPISODE_METRICS: dict[str, tuple[str, str, str]] = {
    "episode/turns_mean": ("Answers of the model per episode.", "turns", _EPISODES),
    "episode/turns_max": ("Answers of the model in the longest episode.", "turns", "max over episodes"),
    "episode/tokens_per_turn": ("Sampled tokens per answer.", "tokens", _TURNS),
    "episode/given_tokens_fraction": (
        "Tokens of the responses that the environment gave. They are outside the loss.",
        "fraction",
        "mean over tokens after the first prompt",
    ),
    "episode/invalid_turns": ("Answers that the environment could not understand.", "fraction", _TURNS),
    "episode/branches_mean": (
        "Conversations per episode. An agent that rewrites its history begins another one; all are trained.",
        "conversations",
        _EPISODES,
    ),
    "episode/rewritten": (
        "Turns before which the chat template would have changed the recorded history.",
        "turns",
        "sum over the step",
    ),
    **{
        f"episode/end_{end}": (f"Episodes that ended because {meaning}.", "fraction", "mean over episodes")
        for end, meaning in (
            ("done", "the environment ended them"),
            ("max_turns", "they reached the limit of turns"),
            ("max_tokens", "they reached the limit of tokens"),
            ("timeout", "they reached the time limit"),
            ("failed", "the environment failed; no other metric counts them"),
        )
    },
    "environment/seconds": (
        "Time that environments took for their turns, summed over episodes.",
        "s",
        "sum over the step",
    ),
    "environment/hidden_share": (
        "Part of `environment/seconds` in which the engines sampled answers of other episodes.",
        "fraction",
        "over the seconds that environments took, summed",
    ),
}

EPISODE_PATTERNS: dict[str, tuple[str, str, str]] = {
    "env/<environment>/<name>": (
        "A number that an environment of `custom_envs` reports.",
        "of the environment",
        "mean over the turns that report it",
    ),
}
