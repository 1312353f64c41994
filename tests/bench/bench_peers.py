"""Our server and its peers, asked the same questions by the same client: `make bench-peers` (ENTRIES=n, ROUNDS=n).

The same event log lies in our log and as a plain Delta table. Every round asks each server once, in an order of its own: whoever comes
after another of the same program finds its code in the processor's caches, and whoever comes after a large answer, a heap to clear. Points
and slices are others in every round, the same for all; aggregates come with the same text again, as dashboards ask them, then in words that
were never used, and then as ones that were never asked. A ratio is a peer's time over ours in one round, and the middle one counts.
Servers that are not asked stand still. References, which are no peers, are asked in the same rounds and shown by themselves.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from bench import ENTRIES, START, events, put
from chart import chart
from deltalake import write_deltalake
from peers import ALL, ONE, Asked, Peer, Query, all_peers, ours
from references import MARKS, all_references
from rich.console import Console
from rich.table import Table

ROUNDS = int(os.environ.get("ROUNDS", "7"))
WARMING = 15  # how often each question is asked before it counts
COLD_ROUNDS = 3
CHART = Path(__file__).parent / "peers.svg"
CLIENTS = 8
MIXED_SECONDS = 10.0
SLICE = ENTRIES // 100


@dataclass
class Question:
    """One of the mix. `sql` makes its text from a node and the place of a slice's first entry, which no other round has."""

    name: str
    sql: Callable[[str, int], str]
    rounds: int = ROUNDS
    is_ordered: bool = True
    in_mix: bool = True


def at(place: int) -> str:
    """A time that every peer reads as the same instant."""
    micros = START + 1000 * place
    seconds, rest = divmod(micros, 1_000_000)
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    return f"CAST('{text}.{rest:06}+00:00' AS TIMESTAMP WITH TIME ZONE)"


def by_kind(value: str = "value", also: str = "") -> str:
    return f"SELECT kind, count(*) AS n, avg({value}) AS mean{also} FROM events GROUP BY kind ORDER BY kind"


def by_node(value: str = "value", also: str = "") -> str:
    return f"SELECT node_id, count(*) AS n, sum({value}) AS total{also} FROM events GROUP BY node_id ORDER BY n DESC, node_id LIMIT 10"


def within(place: int, also: str = "") -> str:
    return f"SELECT count(*) AS n, sum(value) AS total{also} FROM events WHERE timestamp >= {at(place)} AND timestamp < {at(place + SLICE)}"


def distinct(also: str = "", where: str = "") -> str:
    return f"SELECT count(DISTINCT node_id) AS n{also} FROM events{where}"


FEW = "timestamp, node_id, sequence, value"
QUESTIONS = [
    Question("SELECT 1", lambda node, place: ONE, 200),
    Question("COUNT(*)", lambda node, place: "SELECT count(*) AS n FROM events", 50),
    Question("point lookup", lambda node, place: f"SELECT {FEW} FROM events WHERE node_id = '{node}' ORDER BY sequence"),
    Question("1 % time slice", lambda node, place: within(place)),
    Question("group by kind", lambda node, place: by_kind()),
    Question("group by node_id", lambda node, place: by_node()),
    Question("distinct", lambda node, place: distinct()),
    Question("top 10", lambda node, place: f"SELECT {FEW} FROM events ORDER BY value DESC LIMIT 10"),
    Question("SELECT *", lambda node, place: ALL, is_ordered=False),
    Question("1 % time slice, new words", lambda node, place: within(place, f", {place} AS anew"), in_mix=False),
    Question("group by kind, new words", lambda node, place: by_kind(also=f", {place} AS anew"), in_mix=False),
    Question("group by node_id, new words", lambda node, place: by_node(also=f", {place} AS anew"), in_mix=False),
    Question("distinct, new words", lambda node, place: distinct(also=f", {place} AS anew"), in_mix=False),
    Question(
        "top 10, new words", lambda node, place: f"SELECT {FEW}, {place} AS anew FROM events ORDER BY value DESC LIMIT 10", in_mix=False
    ),
    Question("group by kind, never asked", lambda node, place: by_kind(f"value + {place}"), in_mix=False),
    Question("group by node_id, never asked", lambda node, place: by_node(f"value + {place}"), in_mix=False),
    Question("distinct, never asked", lambda node, place: distinct(where=f" WHERE value <> {place}"), in_mix=False),
]
MIX = [question for question in QUESTIONS if question.in_mix]


