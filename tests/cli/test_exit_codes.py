"""Every API error has one exit code, for every command."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nomad_watchdog.api.middleware import answer_to
from nomad_watchdog.cli._api_client import ApiClient, refusal
from nomad_watchdog.cli._apply import apply_by_service
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    OutOfDateError,
    PreconditionError,
    StaleError,
    TerminalError,
    TransientError,
    UnpreparedError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.replicas.leases import Replica


@pytest.mark.parametrize(
    "error",
    [
        ConflictError("lost"),
        DeniedError("Consul: permission denied"),
        NotFoundError("no device"),
        OutOfDateError("older"),
        PreconditionError("device 'a' is listed in inventory:a.json; change it there"),
        StaleError("partial"),
        TerminalError("attempt to write a readonly database"),
        TransientError("no answer in time"),
        UnpreparedError("no parent job"),
        UserError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_exits_with_its_code_through_the_api_too(error: WatchdogError) -> None:
    """An error answered by the service gives a command the same exit code as the error raised in the command itself."""
    answer = answer_to(error)
    assert isinstance(answer.body, bytes)
    assert refusal(answer.status, answer.body, "http://api").exit_code == error.exit_code


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (502, b"<html>Bad Gateway</html>", 75),
        (409, b"", 75),
        (401, b"", 77),
        (403, b"[]", 77),
        (500, json.dumps({"error": {"code": "internal", "message": "ours"}}).encode(), 75),
        (503, json.dumps({"error": {"code": "busy", "message": "later"}}).encode(), 75),
        (409, json.dumps({"error": "conflict"}).encode(), 75),
    ],
)
def test_answers_of_a_proxy_have_no_code(status: int, body: bytes, code: int) -> None:
    """An error of a proxy in front of the service is retryable, except a denial."""
    assert refusal(status, body, "http://api").exit_code == code


def test_apply_with_a_wrong_token_is_denied(served: str) -> None:
    """When the API answers 401, `apply` reports a wrong token, and not an API that does not answer. If the API does not
    answer, the error is retryable."""
    running = [Replica("plane-1", served, 0.0, 1, "1")]
    asked: list[Any] = [running, {"actions": [], "waiting_rollout": 0}]
    with pytest.raises(DeniedError, match="missing or unknown token"):
        apply_by_service(ApiClient(served, "another-token-0000"), Settings(), *asked, stops=0)
    with pytest.raises(TransientError, match="does not answer"):
        apply_by_service(ApiClient("http://127.0.0.1:1", ""), Settings(), *asked, stops=0)
