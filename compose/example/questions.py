"""The application's own database: questions, and which of them PushUp has acknowledged."""

import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

_SCHEMA: Final = """\
CREATE TABLE IF NOT EXISTS questions (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    author TEXT NOT NULL,
    question TEXT NOT NULL,
    tags TEXT NOT NULL,
    asked INTEGER NOT NULL,
    message INTEGER
);
CREATE TABLE IF NOT EXISTS channels (
    channel TEXT NOT NULL,
    number INTEGER NOT NULL REFERENCES questions,
    PRIMARY KEY (channel, number)
) WITHOUT ROWID;
"""

_NEWEST: Final = """\
SELECT * FROM questions WHERE number IN (SELECT number FROM channels WHERE channel IN ({}))
ORDER BY coalesce(message, asked) DESC, number DESC LIMIT ?
"""


@dataclass(frozen=True)
class Question:
    """What somebody asks."""

    author: str
    question: str
    tags: tuple[str, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        """Where it is published: whoever follows the author or one of the tags gets it."""
        return (f"author:{self.author}", *(f"tag:{tag}" for tag in self.tags))


@dataclass(frozen=True)
class Stored:
    """A question in the database. `asked` is in microseconds since the Unix epoch, as ids of messages are.

    `message` is the id under which it was published; None until PushUp has acknowledged it.
    """

    number: int
    question: Question
    asked: int
    message: int | None

    @property
    def data(self) -> dict[str, Any]:
        """What is published. The number tells a page that it has this question already."""
        asked = self.question
        return {"number": self.number, "author": asked.author, "question": asked.question, "tags": asked.tags}


class Questions:
    """A database file that many threads may use; an empty name keeps it in memory."""

    def __init__(self, file: str = "") -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(file or ":memory:", check_same_thread=False, timeout=5)
        self._database.row_factory = sqlite3.Row
        self._database.executescript(_SCHEMA)

    def add(self, key: str, question: Question, now: int) -> Stored:
        """Store the question, unless `key` was stored before: then that one is returned, whatever it asks."""
        with self._lock, self._database as database:
            number = database.execute(
                "INSERT INTO questions (key, author, question, tags, asked) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO NOTHING RETURNING number",
                (key, question.author, question.question, json.dumps(question.tags), now),
            ).fetchone()
            if number is not None:
                rows = [(channel, *number) for channel in question.channels]
                database.executemany("INSERT INTO channels VALUES (?, ?)", rows)
            return _stored(database.execute("SELECT * FROM questions WHERE key = ?", (key,)).fetchone())

    def acknowledged(self, number: int, message: int) -> None:
        """PushUp has the question under this id."""
        with self._lock, self._database as database:
            database.execute("UPDATE questions SET message = ? WHERE number = ?", (message, number))

    def newest(self, channels: Sequence[str], limit: int) -> list[Stored]:
        """The newest questions of these channels, oldest first, published or not."""
        query = _NEWEST.format(", ".join("?" * len(channels)))
        with self._lock:
            rows = self._database.execute(query, (*channels, limit)).fetchall()
        return [_stored(row) for row in reversed(rows)]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def _stored(row: sqlite3.Row) -> Stored:
    question = Question(row["author"], row["question"], tuple(json.loads(row["tags"])))
    return Stored(row["number"], question, row["asked"], row["message"])
