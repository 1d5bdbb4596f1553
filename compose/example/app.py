"""The application over HTTP: the page, the questions that are stored, and asking one.

What makes it safe, in the order it happens:

1. A question is stored before it is published, so whatever a page has heard of can also be loaded.
2. Its key comes from the browser and goes on to PushUp. A post that is repeated, because its answer got lost or the
   application died in the middle, finds the question stored, and PushUp does not publish it a second time.
3. The answer is 201 only when PushUp has acknowledged. Until then it is 503, and the browser asks again.
4. A page takes its cursor from PushUp first and loads what is stored second (`listen` in `pushup/demo/board.js`).
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol
from unicodedata import category

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, UnsupportedMediaType

from compose.example.questions import Question, Questions
from pushup.demo import HEADERS, Part, board
from pushup.errors import PROBLEM_TYPE, InvalidParameter, InvalidRequest, KeyReused, PushUpError

PATH: Final = "/questions"

AUTHOR_MAX: Final = 60
"""In characters, so that a channel's name stays within PushUp's 255 bytes."""
TAG_MAX: Final = 60
TAGS_MAX: Final = 20
QUESTION_MAX: Final = 4000
KEY_MAX: Final = 100
BODY_BYTES_MAX: Final = 64 * 1024

CHANNELS_MAX: Final = 100
STORED_MAX: Final = 200


class Publisher(Protocol):
    """What the application needs of `pushup.Publisher`."""

    def publish(self, channels: Sequence[str], data: Any, *, key: str | None = None) -> int:
        """Store a message; its id. Raises PushUpError if that could not be had, or is not known."""


def make_app(questions: Questions, publisher: Publisher) -> Flask:
    """The WSGI application."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX

    for path, part in board(PATH).items():
        app.add_url_rule(path, path.replace(".", "_"), lambda part=part: _file(part))

    @app.get(PATH)
    def stored() -> Response:
        """The newest questions of the channels asked for, in the form of a poll's messages."""
        channels = list(dict.fromkeys(request.args.getlist("channel")))
        if not 0 < len(channels) <= CHANNELS_MAX:
            raise InvalidParameter("channel", f"ask for 1 to {CHANNELS_MAX} channels: {PATH}?channel=tag:python")
        messages = [
            {
                "id": found.message or found.asked,
                "channels": [channel for channel in channels if channel in found.question.channels],
                "data": found.data,
            }
            for found in questions.newest(channels, STORED_MAX)
        ]
        return jsonify(messages=messages)

    @app.post(PATH)
    def ask() -> tuple[Response, int]:
        """Store a question and publish it."""
        # No other site's form can send this type, and a script there would have to ask for leave first.
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("a question is posted as application/json")
        key, question = parse(request.get_data())
        found = questions.add(key, question, time.time_ns() // 1000)
        if found.question != question:
            raise KeyReused(f"the key {key} belongs to another question")
        id = found.message
        if id is None:
            id = publisher.publish(question.channels, found.data, key=key)
            questions.acknowledged(found.number, id)
        return jsonify(number=found.number, id=id, channels=question.channels), 201

    @app.get("/health")
    def health() -> Response:
        """Whether the application can serve pages. Redis has no part in that."""
        questions.newest(["health"], 1)
        return jsonify(status="pass")

    @app.errorhandler(PushUpError)
    def refuse(error: PushUpError) -> Response:
        return Response(error.body(), error.status, error.headers, content_type=PROBLEM_TYPE)

    @app.errorhandler(HTTPException)
    def refuse_http(error: HTTPException) -> Response:
        problem = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
        return Response(json.dumps(problem), error.code, content_type=PROBLEM_TYPE)

    @app.after_request
    def secure(response: Response) -> Response:
        response.headers.extend(HEADERS)
        response.headers["Cache-Control"] = "no-store" if request.path == PATH else "no-cache"
        return response

    return app


def _file(part: Part) -> Response:
    return Response(part.body, content_type=part.content_type)


def parse(body: bytes) -> tuple[str, Question]:
    """A post's key and question. Without a key it gets a new one, and repeating it asks twice.

    Raises InvalidRequest or InvalidParameter with a sentence that names what is wrong.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None
    if not isinstance(given, dict):
        raise InvalidRequest("the body is not a JSON object with author, question and tags")
    for name in given:
        if name not in ("author", "question", "tags", "key"):
            raise InvalidParameter(name, f"{name[:KEY_MAX]} is not a member of a question")
    tags = given.get("tags", [])
    if not isinstance(tags, list) or len(tags) > TAGS_MAX:
        raise InvalidParameter("tags", f"tags must be an array of at most {TAGS_MAX} strings")
    key = _line("key", given["key"], KEY_MAX) if "key" in given else secrets.token_hex(16)
    author = _line("author", _needed(given, "author"), AUTHOR_MAX)
    text = _text("question", _needed(given, "question"), QUESTION_MAX)
    return key, Question(author, text, tuple(dict.fromkeys(_line("tags", tag, TAG_MAX) for tag in tags)))


def _needed(given: Mapping[str, Any], name: str) -> Any:
    if name not in given:
        raise InvalidParameter(name, f"{name} is missing")
    return given[name]


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > most:
        raise InvalidParameter(name, f"{name} must be text of 1 to {most} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InvalidParameter(name, f"{name} must be valid Unicode, without lone surrogates")
    return value


def _line(name: str, value: Any, most: int) -> str:
    text = _text(name, value, most)
    if any(category(letter) == "Cc" for letter in text):
        raise InvalidParameter(name, f"{name} must be one line, without control characters")
    return text
