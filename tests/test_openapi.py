"""The description of the HTTP API: valid, complete, and exactly what the server does."""

import copy
import json
import signal
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CheckFunction
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from pushup import __version__
from pushup.errors import NotFound, PushUpError, SettingsError
from pushup.memory import MemoryBroker
from pushup.messages import KEY_LENGTH_MAX, MAX_ID, MAX_NAME_BYTES, NESTING_MAX
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.realm import Realm
from pushup.service import Service
from pushup.settings import Settings
from pushup.web import make_app
from pushup.wire import SECONDS_MAX
from tests.support import connected, running
from tests.test_cli import Process, serving

DOCUMENT: Final[dict[str, Any]] = json.loads(files("pushup").joinpath("openapi.json").read_bytes())

# Rules that JSON Schema cannot say: a request that breaks one is valid by the description, and refused.
BEYOND_SCHEMA: Final = (
    "a channel's name is at most 255 bytes long in UTF-8",
    f"a name of digits only is an integer channel, between 1 and {MAX_ID}",
)


def strict_document() -> dict[str, Any]:
    """The description with its answers closed: members it does not name are mistakes, here and now."""
    document = copy.deepcopy(DOCUMENT)
    for name in ("Message", "Answer", "Receipt", "Refusal", "ChannelInfo", "Page", "Problem"):
        document["components"]["schemas"][name]["additionalProperties"] = False
    return document


api = schemathesis.openapi.from_dict(
    strict_document(),
    config=schemathesis.Config.from_dict(
        {
            "seed": 1,
            "generation": {"deterministic": True, "allow-extra-parameters": False},
            "checks": {
                # 422: keys like "0" come again and again, with other publications.
                "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409", "422"]},
                "negative_data_rejection": {"expected-statuses": ["400", "404", "413"]},
            },
        }
    ),
)


SCHEMAS: Final[dict[str, Any]] = DOCUMENT["components"]["schemas"]


STREAMS: Final = ("/events", "/stream", "/ws")
"""Answers to right requests that never end by themselves."""


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method in item.keys() & {"get", "put", "post", "delete", "options", "head", "patch", "trace"}:
            yield path, method, item[method]


def media_types(node: Any) -> Iterator[dict[str, Any]]:
    """Everything in the description that has a schema, and maybe examples."""
    if isinstance(node, dict):
        if "schema" in node:
            yield node
        for member in node.values():
            yield from media_types(member)
    elif isinstance(node, list):
        for item in node:
            yield from media_types(item)


def examples(media_type: dict[str, Any]) -> list[Any]:
    named = [example["value"] for example in media_type.get("examples", {}).values()]
    return [media_type["example"], *named] if "example" in media_type else named


def validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_the_description_is_openapi() -> None:
    """It is valid by the OpenAPI 3.1 metaschema, and each of its schemas by that of JSON Schema 2020-12."""
    api.validate()

    assert DOCUMENT["openapi"] == "3.1.0"
    for schema in (*SCHEMAS.values(), *(media_type["schema"] for media_type in media_types(DOCUMENT))):
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_the_version_is_the_packages() -> None:
    """Who reads the description knows which release it describes."""
    assert DOCUMENT["info"]["version"] == __version__


SHARED = {"/openapi.json", "/pushup.js"}
"""The paths that are the same for all realms."""


async def test_the_paths_are_the_servers() -> None:
    """Every route of the server is described, and nothing else. HEAD comes with GET and goes without saying."""
    metrics = Metrics()
    realm = Realm(Node(MemoryBroker(), Settings(), metrics), None)
    app = make_app(Service(Settings(), metrics, {"default": realm}))

    routes = {
        (route.resource.canonical, route.method.lower())
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }

    described = {(path, method) for path, method, _ in operations()}
    prefix = "/realms/{realm}"
    assert {server["url"] for server in DOCUMENT["servers"]} == {"/", prefix}
    assert routes == described | {(prefix + path, method) for path, method in described if path not in SHARED}


def test_every_operation_is_explained() -> None:
    """Each has a name of its own, a summary, a tag that is listed, and says what its answers are."""
    described = [operation for _, _, operation in operations()]

    assert len({operation["operationId"] for operation in described}) == len(described)
    assert all(operation["summary"] for operation in described)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    assert {tag for operation in described for tag in operation["tags"]} == tags


