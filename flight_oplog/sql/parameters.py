"""Parameters of a statement: their types, and the values bound to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from flight_oplog import codec
from flight_oplog.errors import RequestError
from flight_oplog.schema import plain_field
from flight_oplog.sql import lexer

PARAMETERS_ASKED_MAX = 100
Values = dict[str, pa.Scalar] | None


def parameters_of(session: Any, sql: str, names: Sequence[str]) -> pa.Schema:
    """Return the parameters of a statement with the types that DataFusion infers; null where it cannot.

    It tells them only when it prepares a statement, and leaves out those that it does not know: then each is asked about
    by itself.
    """

    def inferred(text: str) -> list[pa.DataType]:
        try:
            plan = session.sql(f"EXPLAIN PREPARE parameters AS {text}").logical_plan().inputs()[0]
            return [plain_field(field).type for field in plan.to_variant().fields()]
        except Exception:  # what is wrong with the statement comes up when it is planned
            return []

    kinds = inferred(sql) if names else []
    if 0 < len(names) <= PARAMETERS_ASKED_MAX and len(kinds) != len(names):
        kinds = [(inferred(lexer.alone(sql, number)) or [pa.null()])[0] for number in range(1, len(names) + 1)]
    kinds = kinds if len(kinds) == len(names) else [pa.null()] * len(names)
    for number in lexer.limits(sql) if names else ():
        kinds[number - 1] = pa.int64()
    return pa.schema([pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)])


def counted(names: Sequence[str]) -> str:
    return f"the statement has {len(names)} parameter{'' if len(names) == 1 else 's'}"


def row_of(bound: pa.RecordBatch, row: int) -> Values:
    return {str(number): column[row] for number, column in enumerate(bound.columns, 1)}


def nulls_of(parameters: pa.Schema) -> Values:
    return {str(number): pa.scalar(None, field.type) for number, field in enumerate(parameters, 1)} or None


def bound_to(
    text: str, names: Sequence[str], wanted: pa.Schema, parameters: pa.RecordBatch | None, is_update: bool
) -> pa.RecordBatch | None:
    """Return the values bound, in the types that the statement wants, as columns p1, p2, ...; None without parameters.

    A value that would not be the same in that type is refused where it would be written; a query is left to coerce it.
    """
    if parameters is None or not parameters.num_columns:
        return None
    written = "; nothing was written" if is_update else ""
    if len(names) != parameters.num_columns:
        are = "is" if parameters.num_columns == 1 else "are"
        raise RequestError(f"{counted(names)}, {parameters.num_columns} {are} bound{written}")
    columns = []
    for number, (kind, column) in enumerate(zip(wanted.types, parameters.columns, strict=True), 1):
        try:
            plain = codec.recast(column, plain_field(pa.field("", column.type)).type)
            fitting = plain if pa.types.is_null(kind) else codec.fitted(plain, kind)
        except (pa.ArrowException, RequestError) as error:
            if not is_update and isinstance(error, pa.ArrowException):
                columns.append(column)
                continue
            why = " ".join(str(error).split())[:200]
            raise RequestError(f"parameter ${number} of type {column.type} is no {kind}: {why}{written}") from error
        columns.append(fitting)
    return pa.RecordBatch.from_arrays(columns, [f"p{number}" for number in range(1, len(columns) + 1)])
