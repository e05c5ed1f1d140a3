"""`python -m roll_gspo.rewards try REWARD FILE`: score rows of a data file with a reward."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from roll_gspo.data.rows import DataRow, read_rows
from roll_gspo.errors import RollGspoError
from roll_gspo.printable import printable
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.rewards.spec import reward_spec

_MAX_CHARS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0 if every row has a score, 1 if a reward failed, 2 if the file or the reward cannot be used.
    """
    args = _parser().parse_args(arguments)
    try:
        rows = read_rows([args.file], "FILE")[: args.rows]
        spec = reward_spec(args.reward, args.args, "reward")
        with RewardPool(spec, 1, args.timeout_s, "reward") as pool:
            pool.check()
            results = pool.score([_request(row, args.response) for row in rows])
    except RollGspoError as error:
        print(printable(f"roll_gspo.rewards: {error}"), file=sys.stderr)
        return 2
    for row, result in zip(rows, results, strict=True):
        print(printable(_line(row, result)))
    return 1 if any(result.failed is not None for result in results) else 0


def _request(row: DataRow, response: str | None) -> RewardRequest:
    columns = row.columns
    truth = columns.pop("ground_truth")
    return RewardRequest(row.messages[-1]["content"], truth if response is None else response, truth, columns)


def _line(row: DataRow, result: RewardResult) -> str:
    head = f"{row.id}  ground truth {_short(row.ground_truth)}  "
    if result.failed is not None:
        return f"{head}failed: {result.failed}\n{result.traceback}".rstrip()
    components = "".join(f"  {name} {value:g}" for name, value in result.components.items())
    answer = "" if result.answer is None else f"  answer {_short(result.answer)}"
    return f"{head}score {result.score:g}{answer}{components}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.rewards", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("try", help="score rows of a file and print the results")
    command.add_argument("reward", help="worker_cls: a shipped reward, or module.function or module.Class")
    command.add_argument("file", help="data file, as in data_args.file_name")
    command.add_argument("--response", help="response to score for every row (default: the row's ground truth)")
    command.add_argument("--rows", type=int, default=8, help="number of rows (default 8)")
    command.add_argument("--args", type=_json_object, default={}, help="worker_args as JSON, e.g. '{\"limit\": 20}'")
    command.add_argument("--timeout-s", type=float, default=60.0, help="seconds per sample (default 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
