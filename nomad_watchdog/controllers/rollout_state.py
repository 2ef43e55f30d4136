"""What the registry stores of the roll-outs of a class: the proven spec, the progress of the next one, and the past."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from dataclasses import dataclass, replace
from typing import Annotated, Final

from pydantic import BeforeValidator, TypeAdapter

from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.model import AgentSpec, WallTime
from nomad_watchdog.registry.document import DocumentFormat
from nomad_watchdog.schedulers import agent_zipapp, job_templates
from nomad_watchdog.schedulers.agent_document import spec_fields, stored_spec

MAX_TEXT: Final = 10 * 1024
"""Maximum length of the stored text of a template, compressed and in base64, characters. Two must fit into a document."""
_MAX_TEMPLATE: Final = 512 * 1024
"""Maximum length of a template's text, bytes."""
MAX_PAST: Final = 10
"""Roll-outs that are remembered."""
MAX_UNWELL: Final = 1500
"""Devices of a step that are stored because they were not well before it."""

_Spec = Annotated[AgentSpec | None, BeforeValidator(spec_fields)]


@dataclass(frozen=True, slots=True)
class PastRollout:
    """A roll-out that is over."""

    version: str
    spec: str
    """Hash of the spec."""
    outcome: str
    """done, aborted or undone."""
    at: WallTime
    why: str = ""
    by: str = ""
    """The user who requested it; "" = nobody."""


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What the registry stores for a class."""

    good: _Spec = None
    """The proven spec."""
    template: str = ""
    """Digest of its template's text."""
    text: str = ""
    """The text of its template, packed (`packed`); "" = it is built in, or too long."""
    agent_file: str = ""
    """As `AgentSpec.agent_file`."""
    bad: str = ""
    """Hash of the spec that was given up."""
    why: str = ""
    keeps: bool = False
    """Agents of the spec that was given up keep it (rollout.on_abort)."""
    progress: RolloutProgress | None = None
    """Of the spec that is rolled out in steps."""
    before: _Spec = None
    """The spec that was proven before the present one, for an undo."""
    before_template: str = ""
    before_text: str = ""
    before_agent_file: str = ""
    past: tuple[PastRollout, ...] = ()
    """The newest last."""

    def remembering(self, one: PastRollout) -> RolloutState:
        """The state with one more roll-out that is over."""
        return replace(self, past=(*self.past, one)[-MAX_PAST:])

    def completed(self, spec: AgentSpec) -> RolloutState:
        """The state of a proven spec that is configured, with the text of its template, which older versions did not
        store, and the agent file of this control plane, and without the progress of a spec that is not configured any
        more."""
        state = replace(self, progress=None, agent_file=agent_zipapp.checksum())
        if digest(spec) != self.template:
            return state
        return replace(state, text=self.text or packed(text_of(spec)))

    def proved(self, spec: AgentSpec) -> RolloutState:
        """The state once this spec is proven; what was proven before it can be returned to."""
        return replace(
            self,
            good=spec,
            template=digest(spec),
            text=packed(text_of(spec)),
            agent_file=agent_zipapp.checksum(),
            bad="",
            why="",
            keeps=False,
            progress=None,
            before=self.good,
            before_template=self.template,
            before_text=self.text,
            before_agent_file=self.agent_file,
        )

    def undone(self, spec: AgentSpec, why: str) -> RolloutState:
        """The state after a return from a proven spec to the one before it, which must be known."""
        return replace(
            self,
            good=self.before,
            template=self.before_template,
            text=self.before_text,
            agent_file=self.before_agent_file,
            bad=spec.spec_hash,
            why=why,
            keeps=False,
            progress=None,
            before=None,
            before_template="",
            before_text="",
            before_agent_file="",
        )


def is_built_in(spec: AgentSpec) -> bool:
    """Whether the template of a spec has no text of its own. Its name is part of the spec, its text of the program."""
    template = spec.template
    return not spec.text and "/" not in template and not template.endswith((".hcl", ".yaml"))


def text_of(spec: AgentSpec) -> str:
    """The text of the template of a spec that is not built in; "" when it is, or can't be read."""
    if spec.text or is_built_in(spec):
        return spec.text
    try:
        return job_templates.load(spec.template).text
    except WatchdogError:
        return ""


def digest(spec: AgentSpec) -> str:
    """Of the template's text; "" when it can't be read."""
    try:
        text = job_templates.load(spec.template, spec.text).text
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except WatchdogError:
        return ""


def restored(state: RolloutState, configured: AgentSpec) -> AgentSpec | None:
    """The proven spec, with the text of its template; None = there is none, or that text is gone.

    The stored spec has only the fields that older versions know. Its text is stored beside it, or is that of the
    configured spec, or in its file; a built-in template is that of this version."""
    if state.good is None:
        return None
    good = replace(state.good, on=configured.on, agent_file=state.agent_file)
    if is_built_in(good) and not state.text:
        return good
    same = configured.text if good.template == configured.template else ""
    for text in (unpacked(state.text), same, ""):
        one = replace(good, text=text)
        if digest(one) == state.template:
            return one
    return None


def packed(text: str) -> str:
    """Text for a document; "" for text that is too long even when it is compressed."""
    if not text:
        return ""
    found = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return found if len(found) <= MAX_TEXT else ""


def unpacked(stored: str) -> str:
    """The text of `packed`; "" for anything else."""
    try:
        engine = zlib.decompressobj()
        found = engine.decompress(base64.b64decode(stored, validate=True), _MAX_TEMPLATE)
        return found.decode() if engine.eof else ""
    except (ValueError, binascii.Error, zlib.error):
        return ""


_STATE: Final = TypeAdapter(RolloutState)


def document_format(agent_class: str) -> DocumentFormat[RolloutState]:
    """Of the document that stores the roll-out state of this class."""
    return DocumentFormat(
        name=f"rollout-{hashlib.sha256(agent_class.encode()).hexdigest()[:16]}",
        empty=RolloutState(),
        parse=_STATE.validate_python,
        serialize=_serialized,
        repair="the roll-out is judged without it",
        replaceable=True,
    )


def _serialized(state: RolloutState) -> dict[str, object]:
    fields: dict[str, object] = _STATE.dump_python(state, mode="json", exclude={"good", "before"})
    return fields | {"good": _spec(state.good), "before": _spec(state.before)}


def _spec(spec: AgentSpec | None) -> dict[str, object] | None:
    # Older versions reject a spec with fields that they do not know.
    unknown_before = ("settings", "text", "on")
    if spec is None:
        return None
    return {name: one for name, one in stored_spec(spec).items() if name not in unknown_before}