def test_nothing_is_left_over() -> None:
    """Every component is used."""
    text = json.dumps(DOCUMENT)
    ways_in = {name for _, _, operation in operations() for way in operation["security"] for name in way}

    for kind, components in DOCUMENT["components"].items():
        for name in components:
            used = name in ways_in if kind == "securitySchemes" else f'"#/components/{kind}/{name}"' in text
            assert used, name


def test_what_is_required_is_described() -> None:
    """No member is required that the schema says nothing about."""
    for name, schema in SCHEMAS.items():
        assert set(schema.get("required", ())) <= set(schema.get("properties", ())), name


def test_every_example_is_valid() -> None:
    """Examples of requests and answers are what their schemas say; every body has one."""
    checked = 0
    for media_type in media_types(DOCUMENT):
        for example in examples(media_type):
            validator(media_type["schema"]).validate(example)
            checked += 1
    for schema in SCHEMAS.values():
        for example in schema.get("examples", ()):
            validator(schema).validate(example)
            checked += 1

    assert checked > 30


def test_errors_are_those_of_the_code() -> None:
    """The codes are those of the exceptions, each with its status; every error is a problem document."""
    errors = {PushUpError}
    for _ in range(5):
        errors |= {child for error in errors for child in error.__subclasses__()}
    errors.remove(SettingsError)
    responses = DOCUMENT["components"]["responses"]
    problems = [
        response["content"]["application/problem+json"]["schema"]["properties"]
        for response in responses.values()
        if "application/problem+json" in response["content"]
    ]
    described = {
        (code, problem["status"]["const"])
        for problem in problems
        for code in problem["code"].get("enum", [problem["code"].get("const")])
    }

    assert set(SCHEMAS["Problem"]["properties"]["code"]["enum"]) == {error.code for error in errors}
    assert described == {
        (error.code, error.status) for error in errors if error.status != 405 and error is not NotFound
    }
    for _, _, operation in operations():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                name = response["$ref"].rpartition("/")[2]
                schema = responses[name]["content"]["application/problem+json"]["schema"]
                assert schema["properties"]["status"]["const"] == int(status)


def test_limits_are_the_defaults() -> None:
    """The numbers in the description are those of the settings and of the code."""
    default = Settings()
    publication, new = SCHEMAS["Publication"]["properties"], SCHEMAS["NewChannel"]["properties"]

    assert SCHEMAS["Channels"]["maxItems"] == default.poll_channels_max == default.publish_channels_max
    assert SCHEMAS["Publications"]["maxItems"] == default.publish_batch_max
    assert SCHEMAS["Timeout"]["default"] == default.poll_timeout
    assert SCHEMAS["Timeout"]["maximum"] == new["ttl"]["maximum"] == new["window"]["maximum"] == SECONDS_MAX
    assert SCHEMAS["Id"]["maximum"] == SCHEMAS["IntegerChannel"]["maximum"] == new["max_messages"]["maximum"] == MAX_ID
    assert SCHEMAS["ChannelName"]["maxLength"] == SCHEMAS["ChannelText"]["maxLength"] == MAX_NAME_BYTES
    assert new["ttl"]["default"] == default.channel_ttl
    assert new["window"]["default"] == default.channel_window
    assert new["max_messages"]["default"] == default.channel_max_messages
    assert publication["key"]["maxLength"] == KEY_LENGTH_MAX
    assert f"{default.message_bytes_max} bytes" in publication["data"]["description"]
    assert f"more than {NESTING_MAX} levels" in publication["data"]["description"]
    assert default.answer_bytes_max == 1024 * 1024
    assert "1 MiB" in SCHEMAS["Answer"]["properties"]["messages"]["description"]
    poll = DOCUMENT["paths"]["/poll"]["get"]["parameters"]
    assert f"More than {default.poll_timeout_max:g} is cut" in poll[3]["description"]
    assert f"by up to {default.poll_jitter:.0%}".replace("%", " %") in poll[3]["description"]
    for stream in STREAMS:
        said = DOCUMENT["paths"][stream]["get"]["description"]
        assert f"every {default.heartbeat:g} seconds" in said
        assert f"cut off after {default.write_timeout:g} seconds" in said
    publish = DOCUMENT["paths"]["/publish"]["post"]["description"]
    assert f"within {default.idempotency_window:g} seconds" in publish


