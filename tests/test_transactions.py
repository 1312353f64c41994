"""Transactions: any number of ingests into any number of topics are one table version, or nothing."""

import contextlib
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbc_driver_flightsql.dbapi as adbc
import adbc_driver_manager
import pyarrow as pa
import pytest
from conftest import SEED, ServerProcess, ask, eventually
from pyarrow import flight
from test_producers import batch
from test_server import refused

from flight_oplog import Config, OpLog, Origin, storage, transactions
from flight_oplog.errors import Cancelled, OutcomeUnknown, OutOfOrder, RequestError, SchemaMismatch, TooLarge, TryAgain
from flight_oplog.flightsql import wire
from flight_oplog.oplog import AppendWriter
from flight_oplog.transactions import Transactions


def writer(log: OpLog, topic: str, data: pa.RecordBatch, origin: Origin = Origin()) -> AppendWriter:  # noqa: B008
    made = log.writer(topic, data.schema, origin)
    made.write(data)
    return made


def handles(folder: Path) -> list[str]:
    """What this process holds open of a log; other tests' threads may be closing handles of theirs."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(str(folder))]


@pytest.fixture
def held(log: OpLog) -> Iterator[Transactions]:
    made = Transactions(log, log.config)
    yield made
    made.close()


def test_all_of_a_transaction_is_one_table_version(log: OpLog, held: Transactions) -> None:
    log.append("a", batch(0))
    transaction = held.begin(())
    assert held.hold(transaction, writer(log, "a", batch(1))) == 1
    assert held.hold(transaction, writer(log, "b", SEED)) == 2
    assert held.hold(transaction, writer(log, "a", batch(2, 3))) == 2
    log.append("a", batch(9))
    assert [topic.name for topic in log.topics()] == ["_schemas", "a"]
    receipts = held.commit(transaction)
    assert [(receipt.topic, receipt.first_offset, receipt.table_version) for receipt in receipts] == [("a", 2, 3), ("b", 0, 3), ("a", 3, 3)]
    assert log.snapshot_at(2).topic("a").next_offset == 2


def test_a_refused_append_takes_the_whole_transaction_with_it(log: OpLog, held: Transactions) -> None:
    log.append("a", batch(0), Origin("p", 0, 0))
    before = log.snapshot().table_version
    cases: list[tuple[AppendWriter, type[Exception], str]] = [
        (writer(log, "a", batch(1), Origin("p", 0, 7)), OutOfOrder, "producer 'p' sent sequence 7, expected 1"),
        (writer(log, "a", batch(1), Origin(expected_offset=5)), OutOfOrder, "topic 'a' ends at offset 1, not at 5"),
        (writer(log, "b", pa.record_batch({"name": [1.5]})), SchemaMismatch, "topic 'b': column 'name'"),
    ]
    for bad, kind, message in cases:
        transaction = held.begin(())
        held.hold(transaction, writer(log, "b", SEED))
        held.hold(transaction, bad)
        held.hold(transaction, writer(log, "c", SEED))
        with pytest.raises(kind, match=message):
            held.commit(transaction)
        with pytest.raises(RequestError, match=r"^the transaction was rolled back, because its commit failed; nothing of it was written"):
            held.commit(transaction)
        assert log.snapshot().table_version == before
    assert log._memory._left == log.config.queue_bytes_max
    assert log.append("a", batch(1), Origin("p", 0, 1)).first_offset == 1


def test_a_transaction_sent_again_writes_nothing_twice(log: OpLog, held: Transactions) -> None:
    for expected in (False, True):
        transaction = held.begin(())
        held.hold(transaction, writer(log, "a", batch(1), Origin("p", 0, 0)))
        held.hold(transaction, writer(log, "b", batch(1), Origin("p", 0, 0)))
        receipts = held.commit(transaction)
        assert [(receipt.first_offset, receipt.duplicate) for receipt in receipts] == [(0, expected), (0, expected)]
        assert held.commit(transaction) == [], "the answer was lost: asked again, it is committed all the same"
    assert [topic.entries for topic in log.topics()] == [2, 1, 1]


def test_rolling_back_leaves_nothing(folder: Path) -> None:
    with OpLog.open(str(folder), Config(record_entries_max=1)) as log:
        held = Transactions(log, log.config)
        transaction = held.begin(())
        for topic in ("a", "b"):
            held.hold(transaction, writer(log, topic, batch(1, 2, 3)))
        assert len(log._store.orphans()) == 2
        held.rollback(transaction)
        gc.collect()
        assert handles(folder) == []
        assert log._memory._left == log.config.queue_bytes_max
        assert log._store.orphans() == []
        held.rollback(transaction)
        for call in (held.commit, held.check):
            with pytest.raises(RequestError, match=r"^the transaction was rolled back; nothing"):
                call(transaction)
        assert log.topics() == []


def test_a_committed_transaction_is_not_rolled_back(log: OpLog, held: Transactions) -> None:
    transaction = held.begin(())
    held.hold(transaction, writer(log, "a", batch(1)))
    held.commit(transaction)
    with pytest.raises(RequestError, match=r"^the transaction is committed; it cannot be rolled back$"):
        held.rollback(transaction)
    with pytest.raises(RequestError, match=r"^the transaction is committed; nothing was written; begin another$"):
        held.hold(transaction, abandoned := writer(log, "a", batch(2)))
    abandoned.abandon()


def test_one_left_open_is_rolled_back_at_its_deadline(folder: Path) -> None:
    with OpLog.open(str(folder), Config(transaction_seconds_max=1)) as log:
        held = Transactions(log, log.config)
        idle, left, other = held.begin(()), held.begin(()), held.begin(())
        held.hold(left, writer(log, "a", batch(1)))
        held.hold(other, writer(log, "b", batch(1)))
        assert eventually(lambda: log._memory._left == log.config.queue_bytes_max)
        with pytest.raises(RequestError, match=r"^the transaction was rolled back when it had been open for 1 seconds; nothing of it"):
            held.commit(left)
        assert held.commit(idle) == [], "one that holds nothing may stay open"
        assert eventually(lambda: "transactions" not in [thread.name for thread in threading.enumerate()])
        again = held.begin(())
        held.hold(again, writer(log, "a", batch(1)))
        assert held.commit(again)[0].first_offset == 0


def test_limits_of_transactions(folder: Path) -> None:
    with OpLog.open(str(folder), Config(transactions_max=2, transaction_appends_max=3)) as log:
        held = Transactions(log, log.config)
        first, second, third = (held.begin(()) for _ in range(3))
        for _ in range(3):
            held.hold(first, writer(log, "a", batch(1)))
        over = writer(log, "a", batch(1))
        with pytest.raises(TooLarge, match=r"more than transaction_appends_max \(3\) appends"):
            held.hold(first, over)
        held.hold(second, over)
        over = writer(log, "a", batch(1))
        with pytest.raises(TooLarge, match=r"^transactions_max \(2\) transactions hold appends; nothing was written; try again"):
            held.hold(third, over)
        held.rollback(second)
        held.hold(third, over)
        assert len(held.commit(first)) == 3
        held.close()
        with pytest.raises(RequestError, match="was rolled back when the server stopped"):
            held.commit(third)


@pytest.mark.parametrize("made_up", [b"", b"1", b"1/" + b"0" * 32, b"9" * 5000 + b"/" + b"0" * 32, b"\xff/\x00", "²/".encode() + b"0" * 32])
def test_made_up_transactions_are_refused(log: OpLog, held: Transactions, made_up: bytes) -> None:
    held.begin(())
    for call in (held.check, held.commit):
        with pytest.raises(
            RequestError, match=r"^the transaction was not begun by you at this server, or the server was started again since"
        ):
            call(made_up)
    held.rollback(made_up)


def test_one_too_old_to_be_remembered_is_never_called_committed(log: OpLog, held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "ENDED_KEPT", 2)
    lost = held.begin(())
    held.hold(lost, writer(log, "a", batch(1)))
    held.rollback(lost)
    for _ in range(3):
        held.rollback(held.begin(()))
    with pytest.raises(RequestError, match=r"^the transaction is too old to be known"):
        held.commit(lost)


def test_a_stopped_log_commits_nothing_of_it(folder: Path) -> None:
    with OpLog.open(str(folder)) as log:
        held = Transactions(log, log.config)
        transaction = held.begin(())
        for topic in ("a", "b"):
            held.hold(transaction, writer(log, topic, batch(1)))
    with pytest.raises(TryAgain, match="the log is closed; nothing was written"):
        held.commit(transaction)


def test_a_rolled_back_append_is_told(log: OpLog, held: Transactions) -> None:
    transaction = held.begin(())
    held.hold(transaction, writer(log, "a", batch(1)))
    [append] = held._open[transaction.decode()].appends
    held.rollback(transaction)
    with pytest.raises(Cancelled):
        append.receipt.result()


def test_a_commit_sent_again_while_it_is_under_way_gets_its_answer(log: OpLog, held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()
    real = log._committer._commit_waiting
    monkeypatch.setattr(log._committer, "_commit_waiting", lambda waiting: going_on.wait(10) and real(waiting))
    transaction = held.begin(())
    held.hold(transaction, writer(log, "a", batch(1)))
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(held.commit(transaction))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: bool(held._committing))
    with pytest.raises(RequestError, match=r"^the transaction is being committed; it cannot be rolled back$"):
        held.rollback(transaction)
    with pytest.raises(RequestError, match=r"^the transaction is being committed; nothing was written; begin another$"):
        held.check(transaction)
    going_on.set()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] or [] in answers
    assert log.snapshot().topic("a").entries == 1


def test_an_unknown_outcome_stays_unknown(log: OpLog, held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = held.begin(())
    held.hold(transaction, writer(log, "a", batch(1)))
    held.hold(transaction, writer(log, "b", batch(1)))

    def failing(path: str) -> None:
        if path.endswith("_delta_log"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "_sync_folder", failing)
    with pytest.raises(OutcomeUnknown):
        held.commit(transaction)
    monkeypatch.undo()
    for call in (held.commit, held.rollback):
        with pytest.raises(
            OutcomeUnknown, match=r"^the transaction may or may not have been committed; look whether its entries are there"
        ):
            call(transaction)
    assert log.snapshot().topic("a").entries == 1


def test_a_connection_that_never_introduced_itself_is_refused(log: OpLog, held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(TryAgain, match=r"^nothing was written: this connection has been made anew, .* connect again, or set adbc")
    with refused:
        held.of(["ipv4:127.0.0.1:1"])
    held.introduce(["cookie", "ipv4:127.0.0.1:1"])
    assert held.of(["ipv4:127.0.0.1:1"]) is None
    begun = held.begin(["another", "ipv4:127.0.0.1:1"])
    assert held.of(["ipv4:127.0.0.1:1"]) == held.of(["another"]) == begun
    with refused:
        held.of(["cookie"])  # offered, and not taken
    monkeypatch.setattr(transactions, "IDLE_SECONDS", 0)
    with refused:
        held.of(["ipv4:127.0.0.1:1"])  # somebody else's by now
    assert held.of(["another"]) == begun
    held.rollback(begun, ["another"])
    assert held.of(["another"]) is None
    monkeypatch.setattr(transactions, "SESSIONS_KEPT", 1)
    held.begin(["third"])
    with refused:
        held.of(["another"])


def test_a_stopping_server_holds_nothing_more(log: OpLog) -> None:
    held = Transactions(log, log.config)
    transaction = held.begin(())
    held.close()
    late = writer(log, "a", batch(1))
    with pytest.raises(TryAgain, match="the server is shutting down; nothing was written"):
        held.hold(transaction, late)
    late.abandon()


def test_a_waiting_transaction_holds_no_file_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpLog.open(str(folder), Config(record_entries_max=1)) as log:
        held = Transactions(log, log.config)
        transaction = held.begin(())
        for _ in range(20):
            held.hold(transaction, writer(log, "a", batch(1, 2)))
        assert len(handles(folder)) < 5
        log.append("a", batch(0))
        most, real = [0], log._store.commit

        def counting(*args: Any) -> int:
            most[0] = len(handles(folder))
            return real(*args)

        monkeypatch.setattr(log._store, "commit", counting)
        assert [receipt.first_offset for receipt in held.commit(transaction)] == list(range(1, 41, 2))
        assert most[0] < 5, "nor when all of them are numbered again"
        held.close()


def test_a_failing_close_takes_nothing_back(log: OpLog, held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.close

    def failing(handle: int) -> None:
        real(handle)
        raise OSError(errno.EIO, "Input/output error")

    transaction = held.begin(())
    held.hold(transaction, writer(log, "a", batch(1)))
    held.hold(transaction, writer(log, "b", batch(1)))
    monkeypatch.setattr("flight_oplog.files.os.close", failing)
    with contextlib.suppress(TryAgain, OutcomeUnknown):
        held.commit(transaction)
    monkeypatch.undo()
    assert log.append("a", batch(2)).entries == 1
    assert [problem for problem in log.verify() if problem.severity == "error"] == []


# Through ADBC, whose ingests do not say that they belong to a transaction

WITH_COOKIES = {"adbc.flight.sql.rpc.with_cookie_middleware": "true"}


@pytest.mark.parametrize("options", [{}, WITH_COOKIES], ids=["connection", "cookies"])
def test_adbc_commits_and_rolls_back(server: ServerProcess, connection: adbc.Connection, options: dict[str, str]) -> None:
    with adbc.connect(server.uri, db_kwargs=options) as transacting, transacting.cursor() as cursor:
        assert cursor.adbc_ingest("a", SEED, mode="create_append") == 2
        cursor.adbc_ingest("b", SEED, mode="create_append")
        assert ask(connection, "SELECT topic FROM system.topics") == []
        transacting.commit()
        assert {row["entries"] for row in ask(connection, "SELECT entries FROM system.topics WHERE topic IN ('a', 'b')")} == {2}
        cursor.adbc_ingest("a", SEED, mode="append")
        transacting.rollback()
        cursor.adbc_ingest("b", SEED, mode="append")
        with connection.cursor() as at_once:
            at_once.adbc_ingest("a", SEED, mode="append")
        cursor.execute("SELECT count(*) AS n FROM a")
        assert cursor.fetchone() == (4,), "queries in a transaction see what is committed"
        transacting.commit()
        for topic in ("a", "b"):
            assert ask(connection, f"SELECT count(*) AS n FROM {topic}") == [{"n": 4}]
    with OpLog.open(str(server.folder)) as log:
        assert log.snapshot().table_version == 3


def test_a_connection_that_ends_without_commit_leaves_nothing(server: ServerProcess, connection: adbc.Connection) -> None:
    with adbc.connect(server.uri) as transacting, transacting.cursor() as cursor:
        cursor.adbc_ingest("a", SEED, mode="create_append")
    with adbc.connect(server.uri, autocommit=True) as at_once, at_once.cursor() as cursor:
        cursor.adbc_ingest("a", SEED, mode="create_append")
    assert ask(connection, "SELECT count(*) AS n FROM a") == [{"n": 2}]


def test_switching_to_autocommit_ends_the_transaction(server: ServerProcess, connection: adbc.Connection) -> None:
    with adbc.connect(server.uri) as transacting, transacting.cursor() as cursor:
        cursor.adbc_ingest("a", SEED, mode="create_append")
        transacting.adbc_connection.set_autocommit(True)
        assert ask(connection, "SELECT count(*) AS n FROM a") == [{"n": 2}]
        cursor.adbc_ingest("a", SEED, mode="append")
        assert ask(connection, "SELECT count(*) AS n FROM a") == [{"n": 4}]


def test_two_connections_keep_their_transactions_apart(server: ServerProcess, connection: adbc.Connection) -> None:
    with adbc.connect(server.uri) as first, adbc.connect(server.uri) as second:
        with first.cursor() as one, second.cursor() as two:
            one.adbc_ingest("a", SEED, mode="create_append")
            two.adbc_ingest("b", SEED, mode="create_append")
        second.commit()
        first.rollback()
        assert ask(connection, "SELECT topic FROM system.topics WHERE topic NOT LIKE '\\_%'") == [{"topic": "b"}]


def test_a_failing_commit_tells_why(server: ServerProcess) -> None:
    with adbc.connect(server.uri) as transacting, transacting.cursor() as cursor:
        cursor.adbc_ingest("a", SEED, mode="create_append")
        cursor.adbc_ingest("a", pa.table({"name": [1.5]}), mode="create_append")
        with pytest.raises(adbc_driver_manager.Error, match=r"column 'name'.*nothing was written"):
            transacting.commit()


def test_a_restart_loses_what_was_not_committed_and_says_so(start: Callable[..., ServerProcess]) -> None:
    first = start()
    port = first.uri.rpartition(":")[2]
    with adbc.connect(first.uri) as transacting, transacting.cursor() as cursor:
        cursor.adbc_ingest("a", SEED, mode="create_append")
        first.stop()
        start("--listen", f"grpc://127.0.0.1:{port}")
        with pytest.raises(adbc_driver_manager.Error, match="the server was started again since; nothing of it was written"):
            transacting.commit()
        with pytest.raises(adbc_driver_manager.Error, match="nothing was written: this connection has been made anew"):
            cursor.adbc_ingest("a", SEED, mode="create_append")


# Through plain Flight, with the id in the command


def test_a_transaction_id_in_the_command(server: ServerProcess, client: flight.FlightClient, connection: adbc.Connection) -> None:
    def action(kind: str, message: object) -> bytes:
        [*found] = client.do_action(flight.Action(kind, wire.pack(message)))
        return found[0].body.to_pybytes() if found else b""

    def ingest(topic: str, transaction_id: bytes) -> None:
        command = wire.pack(wire.CommandStatementIngest(table=topic, transaction_id=transaction_id))
        put, answers = client.do_put(flight.FlightDescriptor.for_command(command), SEED.schema)
        with put:
            put.write_batch(SEED)
            put.done_writing()
            assert answers.read().to_pybytes() == b"\x08\x02"

    begun = wire.unpack(action("BeginTransaction", wire.ActionBeginTransactionRequest())).transaction_id
    for topic in ("a", "b", "a"):
        ingest(topic, begun)
    assert ask(connection, "SELECT topic FROM system.topics") == []
    action("EndTransaction", wire.ActionEndTransactionRequest(begun, 1))
    assert [row["entries"] for row in ask(connection, "SELECT entries FROM system.topics WHERE topic IN ('a', 'b')")] == [4, 2]
    with refused(pa.ArrowInvalid, "the transaction is committed; nothing was written; begin another"):
        ingest("a", begun)
    with refused(pa.ArrowInvalid, "EndTransaction says neither commit nor rollback; the transaction is as it was"):
        action("EndTransaction", wire.ActionEndTransactionRequest(begun, 0))


def test_principals_share_a_connection_and_no_transaction(log: OpLog, held: Transactions) -> None:
    """Behind a proxy, several principals may come over one connection."""
    peer = ["ipv4:127.0.0.1:1"]
    held.introduce(peer, "ann")
    anns = held.begin(peer, "ann")
    held.introduce(peer, "bob")
    assert (held.of(peer, "ann"), held.of(peer, "bob")) == (anns, None)
    bobs = held.begin(peer, "bob")
    assert (held.of(peer, "ann"), held.of(peer, "bob")) == (anns, bobs)
    with pytest.raises(RequestError, match="was not begun by you"):
        held.check(anns, "bob")
    with pytest.raises(RequestError, match="was not begun by you"):
        held.commit(anns, peer, "bob")
    held.rollback(anns, peer, "bob")
    held.hold(anns, writer(log, "a", batch(1)), "ann")
    assert (held.topics(anns, "ann"), held.topics(bobs, "bob")) == ({"a"}, set())
    assert len(held.commit(anns, peer, "ann")) == 1


def test_nobody_drives_out_what_is_remembered_of_another(held: Transactions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "ENDED_KEPT", 10)
    monkeypatch.setattr(transactions, "SESSIONS_KEPT", 10)
    peer = ["ipv4:127.0.0.1:1"]
    begun = held.begin(peer, "ann")
    for number in range(50):
        held.commit(held.begin([f"ipv4:127.0.0.1:{number}"], "mallory"), (), "mallory")
    held.check(begun, "ann")
    assert held.of(peer, "ann") == begun
