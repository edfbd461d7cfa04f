"""The sign of life of a process: its own row in a table of the ledger, with the time at which it was last seen."""

import os
import socket
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Table, delete, insert, update

from herald.ledger import Ledger

GONE = timedelta(days=1)
"""Processes that were not seen for so long are forgotten as soon as another one begins."""


class SignOfLife:
    """This process's row in `table`, whose key is host and process, and which has a column `seen_at`."""

    def __init__(self, ledger: Ledger, table: Table) -> None:
        self._ledger = ledger
        self._table = table
        (self._key,) = table.primary_key.columns
        self._process = f"{socket.gethostname()[:50]}:{os.getpid()}"
        self._begun = False

    def write(self, seen_at: datetime, **values: Any) -> None:
        """Write the row with other `values` of it; raises LedgerError."""
        if not self._begun:
            self._ledger.create_tables()
        row = {"seen_at": seen_at, **values}
        with self._ledger.begin() as connection:
            if not self._begun:
                connection.execute(delete(self._table).where(self._table.c.seen_at < seen_at - GONE))
            ours = update(self._table).where(self._key == self._process)
            if not connection.execute(ours.values(row)).rowcount:
                connection.execute(insert(self._table).values({self._key.name: self._process, **row}))
        self._begun = True
