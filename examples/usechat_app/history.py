"""The messages of all chats, in SQLite: who owns a chat, and its messages in order, in the AI SDK's form."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

SCHEMA = """
    PRAGMA journal_mode = WAL;
    CREATE TABLE IF NOT EXISTS chats (id TEXT PRIMARY KEY, user TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS messages (
        chat TEXT NOT NULL, id TEXT NOT NULL, message TEXT NOT NULL, PRIMARY KEY (chat, id)
    );
"""

Message = dict[str, Any]


class History:
    """Each call opens the file, so that threads and processes can share it."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        with closing(self._connect()) as connection:
            connection.executescript(SCHEMA)

    def claim(self, chat: str, user: str) -> bool:
        """Whether the chat belongs to the user. A new chat does from now on."""
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT OR IGNORE INTO chats VALUES (?, ?)", (chat, user))
        return self.owner(chat) == user

    def owner(self, chat: str) -> str | None:
        with closing(self._connect()) as connection:
            row = connection.execute("SELECT user FROM chats WHERE id = ?", (chat,)).fetchone()
        return row and str(row[0])

    def save(self, chat: str, message: Message) -> None:
        """Append a message, or replace the one with its id."""
        values = {"chat": chat, "id": message["id"], "message": json.dumps(message)}
        with closing(self._connect()) as connection, connection:
            connection.execute(
                "INSERT INTO messages VALUES (:chat, :id, :message) ON CONFLICT DO UPDATE SET message = :message",
                values,
            )

    def ask(self, chat: str, question: Message, answer_id: str) -> None:
        """Append a question and a place for its answer. If it is asked again, drop what follows it."""
        self.save(chat, question)
        with closing(self._connect()) as connection, connection:
            place = "(SELECT rowid FROM messages WHERE chat = :chat AND id = :question)"
            values = {"chat": chat, "question": question["id"], "answer": answer_id}
            connection.execute(f"DELETE FROM messages WHERE chat = :chat AND id != :answer AND rowid > {place}", values)
            connection.execute("INSERT OR IGNORE INTO messages VALUES (:chat, :answer, '')", values)

    def messages(self, chat: str, before: str | None = None) -> list[Message]:
        """The messages of a chat, or those before one of them, without answers that are not stored yet."""
        query = "SELECT id, message FROM messages WHERE chat = ? ORDER BY rowid"
        with closing(self._connect()) as connection:
            rows = connection.execute(query, (chat,)).fetchall()
        return [json.loads(message) for _, message in takewhile(lambda row: row[0] != before, rows) if message]

    def chats(self, user: str) -> list[str]:
        """The chats of a user that have messages, the newest first."""
        query = "SELECT id FROM chats WHERE user = ? AND id IN (SELECT chat FROM messages) ORDER BY rowid DESC"
        with closing(self._connect()) as connection:
            return [str(row[0]) for row in connection.execute(query, (user,))]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30)
