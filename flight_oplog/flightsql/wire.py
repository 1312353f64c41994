"""Flight SQL messages as frozen dataclasses, and their protobuf bytes. Pure; the only importer of protobuf.

Follows FlightSql.proto of Apache Arrow (package arrow.flight.protocol.sql), and Flight.proto for the actions that
belong to Flight itself. Each class below declares one message: its field names, numbers and kinds, from which the
protobuf descriptors are built at import. There is no generated code, so any protobuf runtime works, and the private
descriptor pool cannot clash with another copy of the protocol in the same process. A map travels as its entries do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from flight_oplog.errors import RequestError, Unsupported

PACKAGE = "arrow.flight.protocol.sql"
_TYPE_URL = f"type.googleapis.com/{PACKAGE}."


def wire(number: int, kind: str) -> Any:
    """Declare a field: its number and kind, a scalar or a message; `?` marks an optional one (None when absent), or one of
    a oneof, `*` a repeated one. An enum travels like an int32."""
    default: Any = None if kind.endswith("?") else () if kind.endswith("*") else _DEFAULTS[kind]
    return dataclasses.field(default=default, metadata={"number": number, "kind": kind})


_DEFAULTS: dict[str, Any] = {
    **{"string": "", "bytes": b"", "bool": False, "int32": 0, "uint32": 0, "int64": 0},
    **{"sfixed64": 0, "double": 0.0},
}


# Commands, in descriptors and tickets


@dataclass(frozen=True)
class CommandStatementQuery:
    query: str = wire(1, "string")
    transaction_id: bytes | None = wire(2, "bytes?")


@dataclass(frozen=True)
class TicketStatementQuery:
    statement_handle: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class CommandStatementUpdate:
    query: str = wire(1, "string")
    transaction_id: bytes | None = wire(2, "bytes?")


@dataclass(frozen=True)
class CommandPreparedStatementQuery:
    prepared_statement_handle: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class CommandPreparedStatementUpdate:
    prepared_statement_handle: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class SubstraitPlan:
    plan: bytes = wire(1, "bytes")
    version: str = wire(2, "string")


@dataclass(frozen=True)
class CommandStatementSubstraitPlan:
    plan: SubstraitPlan | None = wire(1, "SubstraitPlan?")  # noqa: RUF009
    transaction_id: bytes | None = wire(2, "bytes?")


@dataclass(frozen=True)
class CommandGetCatalogs:
    pass


@dataclass(frozen=True)
class CommandGetDbSchemas:
    catalog: str | None = wire(1, "string?")
    db_schema_filter_pattern: str | None = wire(2, "string?")


@dataclass(frozen=True)
class CommandGetTables:
    catalog: str | None = wire(1, "string?")
    db_schema_filter_pattern: str | None = wire(2, "string?")
    table_name_filter_pattern: str | None = wire(3, "string?")
    table_types: tuple[str, ...] = wire(4, "string*")
    include_schema: bool = wire(5, "bool")


@dataclass(frozen=True)
class CommandGetTableTypes:
    pass


@dataclass(frozen=True)
class CommandGetPrimaryKeys:
    catalog: str | None = wire(1, "string?")
    db_schema: str | None = wire(2, "string?")
    table: str = wire(3, "string")


@dataclass(frozen=True)
class CommandGetExportedKeys(CommandGetPrimaryKeys):
    pass


@dataclass(frozen=True)
class CommandGetImportedKeys(CommandGetPrimaryKeys):
    pass


@dataclass(frozen=True)
class CommandGetCrossReference:
    pk_catalog: str | None = wire(1, "string?")
    pk_db_schema: str | None = wire(2, "string?")
    pk_table: str = wire(3, "string")
    fk_catalog: str | None = wire(4, "string?")
    fk_db_schema: str | None = wire(5, "string?")
    fk_table: str = wire(6, "string")


@dataclass(frozen=True)
class CommandGetXdbcTypeInfo:
    data_type: int | None = wire(1, "int32?")


@dataclass(frozen=True)
class CommandGetSqlInfo:
    info: tuple[int, ...] = wire(1, "uint32*")


@dataclass(frozen=True)
class TableDefinitionOptions:
    if_not_exist: int = wire(1, "int32")  # 1 create, 2 fail
    if_exists: int = wire(2, "int32")  # 1 fail, 2 append, 3 replace


@dataclass(frozen=True)
class CommandStatementIngest:
    table_definition_options: TableDefinitionOptions | None = wire(1, "TableDefinitionOptions?")  # noqa: RUF009
    table: str = wire(2, "string")
    schema: str | None = wire(3, "string?")
    catalog: str | None = wire(4, "string?")
    temporary: bool = wire(5, "bool")
    transaction_id: bytes | None = wire(6, "bytes?")


@dataclass(frozen=True)
class DoPutUpdateResult:
    record_count: int = wire(1, "int64")


@dataclass(frozen=True)
class DoPutPreparedStatementResult:
    prepared_statement_handle: bytes | None = wire(1, "bytes?")


# Actions


@dataclass(frozen=True)
class ActionCreatePreparedStatementRequest:
    query: str = wire(1, "string")
    transaction_id: bytes | None = wire(2, "bytes?")


@dataclass(frozen=True)
class ActionCreatePreparedStatementResult:
    prepared_statement_handle: bytes = wire(1, "bytes")
    dataset_schema: bytes = wire(2, "bytes")
    parameter_schema: bytes = wire(3, "bytes")
    is_update: bool | None = wire(4, "bool?")


@dataclass(frozen=True)
class ActionBeginTransactionRequest:
    pass


@dataclass(frozen=True)
class ActionBeginTransactionResult:
    transaction_id: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class ActionEndTransactionRequest:
    transaction_id: bytes = wire(1, "bytes")
    action: int = wire(2, "int32")


@dataclass(frozen=True)
class ActionClosePreparedStatementRequest:
    prepared_statement_handle: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class ActionCreatePreparedSubstraitPlanRequest:
    plan: SubstraitPlan | None = wire(1, "SubstraitPlan?")  # noqa: RUF009
    transaction_id: bytes | None = wire(2, "bytes?")


@dataclass(frozen=True)
class ActionBeginSavepointRequest:
    transaction_id: bytes = wire(1, "bytes")
    name: str = wire(2, "string")


@dataclass(frozen=True)
class ActionEndSavepointRequest:
    savepoint_id: bytes = wire(1, "bytes")
    action: int = wire(2, "int32")


@dataclass(frozen=True)
class ActionCancelQueryRequest:
    info: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class ActionCancelQueryResult:
    result: int = wire(1, "int32")


# Flight's own messages; its actions are not wrapped in an Any


@dataclass(frozen=True)
class Ticket:
    ticket: bytes = wire(1, "bytes")


@dataclass(frozen=True)
class Location:
    uri: str = wire(1, "string")


@dataclass(frozen=True)
class Timestamp:
    seconds: int = wire(1, "int64")
    nanos: int = wire(2, "int32")


@dataclass(frozen=True)
class FlightEndpoint:
    ticket: Ticket | None = wire(1, "Ticket?")  # noqa: RUF009
    location: tuple[Location, ...] = wire(2, "Location*")
    expiration_time: Timestamp | None = wire(3, "Timestamp?")  # noqa: RUF009
    app_metadata: bytes = wire(4, "bytes")


@dataclass(frozen=True)
class FlightInfo:
    """What a client hands back to have it cancelled: only the endpoints matter then."""

    endpoint: tuple[FlightEndpoint, ...] = wire(3, "FlightEndpoint*")


@dataclass(frozen=True)
class CancelFlightInfoRequest:
    info: FlightInfo | None = wire(1, "FlightInfo?")  # noqa: RUF009


@dataclass(frozen=True)
class CancelFlightInfoResult:
    status: int = wire(1, "int32")


@dataclass(frozen=True)
class RenewFlightEndpointRequest:
    endpoint: FlightEndpoint | None = wire(1, "FlightEndpoint?")  # noqa: RUF009


@dataclass(frozen=True)
class StringList:
    values: tuple[str, ...] = wire(1, "string*")


@dataclass(frozen=True)
class SessionOptionValue:
    """One of its fields is set, or none: then the option goes back to what it was."""

    string_value: str | None = wire(1, "string?")
    bool_value: bool | None = wire(2, "bool?")
    int64_value: int | None = wire(3, "sfixed64?")
    double_value: float | None = wire(4, "double?")
    string_list_value: StringList | None = wire(5, "StringList?")  # noqa: RUF009


@dataclass(frozen=True)
class SessionOption:
    key: str = wire(1, "string")
    value: SessionOptionValue | None = wire(2, "SessionOptionValue?")  # noqa: RUF009


@dataclass(frozen=True)
class SetSessionOptionsRequest:
    session_options: tuple[SessionOption, ...] = wire(1, "SessionOption*")


@dataclass(frozen=True)
class SessionOptionError:
    value: int = wire(1, "int32")


@dataclass(frozen=True)
class SessionOptionErrors:
    key: str = wire(1, "string")
    value: SessionOptionError | None = wire(2, "SessionOptionError?")  # noqa: RUF009


@dataclass(frozen=True)
class SetSessionOptionsResult:
    errors: tuple[SessionOptionErrors, ...] = wire(1, "SessionOptionErrors*")


@dataclass(frozen=True)
class GetSessionOptionsRequest:
    pass


@dataclass(frozen=True)
class GetSessionOptionsResult:
    session_options: tuple[SessionOption, ...] = wire(1, "SessionOption*")


@dataclass(frozen=True)
class CloseSessionRequest:
    pass


@dataclass(frozen=True)
class CloseSessionResult:
    status: int = wire(1, "int32")


_CLASSES: dict[str, type[Any]] = {
    name: declared for name, declared in list(globals().items()) if dataclasses.is_dataclass(declared) and isinstance(declared, type)
}


def _descriptors() -> dict[str, Any]:
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="flight_oplog.proto", package=PACKAGE, syntax="proto3")
    for name, cls in _CLASSES.items():
        message = file.message_type.add(name=name)
        for field in dataclasses.fields(cls):
            kind = field.metadata["kind"]
            added = message.field.add(name=field.name, number=field.metadata["number"])
            if (inner := kind.rstrip("?*")) in _DEFAULTS:
                added.type = getattr(types, f"TYPE_{inner.upper()}")
            else:
                added.type, added.type_name = types.TYPE_MESSAGE, f".{PACKAGE}.{inner}"
            added.label = types.LABEL_REPEATED if kind.endswith("*") else types.LABEL_OPTIONAL
            if kind.endswith("?") and added.type != types.TYPE_MESSAGE:  # a message is absent or present by itself
                added.proto3_optional = True
                added.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field.name}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _CLASSES}


_MESSAGES = _descriptors()


@dataclass(frozen=True, slots=True)
class _Field:
    """What there is to know of a message's field, looked up for each message that comes or goes."""

    name: str
    inner: str  # a scalar's kind, or a message's name
    is_message: bool
    is_optional: bool
    is_repeated: bool

    @classmethod
    def of(cls, field: dataclasses.Field[Any]) -> _Field:
        kind = field.metadata["kind"]
        inner = kind.rstrip("?*")
        return cls(field.name, inner, inner in _CLASSES, kind.endswith("?"), kind.endswith("*"))