@dataclass
class Found:
    """Seconds of one question at each that answers it, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, peer: str) -> float:
        ratios = sorted(theirs / mine for mine, theirs in zip(self.seconds["flight_oplog"], self.seconds[peer], strict=True))
        return ratios[len(ratios) // 2]

    def middle(self, name: str) -> float:
        return sorted(self.seconds[name])[len(self.seconds[name]) // 2]


def same(left: pa.Table, right: pa.Table, is_ordered: bool) -> bool:
    """Whether two answers are equal, but for types of the same values and the last digits of sums."""
    if left.num_rows != right.num_rows or left.column_names != right.column_names:
        return False
    if not is_ordered:
        return left.num_rows == right.num_rows  # which of them are first is nobody's promise; the sums tell
    for name in left.column_names:
        for one, other in zip(left[name].to_pylist(), right[name].to_pylist(), strict=True):
            if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-9)):
                return False
    return True


def evict(*folders: Path) -> None:
    """Have the system forget what it knows of the files."""
    os.sync()  # it only forgets what is on the disk
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ask_all(servers: Sequence[Asked], nodes: Sequence[str]) -> dict[str, Found]:
    """Ask every question of all who answer it, warm; check each first answer against ours, the first of `servers`."""
    found: dict[str, Found] = {}
    with contextlib.ExitStack() as stack:
        asks: list[tuple[Asked, Query]] = [(server, stack.enter_context(server.connect())) for server in servers]
        for question in QUESTIONS:
            here = found[question.name] = Found()
            for turn in range(-1 if question.is_ordered is False else -WARMING, question.rounds):
                chance = random.Random(WARMING + turn)  # not of a number below 0: -1 gives what 1 does
                sql = question.sql(chance.choice(nodes), chance.randrange(ENTRIES - SLICE))
                wanted = None
                for server, ask in asks if turn < 0 else chance.sample(asks, len(asks)):
                    if server.statements is not None and sql not in server.statements:
                        continue
                    began = time.perf_counter()
                    answer = ask(sql)
                    seconds = time.perf_counter() - began
                    if turn >= 0:
                        here.seconds.setdefault(server.name, []).append(seconds)
                    elif wanted is None:
                        wanted = answer
                    else:
                        assert same(wanted, answer, question.is_ordered), (question.name, server.name)
                    del answer
    return found


def cold(
    starts: dict[str, Callable[[], contextlib.AbstractContextManager[Peer]]], folders: list[Path], nodes: Sequence[str]
) -> dict[str, Found]:
    """Each question as the first one after a start, with nothing of the files in the system's memory."""
    found = {question.name: Found({name: [] for name in starts}) for question in MIX[2:]}
    for turn in range(COLD_ROUNDS):
        for question in MIX[2:]:
            chance = random.Random(turn)
            sql = question.sql(chance.choice(nodes), chance.randrange(ENTRIES - SLICE))
            for name, start in chance.sample([*starts.items()], len(starts)):
                with start() as server, server.connect() as ask:
                    evict(*folders)
                    began = time.perf_counter()
                    ask(sql)
                    found[question.name].seconds[name].append(time.perf_counter() - began)
    return found


