"""Declarations of the functions behind `policy_loss`, `importance_sampling` and `adv_estimator`.

A decorator beside each function states what it needs and which keys of the configuration it reads. The schema, the plan
and the reference page read the declarations of shipped functions from their source text, which imports no torch. A
user's function is selected by its dotted path, and its module is imported.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from roll_gspo.errors import ConfigError, RollGspoError
from roll_gspo.registry import Registry, did_you_mean

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

CLIP_RANGE = ("pg_clip", "use_pg_clip_range", "pg_clip_low", "pg_clip_high")
DUAL_CLIP = ("dual_clip_loss", "dual_clip_ratio")
CRITIC = ("value_clip", "critic_warmup")

DECLARED: dict[Callable[..., Any], Declaration] = {}
"""The declaration of every decorated function that is imported."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Base of the decorators; arguments in shipped modules are literals, so that they can be read without an import.

    Attributes:
        name: value of the YAML key that selects a shipped function; empty for the name of the function.
        reads: keys of the configuration that the function reads from its settings. No key acts without a reader.
    """

    inputs: ClassVar[str] = ""
    name: str = ""
    reads: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the configuration that acts with this function."""
        return self.reads

    def __call__(self, function: AnyFunction) -> AnyFunction:
        """Attach this declaration to `function`."""
        DECLARED[function] = self
        return function


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Declaration):
    """Declares a policy loss `(terms: Terms, settings: PolicyLossSettings) -> (loss [B, T], clipped [B, T] bool)`.

    Attributes:
        needs_clip_range: reads `settings.clip_range`.
        clip_range: default (low, high) of the clip range, or None for that of the ratio.
        allows_dual_clip: `dual_clip_loss` may bound its result.
        needs_reference: reads `terms.ref_log_probs`; the reference model is built.
        own_ratio: how the loss computes the ratio of a whole response from the token ratios, or empty if it uses
            `terms.ratio`. Such a loss needs `importance_sampling: token`.
        averages_advantages: see `ImportanceRatio`; None if this depends on the ratio.
    """

    inputs: ClassVar[str] = "terms, settings"
    needs_clip_range: bool = False
    clip_range: tuple[float, float] | None = None
    allows_dual_clip: bool = False
    needs_reference: bool = False
    own_ratio: str = ""
    averages_advantages: bool | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """`reads`, and the keys of the clip range and of the dual clip if the loss has them."""
        return (
            *self.reads,
            *(CLIP_RANGE if self.needs_clip_range else ()),
            *(DUAL_CLIP if self.allows_dual_clip else ()),
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceRatio(Declaration):
    """Declares an importance ratio `(log_ratio [B, T], response_mask [B, T]) -> ratio [B, T]`.

    Attributes:
        scale: how far the ratio moves per update: `token` by tenths, `sequence` (a mean over tokens) by thousandths,
            empty if unknown. The plan warns of clip ranges that do not fit.
        clip_range: default (low, high) of the clip range, or None if it has no default.
        averages_advantages: the gradient of each token's ratio reaches all tokens of the sample. Every token is then
            trained by the mean of the sample's advantages, so that they must not differ by turn.
    """

    inputs: ClassVar[str] = "log_ratio, response_mask"
    scale: str = ""
    clip_range: tuple[float, float] | None = None
    averages_advantages: bool = False


@dataclass(frozen=True, kw_only=True)
class AdvantageEstimator(Declaration):
    """Declares an advantage estimator `(shaped: ShapedRewards, settings: AdvantageSettings) -> [B, T] or [B, 1]`.

    Attributes:
        needs_critic: reads `shaped.values`; the critic is built and trained on advantages plus values.
        compares_group: compares the samples of a prompt, of which there must be at least two. `reward_clip` then bounds
            the result.
        normalises_scores: defines how scores are normalised, so that `reward_norm` must be null.
        whitens: advantages are whitened by definition, whether or not `whiten_advantages` is set.
        whole_samples: why a turn of an episode cannot have its own advantage, or empty if it can. The estimator then
            gets every turn as a sample. One that needs a critic gets whole samples, with a reward per turn.
    """

    inputs: ClassVar[str] = "shaped, settings"
    needs_critic: bool = False
    compares_group: bool = False
    normalises_scores: bool = False
    whitens: bool = False
    whole_samples: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """`reads`, and the keys of the critic if the estimator needs one."""
        return (*self.reads, *(CRITIC if self.needs_critic else ()))


D = TypeVar("D", bound=Declaration)


class Functions(Registry, Generic[D]):
    """The functions that one YAML key selects: shipped ones by name, a user's function by dotted path.

    Args:
        kind: the YAML key; `{kind}_args` has the keyword arguments of a user's function.
        module: name of the module in `roll_gspo/algorithms/` that defines the shipped functions.
        declaration: the decorator.
    """

    def __init__(self, kind: str, module: str, declaration: type[D]) -> None:
        self._declaration = declaration
        self._shipped: dict[str, D] = {}
        targets = {}
        for function, declared in _read_source(Path(__file__).parent / "algorithms" / f"{module}.py", declaration):
            name = declared.name or function
            self._shipped[name] = declared
            targets[name] = f"roll_gspo.algorithms.{module}:{function}"
        super().__init__(kind, targets)

    def declaration(self, name: str) -> D:
        """Return what the function declares. Imports nothing for a shipped name.

        Raises:
            ConfigError: the name is unknown, or a user's function cannot be imported or has no declaration.
        """
        return self._shipped[name] if name in self._shipped else self._own_declaration(name)

    def load(self, name: str) -> Callable[..., Any]:
        """Import and return the function.

        Raises:
            ConfigError: the name is unknown, or importing a user's module failed.
        """
        try:
            return super().load(name)
        except RollGspoError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.kind}: importing '{name}' failed: {type(error).__name__}: {error}") from error

    def readers(self, key: str) -> list[str]:
        """Return the shipped names with which a key of the configuration acts; none if it acts with every one."""
        return [name for name, declared in self._shipped.items() if key in declared.keys]

    @cached_property
    def keys_read(self) -> tuple[str, ...]:
        """Every key that some shipped function declares."""
        return tuple(dict.fromkeys(key for declared in self._shipped.values() for key in declared.keys))

    def argument_problem(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return what is wrong with the keyword arguments of a user's function, or an empty string."""
        signature = inspect.signature(self.load(name))
        try:
            signature.bind(*self._declaration.inputs.split(", "), **arguments)
        except TypeError as error:
            known = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            unknown = [argument for argument in arguments if argument not in known]
            hint = did_you_mean(unknown[0], known) if unknown else ""
            inputs = ", ".join([self._declaration.inputs, *(["*"] if known else []), *known])
            return f"{error}{hint}; {name} takes ({inputs})"
        return ""

    def _own_declaration(self, name: str) -> D:
        declared = DECLARED.get(self.load(name))
        if not isinstance(declared, self._declaration):
            decorator = self._declaration.__name__
            raise ConfigError(
                f"{self.kind}: '{name}' has no declaration; decorate it with @{decorator}() of roll_gspo.declarations"
            )
        return declared


def _read_source(file: Path, decorator: type[D]) -> Iterator[tuple[str, D]]:
    """Yield (name of the function, declaration) of every function of a file that `decorator` decorates."""
    functions = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef))
    for function in functions:
        for call in function.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator.__name__:
                yield function.name, decorator(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


POLICY_LOSSES = Functions("policy_loss", "objective", PolicyLoss)
RATIOS = Functions("importance_sampling", "ratio", ImportanceRatio)
ADVANTAGE_ESTIMATORS = Functions("adv_estimator", "advantage_estimators", AdvantageEstimator)
EXTENSIBLE: Mapping[str, Functions[Any]] = {f.kind: f for f in (POLICY_LOSSES, RATIOS, ADVANTAGE_ESTIMATORS)}
"""The keys whose values may be the dotted path of a user's function."""
