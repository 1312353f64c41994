"""The architecture, as a test: who may import whom, and which heavy dependency has which owner."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "flight_oplog"

# Each module imports only from those above it.
ORDER = [
    "errors",
    "kept",
    "growing",
    "shares",
    "threads",
    "config",
    "logs",
    "listening",
    "grants",
    "accounts",
    "bearers",
    "auth",
    "files",
    "maps",
    "storage",
    "schema",
    "codec",
    "codes",
    "parts",
    "keys",
    "parquet",
    "summary",
    "rows",
    "records",
    "datafile",
    "reader",
    "deltalog",
    "topics",
    "store",
    "appends",
    "producers",
    "group",
    "committer",
    "oplog",
    "numbers",
    "filters",
    "vocabulary",
    "neighbours",
    "overview",
    "cache",
    "pruning",
    "gathering",
    "top",
    "scans",
    "outer",
    "provider",
    "sql.lexer",
    "sql.measure",
    "sql.memory",
    "sql.refusals",
    "sql.stream",
    "sql.turns",
    "sql.queries",
    "sql.catalog",
    "sql.views",
    "sql.parameters",
    "sql.plans",
    "sql.planner",
    "sql.aggregates",
    "sql.repeated",
    "sql.sums",
    "sql.engine",
    "sql.statements",
    "follow",
    "transactions",
    "flightsql.caller",
    "flightsql.cancelling",
    "flightsql.wire",
    "flightsql.dialect",
    "flightsql.metadata",
    "flightsql.handles",
    "flightsql.answers",
    "flightsql.sessions",
    "flightsql.service",
    "calls",
    "server",
    "client",
    "printing",
    "cli",
    "__main__",
]

OWNERS = {
    "deltalake": {"store"},
    "obstore": {"storage"},
    "datafusion": {"sql.aggregates", "sql.catalog", "sql.engine", "sql.planner", "sql.repeated", "sql.sums"},
    "google": {"flightsql.wire"},
    "argon2": {"accounts"},
    "jwt": {"bearers"},
    "pyarrow.flight": {"calls", "server", "client"},
    "adbc_driver_flightsql": {"cli"},
    "adbc_driver_manager": {"cli"},
    "rich": {"cli", "printing"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Every module a file imports, in function bodies too, `from package import module` resolved."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_modules_import_only_from_those_above() -> None:
    for name, path in modules().items():
        ours = {found.removeprefix("flight_oplog.") for found in imported(path) if found.startswith("flight_oplog.")}
        above = ORDER[: ORDER.index(name)]
        below = [other for other in ours if other in ORDER and other not in above]
        assert below == [], f"{name} imports {below}"


def test_heavy_dependencies_have_one_owner() -> None:
    for name, path in modules().items():
        for found in imported(path):
            for dependency, owners in OWNERS.items():
                if found == dependency or found.startswith(dependency + "."):
                    assert name in owners, f"{name} imports {found}, which belongs to {owners}"


def test_only_config_reads_the_environment() -> None:
    for name, path in modules().items():
        if name != "config":
            text = path.read_text()
            assert "environ" not in text, name
            assert "getenv" not in text, name
