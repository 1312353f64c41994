"""What a statement's plan looks like, where that decides how it is run."""

from __future__ import annotations

from typing import Any

from flight_oplog.errors import RequestError
from flight_oplog.sql.measure import measure
from flight_oplog.top import LIMIT_MAX, Top


def chain(plan: Any) -> tuple[list[Any], list[str]]:
    """Return the nodes of a plan that reads one table once, from the top to its TableScan, and their kinds; else nothing."""
    nodes = [plan]
    while len(inputs := nodes[-1].inputs()) == 1:
        nodes.append(inputs[0])
    kinds = [type(node.to_variant()).__name__ for node in nodes]
    shown = plan.display_indent()  # a subquery may stand within an expression
    is_chain = not inputs and kinds[-1] == "TableScan" and shown.count("TableScan") == 1 and "Subquery:" not in shown
    return (nodes, kinds) if is_chain else ([], [])


def top_of(plan: Any) -> Top | None:
    """Return what the ORDER BY ... LIMIT asks for that an optimized plan begins its only scan with, None where there is none.

    Between the two there may be nothing that changes which rows there are, or the column that comes first.
    """
    nodes, kinds = chain(plan)
    if "Sort" not in kinds:
        return None
    depth = len(kinds) - 1 - kinds[::-1].index("Sort")
    sort, between = nodes[depth].to_variant(), nodes[depth + 1 : -1]
    first = sort.sort_exprs()[0]
    limit, column = sort.get_fetch_val(), first.expr()
    if (
        limit is None
        or limit > LIMIT_MAX
        or column.variant_name() != "Column"
        or not {*kinds[depth + 1 : -1]} <= {"Projection", "SubqueryAlias"}
    ):
        return None
    name = column.to_variant().name()
    for node in between:
        for shown in node.to_variant().projections() if type(node.to_variant()).__name__ == "Projection" else ():
            if shown.variant_name() != "Column" and shown.schema_name() == name:
                return None
    return Top(name, limit, not first.ascending(), first.nulls_first())


def is_constant(plan: Any) -> bool:
    """Whether a plan is one row of expressions, as drivers ask for to see whether the server is there."""
    kinds = [type(plan.to_variant()).__name__, *(type(each.to_variant()).__name__ for each in plan.inputs())]
    return kinds == ["Projection", "EmptyRelation"]


def is_literal(plan: Any) -> bool:
    """Whether a constant plan's expressions are values as they are written: no function may give another the next time."""

    def value(expression: Any) -> Any:
        return value(expression.to_variant().expr()) if expression.variant_name() == "Alias" else expression

    return all(value(each).variant_name() == "Literal" for each in plan.to_variant().projections())


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
    if kind != "TableScan" or measure(sql).tables != 1:
        raise RequestError("the statement cannot be followed: it has to read one topic, once")
    _, db_schema, name = variant.fqn()
    if db_schema not in (None, "public", "log"):
        raise RequestError(f"the statement cannot be followed: {db_schema}.{name} is no topic's entries")
    return str(name)
