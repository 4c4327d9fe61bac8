"""The load: a frozen scenario, read from YAML (units may be included, as in recipes)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.trace import rows
from pdtrim_deploy.recipe.bounds import MOST_CLIENTS, MOST_REQUESTS, MOST_SECONDS, MOST_TOKENS
from pdtrim_deploy.recipe.yaml_errors import sentence
from pdtrim_deploy.recipe.yaml_units import Origins, compose

WARM_CLIENTS, WARM_SEED = 4, 1 << 30
MOST_SPREAD = 3.0  # of a logarithm: e^3 is a factor of 20
_TAKES = {
    "constant": {"rate"},
    "poisson": {"rate"},
    "ramp": {"rate", "to_rate"},
    "concurrency": {"clients"},
}
_SHAPES = {
    "fixed": {"tokens"},
    "uniform": {"low", "high"},
    "normal": {"tokens", "spread", "low", "high"},
    "lognormal": {"tokens", "spread", "low", "high"},
}

_Rate = Annotated[float, Field(gt=0, le=100_000)]
_Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
_Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def _require(self, kind: str, allowed: set[str], optional: frozenset[str] = frozenset()) -> None:
        """Check that exactly the keys that `kind` needs are given; some are optional."""
        present = {name for name in type(self).model_fields if name != "kind" and getattr(self, name) is not None}
        for name in sorted(present - allowed):
            raise ValueError(f"kind is {kind!r}, which takes no {name}; allowed with it: {', '.join(sorted(allowed))}")
        for name in sorted(allowed - optional - present):
            raise ValueError(f"kind is {kind!r}, which needs {name}; allowed with it: {', '.join(sorted(allowed))}")


class Arrivals(_Section):
    """When requests are sent.

    `constant`, `poisson` (open loops): `rate` requests a second, whatever the server does. `ramp`: Poisson, the rate
    going from `rate` to `to_rate` evenly over the scenario's duration. `concurrency` (closed loop): `clients`, each
    with one request in flight.
    """

    kind: Literal["constant", "poisson", "ramp", "concurrency"] = "concurrency"
    rate: _Rate | None = None
    to_rate: _Rate | None = None
    clients: Annotated[int, Field(ge=1, le=MOST_CLIENTS)] | None = None

    @model_validator(mode="after")
    def _meaningful(self) -> Arrivals:
        self._require(self.kind, _TAKES[self.kind])
        return self


class Lengths(_Section):
    """A distribution of token counts.

    `fixed`: `tokens`. `uniform`: `low` to `high`, both possible. `normal`: mean `tokens`, standard deviation `spread`
    in tokens. `lognormal`: median `tokens`, standard deviation `spread` of the natural logarithm. The last two are
    clipped to `low` ... `high`.
    """

    kind: Literal["fixed", "uniform", "normal", "lognormal"] = "fixed"
    tokens: _Tokens | None = None
    spread: Annotated[float, Field(gt=0, le=MOST_TOKENS)] | None = None
    low: _Tokens | None = None
    high: _Tokens | None = None

    @model_validator(mode="after")
    def _meaningful(self) -> Lengths:
        open_ended = self.kind in ("normal", "lognormal")
        self._require(self.kind, _SHAPES[self.kind], frozenset({"low", "high"} if open_ended else ()))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low} but high is {self.high}; allowed: low of at most high")
        if self.kind == "lognormal" and self.spread is not None and self.spread > MOST_SPREAD:
            raise ValueError(f"spread is {self.spread:g}, of the natural logarithm; allowed: up to {MOST_SPREAD:g}")
        return self

    @classmethod
    def between(cls, low: int, high: int) -> Lengths:
        """`low` to `high`, drawn evenly."""
        return cls(kind="fixed", tokens=low) if low == high else cls(kind="uniform", low=low, high=high)


class Prefixes(_Section):
    """Text that requests share: each begins, with probability `share`, with one of `count` texts of `tokens` tokens.

    The prefix comes before the request's own `input`.
    """

    count: PositiveInt = 1
    tokens: _Tokens
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Conversations(_Section):
    """Requests come in conversations of `turns` turns.

    A turn's prompt is all the text before it, the answers among it, and its own `input`; it is sent when the turn
    before it has its answer. Arrivals are those of conversations. One whose turn fails ends, and so do all when the
    load's `duration_s` is over.
    """

    turns: Annotated[int, Field(ge=2, le=1000)]


class Trace(_Section):
    """Requests of a JSON-lines file as Mooncake publishes them, instead of arrivals and lengths.

    Each line has `timestamp` (ms), `input_length`, `output_length` and, optionally, `hash_ids`: one id for each block
    of `block_tokens` prompt tokens; equal ids are equal text. `speed` 2 replays twice as fast; `scale` 0.1 makes
    prompts, answers and blocks a tenth as long, which keeps what is shared.
    """

    path: str
    speed: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    block_tokens: _Tokens = 512


class SLO(_Section):
    """A request is good when its TTFT and its mean ITL are within these (milliseconds)."""

    ttft_ms: PositiveFloat | None = None
    itl_ms: PositiveFloat | None = None


class Scenario(_Section):
    """One load.

    Attributes:
        requests: number of requests; duration_s: time in which they are sent. Either ends the load, or a trace's end.
        warmup: requests before the measurement starts; no figure counts them.
        deadline_s: of each request, from its sending to its last token.

    """

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="lower-case letters, digits, dots and dashes")
    ]
    arrivals: Arrivals = Arrivals(clients=4)
    input: Lengths = Lengths(tokens=320)
    output: Lengths = Lengths(tokens=24)
    prefixes: Prefixes | None = None
    conversations: Conversations | None = None
    trace: Trace | None = None
    requests: Annotated[int, Field(ge=1, le=MOST_REQUESTS)] | None = None
    duration_s: _Seconds | None = None
    warmup: Annotated[int, Field(ge=0, le=MOST_REQUESTS)] = 2
    deadline_s: _Seconds = 300.0
    slo: SLO = SLO()
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _meaningful(self) -> Scenario:
        if self.trace is not None:
            refused = sorted({"arrivals", "input", "output", "prefixes", "conversations"} & self.model_fields_set)
            if refused:
                raise ValueError(f"trace sets times and lengths of the requests; leave out {', '.join(refused)}")
        elif self.requests is None and self.duration_s is None:
            raise ValueError("requests is missing; allowed: requests, duration_s or both, whichever ends first")
        elif self.arrivals.kind == "ramp" and self.duration_s is None:
            raise ValueError("duration_s is missing; allowed with arrivals of kind 'ramp': a number above 0")
        return self

    @classmethod
    def load(cls, path: Path) -> Scenario:
        """Read a scenario and its trace, whose path is made absolute; UserError names file, key and what is allowed."""
        data, origins = compose(path, "scenario")
        scenario = cls._parse(data, origins)
        if scenario.trace is None:
            return scenario
        file = origins.file_of(("trace", "path")).parent / scenario.trace.path
        if not file.is_file():
            raise UserError(f"{path}: trace.path names {scenario.trace.path}, which is not a file; check the path")
        for _ in rows(file):
            pass  # report an invalid line now, not during the load
        return scenario.changed(trace=scenario.trace.model_copy(update={"path": str(file.resolve())}))

    @classmethod
    def closed(
        cls,
        requests: int = 32,
        clients: int = 4,
        input: tuple[int, int] = (320, 320),
        output: tuple[int, int] = (24, 24),
        **more: object,
    ) -> Scenario:
        """A closed loop of so many requests; `more` are other keys of a scenario."""
        keys = {"name": "options", "requests": requests, "arrivals": Arrivals(clients=clients)} | more
        return cls.model_validate(keys | {"input": Lengths.between(*input), "output": Lengths.between(*output)})

    def warming(self) -> Scenario:
        """A closed loop of `warmup` requests (at least one) of these lengths, with texts that no load uses."""
        arrivals = Arrivals(clients=self.arrivals.clients or WARM_CLIENTS)
        ends = {"requests": max(1, self.warmup), "duration_s": None, "warmup": 0, "seed": WARM_SEED}
        return self.changed(arrivals=arrivals, trace=None, conversations=None, **ends)

    def changed(self, **values: object) -> Scenario:
        """The same scenario with other values of the same types."""
        return self.model_copy(update=values)

    def to_yaml(self) -> str:
        """The resolved scenario, without keys that are not set."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    @classmethod
    def _parse(cls, data: dict[str, object], origins: Origins) -> Scenario:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(sentence(cls, error, origins)) from None