async def test_the_description_is_served() -> None:
    """`GET /openapi.json` is the file, byte for byte."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/openapi.json")

        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.body == files("pushup").joinpath("openapi.json").read_bytes()


async def test_every_request_example_works() -> None:
    """Sent as they are, the examples are answered with success."""
    async with running(poll_timeout_max=0.01, poll_timeout=0.01) as server, connected(server) as client:
        await client.publish("news")
        statuses = []
        for path, method, operation in sorted(operations(), key=lambda found: found[1] == "delete"):
            target = path.replace("{channel}", "news")
            if path == "/ws":
                continue  # Only a handshake is right there.
            # A stream has no end; its answer to HEAD has.
            method = "head" if path in STREAMS else method
            query = {
                parameter["name"]: examples(parameter)[0]
                for parameter in operation.get("parameters", ())
                if parameter["in"] == "query"
            }
            if method in ("get", "head") and query:
                target += f"?{urlencode(query, doseq=True)}"
            bodies = operation.get("requestBody", {"content": {"application/json": {}}})["content"]["application/json"]
            for body in examples(bodies) or [None]:
                reply = await client.request(method.upper(), target, body)
                statuses.append((method, target, body, reply.status))

        assert len(statuses) > 15
        assert [status for status in statuses if not 200 <= status[-1] < 300] == []


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    """A server whose polls end fast."""
    with serving(PUSHUP_POLL_TIMEOUT_MAX="0.1", PUSHUP_POLL_TIMEOUT="0.05") as process:
        yield process
        assert process.end(signal.SIGTERM) == (0, "")


def mend(case: schemathesis.Case[Any]) -> None:
    """Make a request that the description allows keep the rules which JSON Schema cannot say."""
    if case.meta is None or case.meta.generation.mode is not schemathesis.GenerationMode.POSITIVE:
        return
    if isinstance(case.body, list) or (isinstance(case.body, dict) and "key" in case.body):
        case.headers.pop("Idempotency-Key", None)
    for poll in (case.query, case.body):
        if isinstance(poll, dict):
            start, end = str(poll.get("start")), str(poll.get("end"))
            if start.isdigit() and end.isdigit() and int(start) > int(end):
                poll["start"], poll["end"] = poll["end"], poll["start"]


def excuse(case: schemathesis.Case[Any], response: schemathesis.Response) -> list[CheckFunction]:
    """The checks that say nothing about this request."""
    if isinstance(case.body, list):
        # A wrong item of an array is answered in its place, with 200 for the whole.
        return [negative_data_rejection]
    if response.status_code == 400:
        problem = json.loads(response.content)
        sent = {**case.query, **(case.body if isinstance(case.body, dict) else {})}
        if problem["detail"] in BEYOND_SCHEMA or has_float(sent.get(problem.get("parameter"))):
            return [positive_data_acceptance]
    return []


def has_float(value: Any) -> bool:
    """Whether a number has a fraction: 5.0 is an integer to JSON Schema, and has lost digits to the server."""
    return isinstance(value, float) or (isinstance(value, list) and any(has_float(item) for item in value))


@api.exclude(path_regex=f"^({'|'.join(STREAMS)})$").parametrize()
@settings(derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_server_does_what_the_description_says(case: schemathesis.Case[Any], process: Process) -> None:
    """Requests made from the description, right and wrong ones, are answered as it says."""
    mend(case)

    response = case.call(base_url=f"http://{process.address}")

    case.validate_response(response, excluded_checks=excuse(case, response))


def corpus() -> list[dict[str, Any]]:
    """Requests worth keeping, right and wrong ones, each with its status; in an order in which they make sense."""
    found = json.loads((Path(__file__).parent / "fuzz" / "corpus" / "openapi.json").read_bytes())
    assert isinstance(found, list)
    return found


def test_the_corpus_is_answered_as_the_description_says() -> None:
    """With the status that is kept with each request, which is documented, in a form that is documented."""
    with serving(PUSHUP_POLL_TIMEOUT_MAX="0.1", PUSHUP_POLL_TIMEOUT="0.05") as process:
        wrong = []
        for kept in corpus():
            path = {"channel": kept["channel"]} if "channel" in kept else {}
            body = {"body": kept["body"], "media_type": "application/json"} if "body" in kept else {}
            case = api[kept["path"]][kept["method"]].Case(path_parameters=path, query=kept.get("query", {}), **body)
            response = case.call(base_url=f"http://{process.address}")
            # Which of them are wrong the corpus knows better than a schema.
            case.validate_response(response, excluded_checks=[negative_data_rejection, positive_data_acceptance])
            if response.status_code != kept["status"]:
                wrong.append((kept, response.status_code))

        assert wrong == []
        assert process.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("path", ["/events", "/stream"])
async def test_streams_refuse_what_polls_refuse(path: str) -> None:
    """With the same status and code, which are documented; what a poll may ask for begins a stream."""
    taken = refused = 0
    documented = DOCUMENT["paths"][path]["get"]["responses"]
    async with running(poll_timeout_max=0.01, poll_timeout=0.01) as server:
        for kept in corpus():
            if kept["path"] != "/poll" or kept["method"].lower() != "get":
                continue
            asked = {name: value for name, value in kept.get("query", {}).items() if name not in ("end", "timeout")}
            query = urlencode(asked, doseq=True)
            async with connected(server) as client:
                poll = await client.get(f"/poll?{query}")
                if poll.status == 200:
                    assert (await client.request("HEAD", f"{path}?{query}")).status == 200
                    taken += 1
                else:
                    reply = await client.get(f"{path}?{query}")
                    assert (reply.status, reply.json) == (poll.status, poll.json)
                    assert str(reply.status) in documented
                    refused += 1
    assert taken > 1
    assert refused > 3


WITH_INPUT: Final = {
    result.ok().label: result.ok()
    for result in api.exclude(path_regex=f"^({'|'.join(STREAMS)})$").get_all_operations()
    if isinstance(result, Ok) and (result.ok().query or result.ok().body)
}
WRONG_REQUESTS: Final = 40


@pytest.mark.parametrize("label", WITH_INPUT)
def test_wrong_requests_are_refused(label: str, process: Process) -> None:
    """Wrong types, missing and unknown members: a documented refusal, and never a fault of the server's."""
    statuses: Counter[int] = Counter()

    @settings(
        derandomize=True,
        max_examples=WRONG_REQUESTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=WITH_INPUT[label].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def ask(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=f"http://{process.address}")

        case.validate_response(response, excluded_checks=excuse(case, response))
        statuses[response.status_code] += 1

    ask()

    assert max(statuses) < 500
    assert statuses[400] >= WRONG_REQUESTS // 4, statuses


def test_a_channels_life(process: Process) -> None:
    """Along the description's links: what was created can be described, renewed and closed, and then is gone."""
    seen: set[tuple[str, int]] = set()
    machine = api.include(path_regex="^/channels").as_state_machine()

    class Life(machine):  # type: ignore[misc, valid-type]
        def setup(self) -> None:
            # Each run begins with nothing, or Hypothesis could not repeat one.
            _, page = process.get("/channels?limit=1000")
            for info in page["channels"]:
                process.delete(f"/channels/{quote(str(info['channel']), safe='')}")

        def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
            if isinstance(case.body, dict) and isinstance(ttl := case.body.get("ttl"), float) and 0 < ttl < 60:
                case.body["ttl"] = 60.0  # Or the channel may or may not be gone the next moment.
            return {"base_url": f"http://{process.address}"}

        def after_call(self, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
            super().after_call(response, case)
            seen.add((case.operation.definition.raw["operationId"], response.status_code))

        def validate_response(self, response: schemathesis.Response, case: schemathesis.Case[Any], **_: Any) -> None:
            case.validate_response(response, excluded_checks=excuse(case, response), recorder=self.recorder)

    Life.run(
        settings=settings(
            derandomize=True,
            max_examples=30,
            stateful_step_count=6,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
    )

    assert seen >= {
        ("createChannel", 201),
        ("describeChannel", 200),
        ("renewChannel", 200),
        ("closeChannel", 204),
        ("closeChannel", 404),
    }
