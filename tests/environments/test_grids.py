"""The games on a grid: maps, moves, rewards, answers and optimal players."""

from __future__ import annotations

import random
from typing import Any

import pytest

from roll_gspo.environments.base import Reply
from roll_gspo.environments.frozen_lake import FrozenLake
from roll_gspo.environments.grid import GridGame, demonstration
from roll_gspo.environments.sokoban import Sokoban
from roll_gspo.environments.sokoban_rooms import Room, pushed, shortest_solution
from roll_gspo.errors import ConfigError

SMALL: dict[str, Any] = {"dim_room": [6, 6], "num_boxes": 1, "max_steps": 12}
GAMES = [(FrozenLake, {"is_slippery": False, "max_steps": 8}), (Sokoban, SMALL)]


def prompt_of(game: GridGame, seed: int) -> str:
    return game.reset({}, seed).messages[0]["content"]


def won_with_best_actions(game: GridGame, seed: int) -> tuple[int, list[Reply]]:
    """Play the best actions; return the number of turns and the replies."""
    game.reset({}, seed)
    replies: list[Reply] = []
    while not replies or not replies[-1].done:
        best = game.best_action()
        assert best is not None
        replies.append(game.step(game.text.answer_of(best)))
    return len(replies), replies


@pytest.mark.parametrize(("kind", "options"), GAMES)
def test_every_map_is_solved_by_search(kind: type[GridGame], options: dict[str, Any]):
    game = kind(**options)
    for seed in range(60):
        turns, replies = won_with_best_actions(game, seed)
        assert replies[-1].metrics == {"action_is_valid": 1.0, "action_is_effective": 1.0, "success": 1.0}
        assert turns <= options["max_steps"]


@pytest.mark.parametrize(("kind", "options"), GAMES)
def test_seed_determines_the_map(kind: type[GridGame], options: dict[str, Any]):
    first, second = kind(**options), kind(**options)
    prompts = [prompt_of(first, seed) for seed in range(20)]
    assert prompts == [prompt_of(second, seed) for seed in range(20)]
    assert len(set(prompts)) > 15


def test_room_of_rolls_default_size_has_a_solution():
    room = Sokoban(max_steps=40)
    for seed in range(3):
        room.reset({}, seed)
        assert not room.room.is_solved
        assert len(room.room.boxes) == 4


def lake(**options: Any) -> FrozenLake:
    game = FrozenLake(size=3, is_slippery=False, **options)
    game.reset({}, 0)
    game.player, game.goal, game.holes = (0, 0), (0, 2), frozenset({(1, 1)})
    return game


def test_lake_rewards_the_goal_only():
    game = lake()
    right = game.step("I go east. <answer> right </answer>")
    assert right.reward == 0.0
    assert right.messages[0]["content"] == "You moved: Right.\nMoves left: 19\n\n_PG\n_O_\n___"
    assert game.step("<answer>Right</answer>") == Reply(
        reward=1.0, done=True, metrics={"action_is_valid": 1.0, "action_is_effective": 1.0, "success": 1.0}
    )


def test_lake_ends_in_a_hole_and_at_the_edge_nothing_happens():
    game = lake()
    edge = game.step("<answer>Up</answer>")
    assert edge.messages[0]["content"].startswith("Up had no effect.")
    assert edge.metrics == {"action_is_valid": 1.0, "action_is_effective": 0.0}
    game.step("<answer>Down</answer>")
    hole = game.step("<answer>Right</answer>")
    assert (hole.reward, hole.done, hole.metrics["success"]) == (0.0, True, 0.0)
    assert game.cells() == [[1, 1, 3], [1, 4, 1], [1, 1, 1]]


def test_answer_without_an_action_costs_the_penalty():
    game = lake(format_penalty=-0.25, max_steps=2)
    reply = game.step("Right")
    assert (reply.reward, reply.invalid, reply.done) == (-0.25, True, False)
    assert reply.messages[0]["content"].startswith("Your answer names no action. Write for example <answer>Left</")
    assert game.step("<answer>Jump</answer>").done


def test_slippery_lake_moves_to_the_sides_but_never_back():
    game = FrozenLake(size=5, p=1.0)
    ends: list[tuple[int, int]] = []
    for seed in range(300):
        game.reset({}, seed)
        game.player, game.goal = (2, 2), (0, 0)
        game.step("<answer>Right</answer>")
        ends.append(game.player)
    counts = {end: ends.count(end) for end in set(ends)}
    assert counts.keys() == {(2, 3), (1, 2), (3, 2)}
    assert all(70 < count < 130 for count in counts.values())