def mixed(server: Peer, nodes: Sequence[str]) -> float:
    """Queries a second of CLIENTS clients at once, each asking the mix but for the whole table in an order of its own."""
    done = [0] * CLIENTS
    ready, end = threading.Barrier(CLIENTS + 1), [0.0]

    def client(number: int) -> None:
        chance = random.Random(number)
        with server.connect() as ask:
            ready.wait()
            while time.perf_counter() < end[0]:
                question = chance.choice(MIX[:-1])
                ask(question.sql(chance.choice(nodes), chance.randrange(ENTRIES - SLICE)))
                done[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    end[0] = time.perf_counter() + MIXED_SECONDS
    began = time.perf_counter()
    ready.wait()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


def geometric(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def coloured(ratio: float, mark: float = 1.0) -> str:
    return f"[{'green' if ratio >= mark else 'red'}]{ratio:.2f}[/]"


def table_of(title: str, *headings: str) -> Table:
    table = Table(title=title, header_style="bold")
    for heading in ("question", "ours, ms", *headings):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    return table


def printed(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def show(title: str, found: dict[str, Found], names: list[str]) -> None:
    table = table_of(title, *names, "fastest")
    ratios = {question: [here.ratio(name) for name in names] for question, here in found.items()}
    mixed_in = [[*ratios[question.name], min(ratios[question.name])] for question in MIX if question.name in ratios]
    for question, here in found.items():
        cells = [coloured(ratio) for ratio in (*ratios[question], min(ratios[question]))]
        table.add_row(question, f"{here.middle('flight_oplog') * 1000:,.1f}", *cells)
        if question == MIX[-1].name:
            table.add_section()
            table.add_row("geometric mean", "", *(f"{geometric(column):.2f}" for column in zip(*mixed_in, strict=True)), style="bold")
            table.add_section()
    printed(table)


def show_references(found: dict[str, Found], names: list[str]) -> None:
    """Show the ratios to references, each with the mark it has to reach where there is one."""
    table = table_of("the same rounds, beside references: above 1 we are faster", *names)

    def cell(question: str, name: str) -> str:
        if name not in found[question].seconds:
            return ""
        mark = MARKS.get((question, name))
        return coloured(found[question].ratio(name), mark or 1.0) + (f" (mark {mark})" if mark else "")

    for question, here in found.items():
        table.add_row(question, f"{here.middle('flight_oplog') * 1000:,.1f}", *(cell(question, name) for name in names))
    printed(table)


def main() -> None:
    only = sys.argv[1:] or ["warm", "mixed", "cold", "chart"]
    folder = Path(tempfile.mkdtemp(prefix="oplog-peers-"))
    plain, data = folder / "plain", folder / "log"
    try:
        batches = list(events(ENTRIES))
        nodes = sorted(set(batches[0]["node_id"].to_pylist()))
        write_deltalake(str(plain), pa.RecordBatchReader.from_batches(batches[0].schema, iter(batches)))
        with ours(data, folder / "ours") as server:
            put(server.uri, "events", batches)
        del batches
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(ours(data, folder / "ours"))]
            servers += [stack.enter_context(start()) for start in all_peers(plain, folder)]
            names = [server.name for server in servers[1:]]
            if "warm" in only:
                title = f"{ENTRIES:,} entries, warm: a peer's time over ours, above 1 we are faster"
                with contextlib.ExitStack() as beside:
                    references = [beside.enter_context(start()) for start in all_references(plain, folder)]
                    found = ask_all([*servers, *references], nodes)
                show(title, found, names)
                show_references(found, [reference.name for reference in references])
                if "chart" in only:
                    chart(title, {question: {name: here.ratio(name) for name in names} for question, here in found.items()}, CHART)
            if "mixed" in only:
                rates = {server.name: mixed(server, nodes) for server in servers}
                for name, rate in rates.items():
                    mine_over = rates["flight_oplog"] / rate
                    print(f"{CLIENTS} clients, mixed: {name} {rate:,.0f} queries a second; ours over it {mine_over:.2f}")
            for server in servers:
                peak, files = server.peak_mib()
                print(f"peak memory: {server.name} {peak:,.0f} MiB, {files:,.0f} of them pages of files")
        if "cold" in only:
            starts = dict(zip(["flight_oplog", *names], [lambda: ours(data, folder / "ours"), *all_peers(plain, folder)], strict=True))
            starts.pop("ROAPI in memory", None)  # it has read everything before it answers
            show("cold: the first question after a start, files not in memory", cold(starts, [plain, data], nodes), [*starts][1:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
