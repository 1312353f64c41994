"""What a statement's plan looks like, where that decides how it is run."""

from __future__ import annotations

from typing import Any

from flight_oplog.errors import RequestError
from flight_oplog.sql import lexer


def is_constant(plan: Any) -> bool:
    """Whether a plan is one row of expressions, as drivers ask for to see whether the server is there."""
    kinds = [type(plan.to_variant()).__name__, *(type(each.to_variant()).__name__ for each in plan.inputs())]
    return kinds == ["Projection", "EmptyRelation"]


_EACH_BY_ITSELF = frozenset(("Projection", "Filter", "SubqueryAlias", "TableScan"))


def followed(sql: str, plan: Any) -> str:
    """Return the one topic that a statement reads; raise RequestError when it does not take each entry by itself."""
    kind = ""
    while plan is not None:
        variant, inputs = plan.to_variant(), plan.inputs()
        kind = type(variant).__name__
        if kind == "EmptyRelation":
            break
        if kind not in _EACH_BY_ITSELF or len(inputs) > 1:
            raise RequestError(f"the statement cannot be followed: {kind} needs more than one entry at a time; use columns and WHERE alone")
        plan = inputs[0] if inputs else None
    if kind != "TableScan" or lexer.measure(sql).tables != 1:
        raise RequestError("the statement cannot be followed: it has to read one topic, once")
    _, db_schema, name = variant.fqn()
    if db_schema not in (None, "public", "log"):
        raise RequestError(f"the statement cannot be followed: {db_schema}.{name} is no topic's entries")
    return str(name)
