from __future__ import annotations

from roll_gspo.execution.local import LocalExecutor


class Role:
    def __init__(self, name: str, closed: list[str], fails: bool = False) -> None:
        self.name, self.closed, self.fails = name, closed, fails

    def close(self) -> None:
        self.closed.append(self.name)
        if self.fails:
            raise RuntimeError("engine is gone")


def test_roles_close_in_reverse_order_even_if_one_raises() -> None:
    executor, closed = LocalExecutor(), []
    actor = executor.start("actor_train", lambda: Role("actor_train", closed))
    assert isinstance(actor, Role)
    executor.start("actor_infer", lambda: Role("actor_infer", closed, fails=True))
    executor.close()
    executor.close()
    assert closed == ["actor_infer", "actor_train"]
