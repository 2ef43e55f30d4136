"""The description of the API (OpenAPI 3.1), generated from the route table and the schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nomad_watchdog import __version__
from nomad_watchdog.api.answers import ErrorOut
from nomad_watchdog.api.routing import Route
from nomad_watchdog.core.roles import roles_with

_REFS: Final = "#/components/schemas/{model}"
JsonObject = dict[str, object]
_REFUSALS: Final = {
    401: ("Unauthorized", ("no token, or an unknown one", False)),
    403: ("Forbidden", ("the role of the token may not do this", False)),
    429: ("TooManyRequests", ("more than the rate of the token or address", True)),
}
"""Status -> the name and the description of its response, and whether it says when to try again."""


def describe(routes: Sequence[Route], *, secured: bool) -> JsonObject:
    """The whole document. `secured`: callers need a bearer token."""
    bodies = {route.body for route in routes if route.body is not None}
    answers = {a for route in routes for a in route.answers.values() if isinstance(a, type)}
    ordered = sorted(bodies | answers | {ErrorOut}, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in ordered], by_alias=True, ref_template=_REFS
    )
    paths: dict[str, JsonObject] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, secured=secured)
    components: JsonObject = {
        "schemas": schemas["$defs"],
        "responses": {name: _refusal(*one) for name, one in _REFUSALS.values()},
    }
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nomad-watchdog",
            "version": __version__,
            "summary": "Keeps one watchdog agent per device.",
            "license": {"name": "MPL-2.0", "identifier": "MPL-2.0"},
        },
        "servers": [{"url": "/", "description": "the service that serves this description"}],
        "tags": [{"name": name} for name in sorted({_tag(route) for route in routes})],
        "paths": paths,
        "components": components,
    }


def _tag(route: Route) -> str:
    """What an operation belongs to: the first part of its path."""
    parts = route.path.strip("/").split("/")
    return parts[1].partition(":")[0] if parts[0] == "v1" else "service"


def _refusal(description: str, retry: bool) -> JsonObject:
    """A response that any operation with a caller may have."""
    found: JsonObject = {
        "description": description,
        "content": _content("application/json", ErrorOut),
    }
    if retry:
        found["headers"] = {
            "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
        }
    return found


def _operation(route: Route, *, secured: bool) -> JsonObject:
    answers = {str(code): _answer(route, what) for code, what in route.answers.items()}
    if secured and not route.public:
        for code, (name, _) in _REFUSALS.items():
            answers.setdefault(str(code), {"$ref": f"#/components/responses/{name}"})
    answers["default"] = {
        "description": "an error",
        "content": _content("application/json", ErrorOut),
    }
    operation: JsonObject = {
        "operationId": route.handler.__name__,
        "tags": [_tag(route)],
        "summary": route.summary,
        "parameters": _parameters(route),
        "responses": answers,
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": _content("application/json", route.body),
        }
    if not route.public:
        operation["x-roles"] = [str(role) for role in roles_with(route.right)]
    if secured and not route.public:
        operation["security"] = [{"token": []}]
    return operation


def _parameters(route: Route) -> list[JsonObject]:
    text, texts = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
    parameters: list[JsonObject] = [
        {
            "name": name,
            "in": "query",
            "description": description,
            "schema": texts if name == "label" else text,
        }
        for name, description in route.query.items()
    ]
    if "{id}" in route.path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": text})
    return parameters


def _answer(route: Route, what: str | type[BaseModel]) -> JsonObject:
    if isinstance(what, str):
        return {"description": what}
    return {
        "description": (what.__doc__ or what.__name__).strip(),
        "content": _content(route.media, what),
    }


def _content(media: str, model: type[BaseModel]) -> JsonObject:
    return {media: {"schema": {"$ref": _REFS.format(model=model.__name__)}}}