def test_compact_style_is_rows_and_letters():
    game = lake(style="compact")
    assert game.step(" r").messages[0]["content"] == "_PG\n_O_\n___"
    assert game.step("Right").invalid
    assert game.step("R").reward == 1.0
    assert set(prompt_of(Sokoban(**SMALL, style="compact"), 1)) <= set("#_OXPS*\n")


def test_first_prompt_explains_rolls_symbols():
    prompt = prompt_of(Sokoban(**SMALL, grid_lookup=dict(zip("0123456", "W.GCBA@", strict=True))), 3)
    assert "Actions: Up, Down, Left, Right" in prompt
    rows = prompt.split("\n\n")[1].splitlines()
    assert [len(row) for row in rows] == [6] * 6
    assert rows[0] == rows[-1] == "WWWWWW"
    assert sum(row.count("B") for row in rows) == 1


def test_two_groups_of_a_pattern_are_a_thought_and_an_action():
    game = lake(action_pattern=r"<think>(.*?)</think>\s*<answer>(.*?)</answer>")
    assert game.step("<think>Down is a hole</think> <answer>Right</answer>").metrics["action_is_effective"] == 1.0
    assert game.step("<answer>Right</answer>").invalid


def room(*rows: str) -> Room:
    """Return the room of a drawing with ROLL's symbols."""
    cells = {(y, x): symbol for y, row in enumerate(rows) for x, symbol in enumerate(row)}
    targets, boxes = (frozenset(cell for cell, symbol in cells.items() if symbol in known) for known in ("OS", "X"))
    (player,) = (cell for cell, symbol in cells.items() if symbol in "PS")
    return Room(frozenset(cell for cell, s in cells.items() if s != "#"), targets, boxes, player)


def test_boxes_are_pushed_and_never_pulled_or_doubled():
    line = room("#######", "#PX_XO#", "#######")
    once = pushed(line, (0, 1))
    assert (once.player, once.boxes) == ((1, 2), {(1, 3), (1, 4)})
    assert pushed(once, (0, 1)) == once  # two boxes in a row
    back = pushed(once, (0, -1))
    assert (back.player, back.boxes) == ((1, 1), once.boxes)


def test_solver_finds_the_fewest_moves_and_lost_rooms():
    corner = room("######", "#P___#", "#_X__#", "#__O_#", "######")
    solution = shortest_solution(corner)
    assert solution is not None and len(solution) == 5
    assert shortest_solution(room("#####", "#XP_#", "#__O#", "#####")) is None


def test_sokoban_rewards_targets_and_steps():
    game = Sokoban(**SMALL)
    game.reset({}, 0)
    game.room = room("######", "#PXO_#", "#____#", "#____#", "#____#", "######")
    assert game.step("<answer>Right</answer>").reward == pytest.approx(-0.1 + 1 + 10)
    game.room = room("######", "#PXOX#", "#__O_#", "#____#", "#____#", "######")
    assert game.step("<answer>Right</answer>").reward == pytest.approx(-0.1 + 1)
    assert game.step("nothing").reward == pytest.approx(-0.1)


@pytest.mark.parametrize(("kind", "options"), GAMES)
def test_demonstration_is_an_episode_that_the_game_accepts(kind: type[GridGame], options: dict[str, Any]):
    game = kind(**options, style="compact")
    lengths = []
    for seed in range(10):
        messages = demonstration(game, seed, random.Random(seed))
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        game.reset({}, seed)
        replies = [game.step(message["content"]) for message in messages[1::2]]
        assert replies[-1].metrics["success"] == 1.0
        assert [reply.messages[0]["content"] for reply in replies[:-1]] == [m["content"] for m in messages[2::2]]
        lengths.append(len(messages))
    slips = [demonstration(game, seed, random.Random(seed), 0.5) for seed in range(10)]
    assert sum(map(len, slips)) != sum(lengths)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FrozenLake, {"style": "tiny"}, "env_config.style: unknown style 'tiny'; use full or compact"),
        (FrozenLake, {"render_mode": "rgb_array"}, "env_config.render_mode: 'rgb_array' is not supported; use text"),
        (FrozenLake, {"size": 1}, "env_config.p: 10000 maps with size 1 and p 0.8 have no path"),
        (
            FrozenLake,
            {"grid_lookup": {"0": "P"}},
            r"env_config.grid_lookup: has \[0\]; give a text for each of 0 \(P\)",
        ),
        (Sokoban, {"dim_room": [4, 4], "num_boxes": 4}, "env_config.num_boxes: no room of 4 x 4 cells with 4 boxes"),
        (Sokoban, {"action_lookup": {1: "Up", 2: "Under", 3: "L", 4: "R"}, "style": "compact"}, "begin alike"),
    ],
)
def test_impossible_options_are_refused(kind: type[GridGame], options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        kind(**options).reset({}, 0)
