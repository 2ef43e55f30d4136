"""The description of the API (OpenAPI 3.1), made from the route table and the schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nomad_watchdog import __version__
from nomad_watchdog.api.routing import Route
from nomad_watchdog.api.schemas import ErrorOut
from nomad_watchdog.core.roles import roles_with

_REFS: Final = "#/components/schemas/{model}"


def describe(routes: Sequence[Route], *, secured: bool) -> dict[str, Any]:
    """The whole document. `secured`: a bearer token is asked for."""
    taken = {route.body for route in routes if route.body is not None}
    given = {a for route in routes for a in route.answers.values() if isinstance(a, type)}
    ordered = sorted(taken | given | {ErrorOut}, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in ordered], by_alias=True, ref_template=_REFS
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, secured=secured)
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nomad-watchdog", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _operation(route: Route, *, secured: bool) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "query",
            "description": text,
            "schema": {"type": "array", "items": {"type": "string"}}
            if name == "label"
            else {"type": "string"},
        }
        for name, text in route.query.items()
    ]
    if "{id}" in route.path:
        parameters.append(
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        )
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "parameters": parameters,
        "responses": {str(code): _answer(route, what) for code, what in route.answers.items()},
    }
    operation["responses"]["default"] = {
        "description": "what is wrong",
        "content": _content("application/json", ErrorOut),
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


def _answer(route: Route, what: str | type[BaseModel]) -> dict[str, Any]:
    if isinstance(what, str):
        return {"description": what}
    return {
        "description": (what.__doc__ or what.__name__).strip(),
        "content": _content(route.media, what),
    }


def _content(media: str, model: type[BaseModel]) -> dict[str, Any]:
    return {media: {"schema": {"$ref": _REFS.format(model=model.__name__)}}}
