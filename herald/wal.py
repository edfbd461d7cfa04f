"""How the embedded databases, the ledger and the bus on SQLite, come into write-ahead mode."""

import sqlite3
import time

RETRY_S = 0.01


def use_wal(connection: sqlite3.Connection, within_s: float) -> None:
    """Switch the connection's database to write-ahead logging, waiting up to `within_s` seconds for others.

    SQLite does not call the busy handler when two connections of a new file switch at once, or when one opens while
    the last of the others closes and clears the log (sqlite.org/wal.html, section 9), so the wait is here.
    Raises sqlite3.OperationalError when the database is still locked then, or for any other reason at once.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)
        else:
            return
