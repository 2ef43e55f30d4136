"""Settings of an agent pool: workers of one kind, whose number follows a metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from nomad_watchdog.config.types import (
    Block,
    Fraction,
    Positive,
    Seconds,
    Size,
    Text,
    checked_url,
)
from nomad_watchdog.core.pool_scaling import Measure, ScalingRules
from nomad_watchdog.model import VerdictState
from nomad_watchdog.units import show

MAX_WORKERS: Final = 10_000
_PER_WORKER: Final = frozenset({"cpu", "memory"})
KNOWS: Final[Mapping[str, frozenset[str]]] = {
    "cpu": frozenset(),
    "memory": frozenset(),
    "prometheus": frozenset({"url", "query", "of", "token_file", "name"}),
    "queue": frozenset({"url", "value", "token_file", "name"}),
    "devices": frozenset({"verdict"}),
}
"""Kind of metric → the settings that it supports in addition to the common ones."""
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "prometheus": ("url", "query"),
    "queue": ("url", "value"),
    "devices": ("verdict",),
}
BACKENDS: Final = ("local", "nomad", "kubernetes")
Count = Annotated[int, Field(ge=0, le=MAX_WORKERS)]
Step = Annotated[int, Field(ge=1, le=MAX_WORKERS)]
_STEP: Final = r"[A-Za-z0-9_-]+(\[(\d{1,6}|[A-Za-z0-9_-]+=[^\[\]=]{1,128})\])*"


def checked_page(value: str) -> str:
    """A URL that may have a query. Raises ValueError."""
    page, separator, query = value.partition("?")
    checked_url(page)  # raises ValueError
    if separator and any(not "!" <= character <= "~" for character in query):
        raise ValueError(f"{show(value)}: a query holds no blanks; write %20")
    if "#" in query:
        raise ValueError("an address holds no fragment")
    return value


class MetricSettings(Block):
    """The metric that determines the size of a pool."""

    kind: Literal["cpu", "memory", "prometheus", "queue", "devices"]
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    url: Annotated[Text, AfterValidator(checked_page)] | None = None
    query: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    of: Literal["worker", "all"] | None = None
    value: Annotated[str, Field(pattern=rf"^{_STEP}(\.{_STEP})*$", max_length=512)] | None = None
    token_file: Text | None = None
    verdict: VerdictState | None = None
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")] | None = None
    timeout: Annotated[Positive, Field(le=60)] = 5.0

    @model_validator(mode="after")
    def _fits(self) -> MetricSettings:
        for setting in sorted(frozenset().union(*KNOWS.values())):
            given = getattr(self, setting) is not None
            if given and setting not in KNOWS[self.kind]:
                raise ValueError(f"{self.kind} knows no {setting}")
            if not given and setting in NEEDS.get(self.kind, ()):
                raise ValueError(f"{self.kind} needs {setting}")
        return self

    @property
    def measure(self) -> Measure:
        """Whether the metric is per worker or of all workers."""
        if self.kind in _PER_WORKER:
            return Measure.WORKER
        return Measure(self.of or "all")


class PoolSettings(Block):
    template: Text = ""
    command: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    image: Text | None = None
    env: dict[str, Text] = Field(default_factory=dict)
    variables: dict[str, Text] = Field(default_factory=dict)
    cpu: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    memory: Size = 128 * 1024 * 1024
    kill_timeout: Annotated[Positive, Field(le=3600)] = 30.0
    min: Count = 1
    max: Annotated[int, Field(ge=1, le=MAX_WORKERS)]
    scaler: Literal["builtin", "external", "none"] = "builtin"
    metric: Annotated[tuple[MetricSettings, ...], Field(max_length=1)] = ()
    interval: Annotated[Positive, Field(ge=0.1, le=3600)] = 10.0
    tolerance: Fraction = 0.1
    cooldown_up: Seconds = 30.0
    cooldown_down: Seconds = 120.0
    settle: Seconds = 120.0
    step_up: Step = 4
    step_down: Step = 1
    dry_run: bool = False

    @model_validator(mode="after")
    def _fits(self) -> PoolSettings:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        if self.scaler != "none" and not self.metric:
            raise ValueError(
                f'scaler = "{self.scaler}" needs a metric; add  metric "cpu" {{ target = 70 }}  or '
                'write  scaler = "none"'
            )
        if self.metric and self.scaler != "none":
            self.rules()
        return self

    def rules(self) -> ScalingRules:
        """The rules of the built-in scaler. Raises ValueError if they contradict each other."""
        (metric,) = self.metric
        return ScalingRules(
            minimum=self.min,
            maximum=self.max,
            target=metric.target,
            measure=metric.measure,
            tolerance=self.tolerance,
            cooldown_up_s=self.cooldown_up,
            cooldown_down_s=self.cooldown_down,
            settle_s=self.settle,
            step_up=self.step_up,
            step_down=self.step_down,
            dry_run=self.dry_run,
        )

    def worker_hash(self, template: str) -> str:
        """A hash that changes when running workers must be replaced. `template`: the text of the file."""
        what: list[object] = [template, self.command, self.image, self.env, self.variables]
        what += [self.cpu, self.memory, self.kill_timeout]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def misfits(self, backend: str) -> Iterator[tuple[str, str]]:
        """(setting, message) for each setting that does not fit the backend or the scaler."""
        if backend not in BACKENDS:
            yield (
                "max",
                f"can't be kept: backend {backend} knows no pools; {', '.join(BACKENDS)} do",
            )
        yield from self._program_misfits(backend)
        if backend == "local" and self.scaler == "external":
            yield "scaler", 'is "external"; local has no other scaler: "builtin" or "none"'
        if self.scaler != "builtin" and self.dry_run:
            yield "dry_run", 'is true, which only scaler = "builtin" heeds'
        if self.scaler == "external" and self.metric:
            yield from self._external_misfits(backend, self.metric[0])

    def _program_misfits(self, backend: str) -> Iterator[tuple[str, str]]:
        if backend == "local" and not self.command:
            yield "command", 'is empty; local starts  command = ["PROGRAM", "ARGUMENT"]'
        if backend == "kubernetes" and not self.image:
            yield "image", 'is missing; kubernetes runs  image = "REGISTRY/NAME:VERSION"'
        if backend == "nomad" and not (self.command or self.template or self.image):
            yield "command", "is empty; nomad needs command, image or template"

    def _external_misfits(self, backend: str, metric: MetricSettings) -> Iterator[tuple[str, str]]:
        kind = metric.kind
        if kind == "devices" or (kind == "queue" and backend == "nomad"):
            yield "scaler", f'is "external", which can\'t read metric "{kind}"; "builtin" can'
        if backend == "kubernetes" and self.min < 1:
            yield "min", 'is 0; with scaler = "external" kubernetes needs 1 or more'
        if backend == "kubernetes" and kind not in _PER_WORKER and not metric.name:
            yield "metric", f'"{kind}" needs name: what the metrics adapter calls it'
