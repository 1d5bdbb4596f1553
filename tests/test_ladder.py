"""Imports point one way. This table is the drawing, and the check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module of pushup may import those above it on its own line, and nothing else of pushup.
LADDER = {
    "version": (),
    "errors": (),
    "address": (),
    "messages": ("errors",),
    "backlog": ("messages",),
    "redis_url": ("address",),
    "quota": (),
    "peers": ("errors",),
    "origins": (),
    "sender": ("origins", "peers"),
    "access": ("errors", "messages", "quota"),
    "tokens": ("access", "errors"),
    "settings": ("address", "errors", "messages", "origins", "peers", "redis_url"),
    "logs": (),
    "metrics": ("errors",),
    "wire": ("errors", "messages", "settings"),
    "head": (),
    "hub": ("backlog", "errors", "messages"),
    "broker": ("errors", "messages"),
    "memory": ("backlog", "broker", "errors", "messages"),
    "library": ("errors", "messages"),
    "servers": ("address", "redis_url"),
    "link": ("library", "servers"),
    "caller": ("address", "errors", "library", "link", "messages", "redis_url", "servers"),
    "redis_broker": ("address", "broker", "caller", "errors", "library", "link", "messages", "redis_url"),
    "publisher": ("caller", "errors", "library", "messages", "publications", "redis_url"),
    "node": ("broker", "errors", "hub", "messages", "metrics", "settings", "version"),
    "realm": ("access", "errors", "node", "quota", "sender", "tokens"),
    "service": ("access", "metrics", "origins", "peers", "realm", "sender", "settings"),
    "asked": ("messages", "realm", "sender"),
    "publishing": ("access", "errors", "messages", "realm", "wire"),
    "rush": (),
    "lane": (
        "asked",
        "errors",
        "head",
        "hub",
        "messages",
        "node",
        "origins",
        "peers",
        "publishing",
        "realm",
        "rush",
        "sender",
        "service",
        "tokens",
        "wire",
    ),
    "streams": ("access", "errors", "messages", "realm", "sender", "service", "wire"),
    "problems": ("errors",),
    "web": (
        "access",
        "errors",
        "lane",
        "messages",
        "origins",
        "problems",
        "publishing",
        "realm",
        "service",
        "streams",
        "wire",
    ),
    "nchan": ("access", "errors", "messages", "realm", "service", "settings", "streams", "wire"),
    "dashboard": (
        "address",
        "errors",
        "memory",
        "messages",
        "metrics",
        "node",
        "realm",
        "service",
        "settings",
        "streams",
        "wire",
    ),
    "admin": ("dashboard", "errors", "metrics", "problems", "realm", "service", "version"),
    "demo": (),
    "server": (
        "access",
        "address",
        "admin",
        "broker",
        "demo",
        "errors",
        "lane",
        "memory",
        "messages",
        "metrics",
        "nchan",
        "node",
        "realm",
        "redis_broker",
        "redis_url",
        "service",
        "settings",
        "web",
    ),
    "workers": ("address", "errors", "settings"),
    "__main__": ("cli",),
    "backoff": (),
    "publications": ("errors", "messages"),
    "dialogue": ("backoff", "errors", "messages", "publications", "version"),
    "client": ("dialogue", "errors", "messages", "publications"),
    "sync_client": ("dialogue", "errors", "messages", "publications"),
    "http_publisher": ("client", "dialogue", "errors", "messages", "publications", "sync_client"),
    "table": (),
    "nodes": ("address", "caller", "errors", "library", "messages", "redis_url", "settings", "table"),
    "commands": ("client", "dialogue", "errors", "http_publisher", "messages", "publisher", "table"),
    "bench": ("address", "dialogue", "errors"),
    "completion": (),
    "cli": (
        "access",
        "address",
        "bench",
        "commands",
        "completion",
        "dialogue",
        "errors",
        "logs",
        "nodes",
        "server",
        "settings",
        "version",
        "workers",
    ),
    "__init__": ("client", "dialogue", "http_publisher", "publisher", "sync_client", "version"),
}

# The same for the package that operates nodes from outside.
CLUSTER_LADDER = {
    "errors": (),
    "processes": ("errors",),
    "state": ("errors", "processes"),
    "stores": ("errors", "processes", "state"),
    "nodes": ("errors", "processes"),
    "haproxy": ("errors", "processes"),
    "operate": ("errors", "haproxy", "nodes", "processes", "state", "stores"),
    "__main__": ("errors", "operate", "state"),
    "__init__": ("errors", "operate"),
}

LADDERS = {"pushup": LADDER, "cluster": CLUSTER_LADDER}

# What no module of these may import, because it must stay free of I/O.
PURE = {
    "access",
    "address",
    "backlog",
    "backoff",
    "peers",
    "dialogue",
    "errors",
    "head",
    "hub",
    "library",
    "messages",
    "origins",
    "publications",
    "quota",
    "redis_url",
    "sender",
    "settings",
    "wire",
}
IMPURE = {"asyncio", "socket", "aiohttp", "time", "threading"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            names.add(node.module)
    return names


def modules(package: str) -> dict[str, Path]:
    paths = (ROOT / package).rglob("*.py")
    return {path.relative_to(ROOT / package).parts[0].removesuffix(".py"): path for path in paths}


@pytest.mark.parametrize("package", LADDERS)
def test_every_module_is_on_the_ladder(package: str) -> None:
    """A module without a rung is a module nobody decided on."""
    assert set(modules(package)) == set(LADDERS[package])


@pytest.mark.parametrize(
    ("package", "module"), [(package, module) for package, ladder in LADDERS.items() for module in ladder]
)
def test_a_module_imports_only_what_is_above_it(package: str, module: str) -> None:
    """The ladder lists exactly what each module uses, and a submodule never its own package's root."""
    names = imported(modules(package)[module])
    assert package not in names
    used = {name.removeprefix(f"{package}.").partition(".")[0] for name in names if name.startswith(f"{package}.")}
    assert used == set(LADDERS[package][module])


@pytest.mark.parametrize("package", LADDERS)
def test_the_ladder_has_no_cycle(package: str) -> None:
    """Every rung stands on rungs that were drawn before it."""
    ladder = LADDERS[package]
    done: set[str] = set()
    while len(done) < len(ladder):
        ready = {module for module, below in ladder.items() if module not in done and set(below) <= done}
        assert ready, f"a cycle among {set(ladder) - done}"
        done |= ready


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_core_is_pure(module: str) -> None:
    """What decides does no I/O and looks at no clock."""
    assert not {name.partition(".")[0] for name in imported(modules("pushup")[module])} & IMPURE


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("pushup", {"cluster", "compose", "loadtest", "tests"}),
        ("cluster", {"compose", "loadtest", "tests"}),
        ("compose", {"cluster", "loadtest", "tests"}),
        ("loadtest", {"compose", "tests"}),
    ],
)
def test_nothing_is_imported_from_above(package: str, above: set[str]) -> None:
    """loadtest stands on cluster, cluster and the example application on pushup; pushup knows none of them."""
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & above, path