_FIELDS = {name: tuple(map(_Field.of, dataclasses.fields(declared))) for name, declared in _CLASSES.items()}


def pack(value: Any) -> bytes:
    """Return `value` as the bytes of a google.protobuf.Any, as commands, tickets and action bodies travel."""
    wrapped: bytes = any_pb2.Any(type_url=_TYPE_URL + type(value).__name__, value=encode(value)).SerializeToString()
    return wrapped


def encode(value: Any) -> bytes:
    """Return `value` as plain protobuf bytes, as the results of DoPut travel."""
    encoded: bytes = _message(value).SerializeToString(deterministic=True)
    return encoded


def _message(value: Any) -> Any:
    name = type(value).__name__
    message = _MESSAGES[name]()
    for field in _FIELDS[name]:
        content = getattr(value, field.name)
        if field.is_repeated:
            getattr(message, field.name).extend(map(_message, content) if field.is_message else content)
        elif content is None:
            pass
        elif field.is_message:
            getattr(message, field.name).CopyFrom(_message(content))
        else:
            setattr(message, field.name, content)
    return message


def unpack(data: bytes) -> Any:
    """Return the message inside the bytes of an Any.

    Raises RequestError for bytes that are none, Unsupported for a message this server does not know.
    """
    wrapper = any_pb2.Any()
    try:
        wrapper.ParseFromString(data)
    except DecodeError:
        raise RequestError("the command is not a Flight SQL message") from None
    if not wrapper.type_url.startswith(_TYPE_URL):
        raise RequestError("the command is not a Flight SQL message")
    name = wrapper.type_url.removeprefix(_TYPE_URL)
    if name not in _CLASSES:
        raise Unsupported(f"the Flight SQL message {name[:100]!r} is not served")
    return decode(wrapper.value, _CLASSES[name])


Message = TypeVar("Message")


def decode(data: bytes, kind: type[Message]) -> Message:
    """Return the message of this kind in plain protobuf bytes. Raises RequestError for bytes that are none."""
    message = _MESSAGES[kind.__name__]()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise RequestError(f"the message {kind.__name__} is malformed") from None
    found: Message = _decoded(message, kind.__name__)
    return found


def _decoded(message: Any, name: str) -> Any:
    return _CLASSES[name](*(_value(message, field) for field in _FIELDS[name]))


def _value(message: Any, field: _Field) -> Any:
    if field.is_optional and not message.HasField(field.name):
        return None
    content = getattr(message, field.name)
    if field.is_repeated:
        return tuple(_decoded(item, field.inner) for item in content) if field.is_message else tuple(content)
    return _decoded(content, field.inner) if field.is_message else content
