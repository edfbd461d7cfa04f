"""The switch to write-ahead logging waits for whoever is switching at the same time."""

import sqlite3
import threading
from pathlib import Path

import pytest

from herald.wal import use_wal

CONNECTIONS = 4


def test_many_who_open_a_new_database_at_once_all_come_in(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def enter(file: Path, together: threading.Barrier) -> None:
        connection = sqlite3.connect(file, timeout=10.0, isolation_level=None)
        together.wait()
        try:
            use_wal(connection, 10.0)
        except sqlite3.Error as error:
            errors.append(error)
        connection.close()

    for number in range(100):  # a bare pragma fails in several of these
        together = threading.Barrier(CONNECTIONS)
        threads = [
            threading.Thread(target=enter, args=(tmp_path / f"{number}.sqlite", together)) for _ in range(CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_database_that_stays_locked_is_an_error_after_the_wait(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "held.sqlite", isolation_level=None)
    holder.execute("begin exclusive")
    connection = sqlite3.connect(tmp_path / "held.sqlite", timeout=0.0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        use_wal(connection, 0.1)
    holder.execute("rollback")
    use_wal(connection, 0.1)
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()
    holder.close()


def test_what_is_not_a_database_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database" * 100)
    connection = sqlite3.connect(tmp_path / "text")
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        use_wal(connection, 3600.0)
    connection.close()
