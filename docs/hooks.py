"""Fills the site's pages with what is said elsewhere, so that it is said once and cannot go stale.

A page asks for it by a comment on a line of its own, `<!-- fill: WHAT -->`:

    settings, errors, metrics, commands                       from the code
    overview, operations, shapes                              from the API's description
    text FILE | HEADING                                       a section of a Markdown file, or all of it without HEADING
    table FILE | COLUMN | COLUMN ...                          the table whose head begins with COLUMN; if more are
                                                              named, these columns of it
    rows FILE | HEADING | ROW | ROW ...                       these rows of the table below HEADING, two columns of them

Files are named from the root of the repository. What is not found ends the build. Error codes that stand in a page as
code become links to what is said of them, and so do settings, unless their names are words that may mean anything.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

from pushup.cli import GROUPS, make_parser
from pushup.errors import PushUpError, SettingsError
from pushup.metrics import Metrics
from pushup.settings import FIELDS, REALM_SETTINGS, Field, show

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent

SETTINGS_PAGE: Final = "reference/settings.md"
ERRORS_PAGE: Final = "reference/errors.md"
HTTP_PAGE: Final = "reference/http.md"

PAGES: Final = {
    "SECURITY.md": "access.md",
    "DESIGN.md": "design.md",
    "CHANGELOG.md": "changelog.md",
    "compose/README.md": "reports/compose.md",
    "loadtest/REPORT.md": "reports/speed.md",
    "loadtest/PERFORMANCE.md": "reports/performance.md",
    "loadtest/ATTACK.md": "reports/attack.md",
    "tests/chaos/REPORT.md": "reports/chaos.md",
    "pushup/openapi.json": "reference/http.md",
}
"""Files of the repository, and the pages that show them."""

PICTURES: Final = {
    f"loadtest/charts/{path.name}": f"reports/charts/{path.name}" for path in (ROOT / "loadtest/charts").glob("*.svg")
}
"""Pictures in these pages, and where the site has them."""

HELP_COLUMNS: Final = 82
JSON_COLUMNS: Final = 76

_FILL: Final = re.compile(r"^<!-- fill: (\w+)(?: (.*?))? -->$", re.M)
_HEADING: Final = re.compile(r"^(#+) (.*)$")
_LINK: Final = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE: Final = re.compile(r"(<(a|pre|h[1-6])\b.*?</\2>)|<code>([a-z_]+)</code>", re.S)
_SPAN: Final = re.compile(r"`[^`]*`")
_UNITS: Final = (("MiB", 1024 * 1024), ("KiB", 1024))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by MkDocs first: a name with a star in the navigation stands for all pages that match, if any."""

    def expand(items: Sequence[Any]) -> list[Any]:
        expanded: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                expanded += [{title: pages} for title, below in item.items() if (pages := expand(below))]
            elif "*" in item:
                expanded += sorted(str(path.relative_to(DOCS)) for path in DOCS.glob(item))
            else:
                expanded.append(item)
        return expanded

    config.nav = expand(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs with the files of the site: the pictures of the reports are among them."""
    for path, place in PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by MkDocs with the source of each page."""

    def fill(match: re.Match[str]) -> str:
        what, given = match.group(1), match.group(2) or ""
        arguments = [argument.strip() for argument in given.split(" | ")] if given else []
        if what not in FILLS:
            raise PluginError(f"{page.file.src_uri} asks for {what!r}; there are {', '.join(FILLS)}")
        try:
            return FILLS[what](*arguments)
        except (LookupError, OSError, TypeError) as error:
            raise PluginError(f"{page.file.src_uri}, {match.group()}: {error}") from error

    markdown = "\n".join(_plain_bars(line) for line in _FILL.sub(fill, markdown).split("\n"))
    return _relate(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by MkDocs with each page as HTML: settings and error codes become links."""
    targets = {error.code: (ERRORS_PAGE, error.code) for error in _errors()}
    if not page.file.src_uri.startswith("clients/"):  # Their parameters have the same names.
        targets = {name: (SETTINGS_PAGE, name) for name in FIELDS if "_" in name} | targets

    def link(match: re.Match[str]) -> str:
        untouched, _, name = match.groups()
        if untouched or name not in targets or targets[name][0] == page.file.src_uri:
            return match.group()
        source, anchor = targets[name]
        file = files.get_file_from_path(source)
        if file is None:
            raise PluginError(f"there is no page {source}")
        return f'<a href="{get_relative_url(file.url, page.url)}#{anchor}">{match.group()}</a>'

    return _CODE.sub(link, html)


def _plain_bars(line: str) -> str:
    """In a row of a table, code without the backslashes that GitHub wants before bars, and Python-Markdown shows."""
    return _SPAN.sub(lambda match: match.group().replace("\\|", "|"), line) if line.startswith("| ") else line


def _relate(markdown: str, source: str) -> str:
    """Links to pages that fills made, `page:PATH`, as links from `source`."""
    return re.sub(r"\]\(page:([^)]*)\)", lambda match: f"]({'../' * source.count('/')}{match.group(1)})", markdown)


# --- from the code


def show_settings() -> str:
    """A table for each group of `pushup serve --help`."""
    parts = []
    for title, names in GROUPS.items():
        parts.append(f"## {title[0].upper()}{title[1:]}\n")
        rows = [_setting_row(FIELDS[name]) for name in names]
        parts.append(_table(("setting", "default", "what it is", "it must", "realm"), rows))
    return "\n".join(parts)


def _setting_row(field: Field) -> tuple[str, ...]:
    shown = show(field.name, field.default)
    default = f"`{shown}`" if shown else "none"
    if field.shown == "BYTES":
        unit, size = next(((unit, size) for unit, size in _UNITS if field.default % size == 0), ("bytes", 1))
        default = f"`{shown}` ({field.default // size} {unit})"
    elif field.shown == "SECONDS":
        default += " s"
    own = "yes" if field.name in REALM_SETTINGS else ""
    return f"`{field.name}`{{: #{field.name} }}", default, field.description, field.must, own


def show_errors() -> str:
    """A table of all error codes."""
    meanings = {error.code: (error.__doc__ or "").strip().splitlines()[0] for error in _errors()}
    meanings[PushUpError.code] = "Something went wrong in the server; its log says what."
    rows = [
        (f"`{error.code}`{{: #{error.code} }}", str(error.status), meanings[error.code])
        for error in sorted(_errors(), key=lambda error: error.status)
    ]
    return _table(("code", "status", "what it says"), rows)


def _errors(error: type[PushUpError] = PushUpError) -> Iterator[type[PushUpError]]:
    if error is not SettingsError:
        yield error
    for child in error.__subclasses__():
        yield from _errors(child)


def show_metrics() -> str:
    """A table of the families that a node has by itself."""
    rows = []
    metrics = Metrics()
    metrics.realm("default")
    for family in metrics.collect():
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    return _table(("name", "type", "labels", "what it is"), rows)


def show_commands() -> str:
    """Each command's help. The settings, which several take, have a page of their own."""
    os.environ["COLUMNS"] = str(HELP_COLUMNS)  # Which argparse believes more than the terminal.
    parser = make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [_text_block(parser.format_help())]
    for name, sub in commands.choices.items():
        described = sub.format_help()
        first = next((title for title in GROUPS if f"\n{title}:\n" in described), None)
        note = ""
        if first is not None:
            head, _, _ = described.partition(f"\n{first}:\n")
            described, note = head, f"\nIt takes every [setting](page:{SETTINGS_PAGE}) as a flag.\n"
        parts.append(f"## pushup {name}\n\n{_text_block(described)}{note}")
    return "\n".join(parts)


# --- from the API's description


def _api() -> Any:
    return json.loads((ROOT / "pushup/openapi.json").read_text())


def show_overview() -> str:
    """A line for each operation, which leads to all that is said of it."""
    rows = [
        (f"[`{method.upper()} {path}`](page:{HTTP_PAGE}#{operation['operationId']})", operation["summary"])
        for path, item in _api()["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    ]
    return _table(("request", "what it is for"), rows)


def show_operations() -> str:
    """Everything that `openapi.json` says of each operation."""
    api = _api()
    parts = []
    for tag in api["tags"]:
        parts.append(f"## {tag['name'][0].upper()}{tag['name'][1:]}\n\n{tag['description']}\n")
        for path, item in api["paths"].items():
            for method, operation in item.items():
                if method != "parameters" and tag["name"] in operation["tags"]:
                    parts.append(_show_operation(api, path, method, operation, item.get("parameters", [])))
    return "\n".join(parts)


def _show_operation(
    api: Any, path: str, method: str, operation: Mapping[str, Any], shared: Sequence[Mapping[str, Any]]
) -> str:
    parameters = [_resolve(api, parameter) for parameter in [*shared, *operation.get("parameters", [])]]
    body = operation.get("requestBody")
    parts = [f"### {method.upper()} {path} {{: #{operation['operationId']} }}\n", f"**{operation['summary']}.**\n"]
    if "description" in operation:
        parts.append(f"{operation['description']}\n")
    parts.append(f"Who may: {_show_security(operation.get('security', []))}\n")
    parts.append(_text_block(_show_curl(api, path, method, parameters, body), "sh"))
    if parameters:
        rows = [
            (
                f"`{parameter['name']}`",
                parameter["in"] + (", required" if parameter.get("required") else ""),
                _show_type(api, parameter["schema"]),
                parameter.get("description", ""),
            )
            for parameter in parameters
        ]
        parts.append(_table(("parameter", "where", "type", "what it is"), rows))
    if body:
        content = body["content"]["application/json"]
        parts.append(
            f"The body{'' if body.get('required') else ' (may be left out)'}: {_show_type(api, content['schema'])}.\n"
        )
        for name, example in content.get("examples", {}).items():
            parts.append(f"{name[0].upper()}{name[1:]}:\n\n{_json_block(example['value'])}")
    failures = []
    for status, response in operation["responses"].items():
        response = _resolve(api, response)
        if int(status) < 400:
            parts.append(f"**{status}** {response['description']}\n")
            parts += [_show_content(api, kind, content) for kind, content in response.get("content", {}).items()]
        else:
            failures.append((f"**{status}**", _show_codes(response), response["description"]))
    if failures:
        parts.append(_table(("error", "code", "when"), failures))
    return "\n".join(parts)


def _show_security(security: Sequence[Mapping[str, Any]]) -> str:
    words = {
        "key": "a key",
        "token": "a token",
        "tokenInQuery": "a token as `?token=`",
        "tokenInCookie": "a token in a cookie",
    }
    named = [words.get(name, name) for item in security for name in item]
    if not named:
        return "everybody."
    anybody = "everybody where the realm is open; else " if {} in security else ""
    return f"{anybody}{', '.join(named[:-1])}{' or ' if named[:-1] else ''}{named[-1]} that allows it."


def _show_curl(
    api: Any, path: str, method: str, parameters: Sequence[Mapping[str, Any]], body: Mapping[str, Any] | None
) -> str:
    query = []
    for parameter in parameters:
        example = _example(parameter)
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", str(example))
        elif parameter["in"] == "query" and parameter.get("required"):
            query += [(parameter["name"], value) for value in (example if isinstance(example, list) else [example])]
    url = f"localhost:8080{path}" + (f"?{urlencode(query)}" if query else "")
    words = ["curl"]
    if method == "delete" or (method == "post" and not (body and body.get("required"))):
        words += ["-X", method.upper()]
    words.append(shlex.quote(url))
    if body and body.get("required"):
        words += ["-d", shlex.quote(json.dumps(_example(body["content"]["application/json"]), ensure_ascii=False))]
    return " ".join(words) + "\n"


def _example(thing: Mapping[str, Any]) -> Any:
    if "examples" in thing:
        return next(iter(thing["examples"].values()))["value"]
    return thing.get("example")


def _show_content(api: Any, kind: str, content: Mapping[str, Any]) -> str:
    parts = [f"`{kind}`: {_show_type(api, content['schema'])}.\n"] if "schema" in content else []
    examples = content.get("examples", {"": {"value": content["example"]}} if "example" in content else {})
    for name, example in examples.items():
        title = f"{name[0].upper()}{name[1:]}:\n\n" if name else ""
        value = example["value"]
        parts.append(title + (_text_block(value) if isinstance(value, str) else _json_block(value)))
    return "\n".join(parts)


def _show_codes(response: Mapping[str, Any]) -> str:
    for content in response.get("content", {}).values():
        code = content.get("schema", {}).get("properties", {}).get("code", {})
        return ", ".join(f"`{name}`" for name in code.get("enum", [code["const"]] if "const" in code else []))
    return ""


def show_shapes() -> str:
    """What the operations take and give, by name."""
    api = _api()
    parts = []
    for name, schema in api["components"]["schemas"].items():
        parts.append(f"### {name} {{: #{_anchor(name)} }}\n")
        if "description" in schema:
            parts.append(f"{schema['description']}\n")
        if "properties" in schema:
            required = schema.get("required", ())
            rows = [
                (
                    f"`{member}`" + ("" if member in required else " (optional)"),
                    _show_type(api, of),
                    of.get("description", ""),
                )
                for member, of in schema["properties"].items()
            ]
            parts.append(_table(("member", "type", "what it is"), rows))
        else:
            parts.append(f"Type: {_show_type(api, {**schema, 'description': ''})}.\n")
    return "\n".join(parts)


def _show_type(api: Any, schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_anchor(name)})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_show_type(api, one) for one in schema[several]) + _show_bounds(schema)
    if "allOf" in schema:
        return _show_type(api, schema["allOf"][0]) + _show_bounds(schema)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any JSON value")
    kind = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if kind == "array":
        return f"array of {_show_type(api, schema.get('items', {}))}" + _show_bounds(schema)
    return kind + _show_bounds(schema)


def _show_bounds(schema: Mapping[str, Any]) -> str:
    bounds = []
    for low, high, what in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        if low in schema and high in schema:
            bounds.append(f"{schema[low]} to {schema[high]}{what}")
        elif high in schema:
            above = f"above {schema['exclusiveMinimum']}, " if "exclusiveMinimum" in schema else ""
            bounds.append(f"{above}up to {schema[high]}{what}")
        elif low in schema:
            bounds.append(f"at least {schema[low]}{what}")
    if "default" in schema:
        bounds.append(f"default {json.dumps(schema['default'])}")
    return f" ({'; '.join(bounds)})" if bounds else ""


def _resolve(api: Any, thing: Any) -> Any:
    if "$ref" in thing:
        _, *steps = thing["$ref"].split("/")
        thing = api
        for step in steps:
            thing = thing[step]
    return thing


def _anchor(shape: str) -> str:
    return f"shape-{shape.lower()}"


# --- from other files


def show_text(file: str, heading: str | None = None) -> str:
    """A section without its heading, or a file without its title."""
    lines = (ROOT / file).read_text().splitlines()
    headings = _headings(lines)
    first = next((at for at, _, title in headings if title == heading or heading is None), None)
    if first is None:
        raise LookupError(f"{file} has no heading {heading!r}")
    level = next(level for at, level, _ in headings if at == first)
    end = next((at for at, other, _ in headings if at > first and other <= level), len(lines))
    return _rewrite("\n".join(lines[first + 1 : end]), file) + "\n"


def show_table(file: str, first: str, *others: str) -> str:
    """The table whose head begins with `first`: all of it, or the columns named."""
    lines = (ROOT / file).read_text().splitlines()
    begin = next((at for at, line in enumerate(lines) if line.startswith(f"| {first} |")), None)
    if begin is None:
        raise LookupError(f"{file} has no table whose head begins with {first!r}")
    table = _table_at(lines, begin)
    if others:
        cells = [_cells(line) for line in table]
        wanted = [cells[0].index(column) for column in (first, *others)]
        table = [f"| {' | '.join(row[at] for at in wanted)} |" for row in cells]
    return _rewrite("\n".join(table), file) + "\n"


def show_rows(file: str, heading: str, *rows: str) -> str:
    """Some rows, in the order asked for, of the first table below a heading: their names and their first values."""
    lines = (ROOT / file).read_text().splitlines()
    below = next((at for at, _, title in _headings(lines) if title == heading), None)
    if below is None:
        raise LookupError(f"{file} has no heading {heading!r}")
    first = next(at for at in range(below, len(lines)) if lines[at].startswith("|"))
    head, rule, *body = [_cells(line)[:2] for line in _table_at(lines, first)]
    found = {line[0]: line for line in body}
    return (
        _rewrite("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *(found[row] for row in rows))), file)
        + "\n"
    )


def _table_at(lines: Sequence[str], first: int) -> list[str]:
    end = next((at for at in range(first, len(lines)) if not lines[at].startswith("|")), len(lines))
    return list(lines[first:end])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _headings(lines: Sequence[str]) -> list[tuple[int, int, str]]:
    """Line, level and title of each heading."""
    found = []
    fenced = False
    for at, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and (match := _HEADING.match(line)):
            found.append((at, len(match.group(1)), match.group(2)))
    return found


def _rewrite(markdown: str, file: str) -> str:
    """Links of a file as links to pages; what the site does not have is text."""

    def turn(match: re.Match[str]) -> str:
        text, target = match.group(1), match.group(2)
        if "://" in target:
            return match.group()
        path, _, anchor = target.partition("#")
        meant = (ROOT / file).parent.joinpath(path).resolve() if path else ROOT / file
        path = str(meant.relative_to(ROOT))
        if path in PICTURES:
            return f"[{text}](page:{PICTURES[path]})"
        page = PAGES.get(path)
        if page is None or not (DOCS / page).exists():
            return text if "`" in text else f"`{text}`"
        return f"[{text}](page:{page}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(turn, markdown)


# --- forms


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s*\n+\s*", " ", text).replace("|", "\\|")


def _json_block(value: Any) -> str:
    return _text_block(_pretty(value), "json")


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits stands on a line of its own."""
    short = json.dumps(value, ensure_ascii=False)
    if indent + len(short) <= JSON_COLUMNS or not isinstance(value, dict | list) or not value:
        return short
    margin = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {_pretty(item, indent + 2)}" for name, item in value.items()]
    else:
        parts = [_pretty(item, indent + 2) for item in value]
    first, last = ("{", "}") if isinstance(value, dict) else ("[", "]")
    inner = ",\n".join(f"{margin}{part}" for part in parts)
    return f"{first}\n{inner}\n{' ' * indent}{last}"


def _text_block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


FILLS: Final[Mapping[str, Callable[..., str]]] = {
    "settings": show_settings,
    "overview": show_overview,
    "operations": show_operations,
    "shapes": show_shapes,
    "errors": show_errors,
    "metrics": show_metrics,
    "commands": show_commands,
    "text": show_text,
    "table": show_table,
    "rows": show_rows,
}
