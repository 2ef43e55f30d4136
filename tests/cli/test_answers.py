"""What the CLI requires of the API's answers."""

import pytest

from nomad_watchdog.cli._answers import (
    Fields,
    LeasesAnswer,
    MigrationAnswer,
    PlanAnswer,
    PoolAnswer,
    PoolsAnswer,
    parse,
)

PLAN = {
    "registry_index": 3,
    "summary": "nothing to do",
    "actions": [],
    "waiting_rollout": 0,
    "held": {"count": 0},
}


def test_an_answer_may_have_more_fields_and_lack_optional_ones() -> None:
    """Answers of a newer or older service are used as they are."""
    answer = PLAN | {"new": [1], "held": {"count": 0, "id": "", "since": 1}}
    assert parse(answer, PlanAnswer) is answer
    pool = {"name": "p", "configured": True, "count": 1, "running": 1, "problem": ""}
    assert parse({"items": [pool | {"target": None}], "keeper": True}, PoolsAnswer)["items"] == [
        pool | {"target": None}
    ]
    assert parse(pool | {"value": 1}, PoolAnswer)["value"] == 1  # JSON has only one number type
    assert parse({"a": [1]}, Fields) == {"a": [1]}


@pytest.mark.parametrize(
    ("answer", "shape", "problem"),
    [
        ([], PlanAnswer, "the answer is not an object"),
        ({}, PlanAnswer, "registry_index is missing"),
        (PLAN | {"actions": {}}, PlanAnswer, "actions has a wrong type"),
        (PLAN | {"actions": ["a"]}, PlanAnswer, "actions has a wrong type"),
        (PLAN | {"held": {}}, PlanAnswer, "held.count is missing"),
        (PLAN | {"held": None}, PlanAnswer, "held is not an object"),
        (PLAN | {"specs": {"default": 1}}, PlanAnswer, "specs has a wrong type"),
        ({"items": [{"name": 1}], "keeper": True}, PoolsAnswer, "items.name has a wrong type"),
        ({"replica": "a", "problem": None}, LeasesAnswer, "problem has a wrong type"),
        ({"from": "local", "to": "nomad"}, MigrationAnswer, "state is missing"),
    ],
)
def test_what_is_not_the_apis_answer_is_named(
    answer: object, shape: type[object], problem: str
) -> None:
    """Any other answer is rejected with the name of the wrong field, and never causes a Python error."""
    with pytest.raises(ValueError, match=f"^{problem}$"):
        parse(answer, shape)
