"""Programs that solve a task, with unit tests that use many features of Python and pytest.

Each entry is (program, tests). Tests that are a pair are `check(candidate)` and the name of the function.
"""

from __future__ import annotations

HONEST = {
    "printed": (
        """
import sys
print("loaded")
def hello(name):
    print("Hello", name)
    sys.stdout.buffer.write(b"!")
""",
        """
import io
from contextlib import redirect_stdout
from unittest.mock import patch
from solution import hello
def test_capsys(capsys):
    hello("Ann")
    assert capsys.readouterr().out == "Hello Ann\\n!"
def test_redirect():
    out = io.StringIO()
    with redirect_stdout(out):
        hello("Bo")
    assert out.getvalue().startswith("Hello Bo")
def test_patch():
    with patch("sys.stdout", new=io.StringIO()) as out:
        hello("Cy")
    assert "Cy" in out.getvalue()
""",
    ),
    "float": (
        """
def mean(x): return sum(x)/len(x)
""",
        """
import math
assert math.isclose(mean([1,2]), 1.5)
assert abs(mean([1,2,6]) - 3.0) < 1e-9
assert isclose(mean([2]), 2)
""",
    ),
    "sorted": (
        """
def uniq(x): return set(x)
""",
        """
assert sorted(set(uniq([3,1,3]))) == [1,3]
assert len(uniq([1]) - {1}) == 0
assert not uniq([1]) ^ {1}
assert 3 in uniq([3])
""",
    ),
    "gen": (
        """
def fib():
    a, b = 0, 1
    while True:
        yield a
        a, b = b, a + b
""",
        """
from itertools import islice
import types
assert list(islice(fib(), 5)) == [0,1,1,2,3]
g = fib()
assert next(g) == 0 and next(g) == 1
assert isinstance(g, types.GeneratorType)
assert [x for x, _ in zip(fib(), range(3))] == [0,1,1]
""",
    ),
    "unittest": (
        """
def add(a,b): return a+b
class Stack:
    def __init__(self): self.items=[]
    def push(self,x): self.items.append(x)
    def pop(self):
        if not self.items: raise IndexError('pop from empty stack')
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self,x): return x in self.items
    def __iter__(self): return iter(self.items)
    def __str__(self): return f'Stack{self.items}'
    def count(self, x): return self.items.count(x)
""",
        """
import unittest
from solution import *
class TestAdd(unittest.TestCase):
    def setUp(self):
        self.stack = Stack()
    def test_add(self):
        self.assertEqual(add(1,2), 3)
        with self.assertRaises(TypeError):
            add(1,'a')
    def test_stack(self):
        self.stack.push(3)
        self.assertEqual(len(self.stack), 1)
        self.assertIn(3, self.stack)
        self.assertEqual(list(self.stack), [3])
        self.assertEqual(str(self.stack), 'Stack[3]')
        self.assertEqual(self.stack.count(3), 1)
        self.assertEqual(self.stack.pop(), 3)
        self.assertRaisesRegex(IndexError, 'empty', self.stack.pop)
        self.assertIsInstance(self.stack, Stack)
class More(unittest.IsolatedAsyncioTestCase):
    async def test_it(self): self.assertTrue(add(1,1) == 2)
if __name__ == '__main__':
    unittest.main()
""",
    ),
    "dataclass": (
        """
from dataclasses import dataclass, field
@dataclass
class P:
    x: int
    y: int = 0
    tags: list = field(default_factory=list)
def add(a, b): return P(a.x+b.x, a.y+b.y)
def move(p): p.x += 1
@dataclass(order=True, frozen=True)
class Q:
    v: float
    def double(self): return Q(self.v*2)
""",
        """
from solution import P, Q, add, move
assert add(P(1,2), P(3,4)) == P(4,6)
p = P(1)
move(p)
assert p.x == 2 and p.tags == [] and p != P(1)
assert repr(P(1,2)) == 'P(x=1, y=2, tags=[])'
assert isinstance(add(p, p), P)
assert Q(2.0).double().v == 4.0
""",
    ),
    "enum": (
        """
from enum import Enum
class Color(Enum):
    RED = 1
    GREEN = 2
def nxt(c): return Color.GREEN if c is Color.RED else Color.RED
""",
        """
assert nxt(Color.RED) == Color.GREEN
assert nxt(Color.GREEN) is Color.RED and Color.RED.value == 1 and Color['RED'].name == 'RED'
""",
    ),
    "named": (
        """
from collections import namedtuple
from typing import NamedTuple
Point = namedtuple('Point', 'x y')
class N(NamedTuple):
    a: int
def swap(p): return Point(p.y, p.x)
""",
        """
assert swap(Point(1,2)) == Point(2,1)
assert swap(Point(1,2)).x == 2
assert N(3).a == 3
""",
    ),
    "async": (
        """
import asyncio
async def later(x):
    await asyncio.sleep(0.001)
    if x < 0: raise ValueError('neg')
    return x
async def agen(n):
    for i in range(n): yield i
class C:
    async def __aenter__(self): return self
    async def __aexit__(self, *a): return False
    async def get(self): return 5
""",
        """
import asyncio, pytest
from solution import later, agen, C
def test_run(): assert asyncio.run(later(3)) == 3
@pytest.mark.asyncio
async def test_all():
    assert await asyncio.gather(later(1), later(2)) == [1,2]
    with pytest.raises(ValueError, match='neg'):
        await later(-1)
    coro = later(-1)
    with pytest.raises(ValueError):
        await coro
    assert [x async for x in agen(3)] == [0,1,2]
    async with C() as c:
        assert await c.get() == 5
    assert await asyncio.wait_for(later(4), 1) == 4
""",
    ),
    "context": (
        """
from contextlib import contextmanager
class T:
    def __init__(self): self.log = []
    def __enter__(self): self.log.append('in'); return self
    def __exit__(self, kind, error, tb):
        self.log.append(kind.__name__ if kind else 'out')
        return kind is ValueError
@contextmanager
def tag(name):
    yield name * 2
""",
        """
from solution import T, tag
def test_a():
    t = T()
    with t as u:
        assert u is t
    with T() as v:
        raise ValueError('x')
    assert v.log == ['in', 'ValueError']
    assert t.log == ['in', 'out']
    with tag('a') as a:
        assert a == 'aa'
""",
    ),
    "check": (
        """
def f(x): return x*2
""",
        (
            """
def check(candidate):
    assert candidate(2) == 4
    for i in range(3): assert candidate(i) == 2*i
""",
            "f",
        ),
    ),
    "linked": (
        """
class Node:
    def __init__(self, v, n=None): self.val=v; self.next=n
def build(xs):
    head=None
    for x in reversed(xs): head=Node(x, head)
    return head
def rev(h):
    p=None
    while h: h.next, p, h = p, h, h.next
    return p
def vals(h):
    out=[]
    while h is not None: out.append(h.val); h = h.next
    return out
""",
        """
from solution import build, rev, vals, Node
def test_a():
    h = rev(build([1,2,3]))
    assert h.val == 3 and h.next.next.val == 1 and h.next.next.next is None
    assert vals(Node(1, Node(2))) == [1,2]
class ListNode:
    def __init__(self, val=0, next=None): self.val=val; self.next=next
    def __eq__(self, o): return isinstance(o, ListNode) and self.val == o.val
def test_b():
    h = ListNode(1, ListNode(2))
    r = rev(h)
    assert r.val == 2 and r.next is h and r == ListNode(2)
    out = []
    while r: out.append(r.val); r = r.next
    assert out == [2, 1]
""",
    ),
    "try": (
        """
def f(x):
    if x < 0: raise ValueError('neg')
    return x
""",
        """
import pytest
from solution import f
def test_a():
    try:
        f(-1)
        assert False
    except ValueError as e:
        assert str(e) == 'neg'
def test_b():
    try:
        f(-1)
        pytest.fail('x')
    except ValueError:
        pass
def test_c(): f(3)
def helper(a): assert f(a) == a
def test_d():
    for i in range(3): helper(i)
""",
    ),
    "fixtures": (
        """
def f(path): return open(path).read().upper()
def g(n): return n
""",
        """
import pytest
from solution import g
@pytest.fixture(params=[1,2])
def n(request): return request.param
@pytest.fixture(autouse=True)
def setup(): yield
def test_a(n, tmp_path, monkeypatch): assert g(n) == n
@pytest.mark.parametrize('a', [pytest.param(1, id='one'), 2])
@pytest.mark.parametrize('b', [3])
def test_b(a, b): assert g(a) + g(b) == a + b
@pytest.mark.skip
def test_c(): assert False
@pytest.mark.xfail
def test_d(): assert False
@pytest.mark.timeout(5)
def test_e(): assert g(1) == pytest.approx(1)
class TestX:
    @pytest.fixture
    def v(self): return 5
    def setup_method(self, m): self.z = 1
    def test_v(self, v): assert g(v) == 5 * self.z
""",
    ),
    "big": (
        """
def f(n): return 10**n
""",
        """
assert f(6000) == 10**6000
assert len(str(f(5000))) == 5001
assert f(-1) == 0.1
""",
    ),
    "callbacks": (
        """
def apply(f, *xs, key=None): return [f(x) for x in xs]
def compose(f, g): return lambda x: f(g(x))
def memo(f):
    c={}
    def w(x):
        if x not in c: c[x]=f(x)
        return c[x]
    return w
""",
        """
from solution import apply, compose, memo
calls = []
def sq(x):
    calls.append(x)
    return x*x
def test_a():
    assert apply(lambda x: x+1, 1, 2) == [2,3]
    assert compose(str, abs)(-3) == '3'
    m = memo(sq)
    assert m(3) == 9 and m(3) == 9 and calls == [3]
    assert callable(m)
""",
    ),
    "shadow": (
        """
result = 0
def sum(a, b): return a + b
""",
        """
result = sum(1, 2)
assert result == 3
""",
    ),
    "exceptions": (
        """
class AppError(Exception):
    def __init__(self, code):
        self.code = code
    def __str__(self): return f'code {self.code}'
class Sub(AppError): pass
def f(x): raise Sub(x)
""",
        """
import pytest
from solution import *
def test_a():
    with pytest.raises(AppError, match='code 3') as info: f(3)
    assert info.value.code == 3 and info.type is Sub and issubclass(Sub, AppError) and str(info.value) == 'code 3'
    with pytest.raises(Exception): raise AppError(1)
    assert AppError(2).code == 2
""",
    ),
    "inherit": (
        """
from abc import ABC, abstractmethod
class Shape(ABC):
    @abstractmethod
    def area(self): ...
class Sq(Shape):
    def __init__(self, a): self.a=a
    def area(self): return self.a**2
    @property
    def side(self): return self.a
    @classmethod
    def unit(cls): return cls(1)
    @staticmethod
    def name(): return 'sq'
def make(kind): return Sq(2)
""",
        """
import pytest
from solution import Shape, Sq, make
def test_a():
    s = Sq(3)
    assert s.area() == 9 and s.side == 3 and isinstance(s, Shape) and issubclass(Sq, Shape)
    assert Sq.unit().area() == 1 and Sq.name() == 'sq' and make('x').area() == 4
    with pytest.raises(TypeError): Shape()
    assert not isinstance(3, Sq) and hasattr(s, 'area') and not hasattr(s, 'foo')
""",
    ),
    "guard": (
        """
def square(x): return x*x
""",
        """
from solution import square
if __name__ == '__main__':
    assert square(2) == 4
""",
    ),
    "print": (
        """
class A:
    pass
def f(): return A()
""",
        """
r = f()
print(r, repr(r), f'{r}')
assert r is not None
""",
    ),
    "np": (
        """
import numpy as np
def f(x): return np.array(x) * 2
def g(x): return np.float32(x)
def s(a): a[0] = 9
""",
        """
import numpy as np
from solution import f, g, s
def test_a():
    assert np.array_equal(f([1,2]), np.array([2,4]))
    assert (f([1,2]) == [2,4]).all()
    np.testing.assert_allclose(f([0.5]), [1.0])
    assert f([[1]]).shape == (1,1) and f([1]).dtype == np.int64
    assert isinstance(g(1), np.float32) and g(1) == 1.0
    a = np.zeros(2)
    s(a)
    assert a[0] == 9 and f(np.ones(2)).tolist() == [2.0, 2.0]
""",
    ),
    "mod": (
        """
import numpy as np
def f(x): return x
""",
        """
assert np.array_equal(f(np.ones(2)), np.ones(2))
assert os.path.join('a', f('b')) == 'a/b'
""",
    ),
    "misc": (
        """
import re, datetime as d
from collections import *
def pat(): return re.compile('a+')
def day(): return d.datetime(2020,1,2,tzinfo=d.timezone.utc)
def cnt(s): return Counter(s)
def dd(s):
    r = defaultdict(list)
    r[s].append(1)
    return r
def ks(x): return x.keys()
def mp(x): return map(str, x)
def nested(): return {'a': (1, [b'x', {2.5}])}
def kw(*, a=1, **k): return {'a': a, **k}
""",
        """
from solution import *
from datetime import *
assert pat().match('aab') and day() == datetime(2020,1,2,tzinfo=timezone.utc)
assert cnt('aab') == {'a':2,'b':1} and cnt('aab').most_common(1) == [('a',2)]
assert dd('x')['x'] == [1] and list(ks({1:2})) == [1] and list(mp([1])) == ['1']
assert nested() == {'a': (1, [b'x', {2.5}])} and kw(a=2, b=3) == {'a':2,'b':3}
""",
    ),
    "solutionclass": (
        """
class Solution:
    def partition(self, s): return [s]
    def count(self, n): return n
""",
        """
from solution import Solution
def test_a():
    assert Solution().partition('a') == ['a']
    s = Solution()
    assert s.count(3) == 3
""",
    ),
    "vector": (
        """
class Vector:
    def __init__(self, *xs): self.xs = xs
    def __add__(self, o): return Vector(*(a+b for a,b in zip(self.xs,o.xs)))
    def __getitem__(self, i): return self.xs[i]
    def __len__(self): return len(self.xs)
    def __repr__(self): return f'Vector{self.xs}'
""",
        """
v = Vector(1,2) + Vector(3,4)
assert v.xs == (4,6) and v[0] == 4 and len(v) == 2 and repr(v) == 'Vector(4, 6)'
""",
    ),
    "iterclass": (
        """
class Count:
    def __init__(self, n): self.n, self.i = n, 0
    def __iter__(self): return self
    def __next__(self):
        if self.i >= self.n: raise StopIteration
        self.i += 1
        return self.i
""",
        """
assert list(Count(3)) == [1,2,3]
c = Count(1)
assert next(c) == 1
assert sum(Count(4)) == 10
""",
    ),
    "exc_or_none": (
        """
def f(x):
    raise ValueError
""",
        """
def test_a():
    try:
        assert f(0) is None
    except ValueError:
        pass
""",
    ),
}
