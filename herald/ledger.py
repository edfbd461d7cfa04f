"""The ledger: the relational record of everything, on SQLite or PostgreSQL.

Each table has one writer: the receiver owns `instances`, `rejections`, `series`, `removals` and `commitments`; the
router owns `vitals`; the notifier owns `pages`, `deliveries`, `watches` and `alarms`; the web UI owns `results`,
`reviews`, `labels`, `adjudications`, `validation`, `users` and `audit`. Reading is free. Times are UTC.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.types import TypeDecorator

from herald.config import LedgerConfig
from herald.errors import ConfigError, LedgerError
from herald.wal import use_wal


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time in every database; SQLite would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times, store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot go into the ledger")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData()

_uid = String(64)

# --- receiver --------------------------------------------------------------------------------------------------------

instances = Table(
    "instances",
    metadata,
    Column("path", String(512), primary_key=True, comment="relative to store.root"),
    Column("sop_instance_uid", _uid, nullable=False, index=True),
    Column("series_instance_uid", _uid, nullable=False, index=True),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("sop_class_uid", _uid, nullable=False),
    Column("transfer_syntax_uid", _uid, nullable=False),
    Column("sha256", String(64), nullable=False, comment="of the whole file"),
    Column("size_bytes", BigInteger, nullable=False),
    Column("conflict", Boolean, nullable=False, default=False, comment="same UID came before with other bytes"),
    Column("copies", Integer, nullable=False, default=1, comment="how often these bytes were sent"),
    Column("calling_ae_title", String(16), nullable=False),
    Column("calling_address", String(64), nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    Column("removed_at", UtcDateTime, comment="when retention removed the file; null while it is in the store"),
)

rejections = Table(
    "rejections",
    metadata,
    Column("rejection_id", Integer, primary_key=True, autoincrement=True),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("calling_address", String(64), nullable=False),
    Column("sop_instance_uid", _uid, nullable=False, index=True),
    Column("status", Integer, nullable=False, comment="C-STORE status that was returned (PS3.4 B.2.3)"),
    Column("error", Text, nullable=False),
)

series = Table(
    "series",
    metadata,
    Column("series_instance_uid", _uid, primary_key=True),
    Column("revision", Integer, primary_key=True, comment="1, and one more whenever late images reopened it"),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("accession_number", String(16), nullable=False, default="", index=True),
    Column("modality", String(16), nullable=False, default=""),
    Column("scanner", String(64), nullable=False, default=""),
    Column("calling_ae_title", String(16), nullable=False, default=""),
    Column("instance_count", Integer, nullable=False, default=0),
    Column("first_image_at", UtcDateTime, nullable=False),
    Column("last_image_at", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime, comment="null while open"),
    Column("close_reason", String(64)),
    Column("published_at", UtcDateTime, comment="when SeriesReceived was on the bus"),
    Column("settle_s", Float, comment="rest that its sender was given when it closed"),
    Column("largest_gap_s", Float, comment="longest pause between two associations that sent it"),
    Column("awaited", JSON, comment="SOP Instance UIDs that were known to be missing while it was open"),
    Column("missing", JSON, comment="what was known to be missing when it closed, in words"),
)

removals = Table(
    "removals",
    metadata,
    Column("removal_id", Integer, primary_key=True, autoincrement=True),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("removed_at", UtcDateTime, nullable=False),
    Column("reason", String(16), nullable=False, comment="age or disk"),
    Column("instance_count", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)

commitments = Table(
    "commitments",
    metadata,
    Column("commitment_id", Integer, primary_key=True, autoincrement=True),
    Column("transaction_uid", _uid, nullable=False, index=True),
    Column("calling_ae_title", String(16), nullable=False),
    Column("calling_address", String(64), nullable=False),
    Column("requested_at", UtcDateTime, nullable=False),
    Column("references", JSON, nullable=False, comment="[[SOP class UID, SOP instance UID], ...] that were asked for"),
    Column("failures", JSON, comment="[[SOP class UID, SOP instance UID, failure reason], ...]; null until decided"),
    Column("reported_at", UtcDateTime, comment="when the sender took the report"),
    Column("attempts", Integer, nullable=False, default=0),
    Column("error", Text, comment="why the last attempt failed"),
)

# --- router ----------------------------------------------------------------------------------------------------------

vitals = Table(
    "vitals",
    metadata,
    Column("router", String(64), primary_key=True, comment="host and process of a router"),
    Column("started_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False, comment="when it last wrote here"),
    Column("models_answered_at", UtcDateTime, comment="when the model server last answered it"),
    Column("error", Text, comment="why the model server did not answer last"),
)

# --- notifier --------------------------------------------------------------------------------------------------------

pages = Table(
    "pages",
    metadata,
    Column("page_id", String(36), primary_key=True, comment="uuid5 of study and step: one page per study and step"),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("series_instance_uid", _uid, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("step", Integer, nullable=False, comment="0-based step of the paging policy"),
    Column(
        "state", String(16), nullable=False, comment="due, sent, acknowledged, escalated, exhausted, withdrawn, failed"
    ),
    Column("mode", String(8), nullable=False, comment="shadow or live when the page was made"),
    Column("channel", String(16), nullable=False),
    Column("recipient", String(256), nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("finding_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime, nullable=False, index=True),
    Column("sent_at", UtcDateTime),
    Column("acknowledged_at", UtcDateTime),
    Column("acknowledged_by", String(64)),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", UtcDateTime),
    Column("error", Text),
    Column("policy", String(64), comment="name of the policy whose steps are taken; empty or null: notifier.steps"),
    Column("site", String(64), comment="name of the site of the scanner; empty or null: of none"),
    Column("event", JSON, comment="the SeriesTriaged that is paged"),
    Column("made_at", UtcDateTime, comment="when the study's first page was made; null: by an earlier version"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_id", Integer, primary_key=True, autoincrement=True),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("series_instance_uid", _uid, nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("page_id", String(36), comment="null for a result posted to the web UI"),
    Column("channel", String(16), nullable=False),
    Column("recipient", String(256), nullable=False),
    Column(
        "outcome",
        String(16),
        nullable=False,
        comment="sent, shadow, unavailable, refused or covered",
    ),
    Column("error", Text),
    Column("duration_s", Float),
)

watches = Table(
    "watches",
    metadata,
    Column("notifier", String(64), primary_key=True, comment="host and process of a notifier"),
    Column("seen_at", UtcDateTime, nullable=False, comment="when its watch last wrote here"),
)

alarms = Table(
    "alarms",
    metadata,
    Column("alarm_id", String(36), primary_key=True),
    Column("kind", String(16), nullable=False, comment="silence, models, undelivered or heartbeat"),
    Column("about", String(64), nullable=False, default="", comment="study of an undelivered page"),
    Column("detail", Text, nullable=False),
    Column("mode", String(8), nullable=False, comment="shadow or live when it was raised"),
    Column("raised_at", UtcDateTime, nullable=False, index=True),
    Column("cleared_at", UtcDateTime, comment="when its cause was gone; null while it holds"),
    Column("sent_at", UtcDateTime, comment="when the first operator was reached"),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", UtcDateTime, comment="null when nothing is left to be sent"),
    Column("error", Text, comment="whom it did not reach, and why"),
)

# --- web UI ----------------------------------------------------------------------------------------------------------

results = Table(
    "results",
    metadata,
    Column("series_instance_uid", _uid, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("accession_number", String(16), nullable=False, default="", index=True),
    Column("scanner", String(64), nullable=False, default=""),
    Column("disposition", String(16), nullable=False),
    Column("probability", Float, comment="of any haemorrhage; null when detection did not run"),
    Column("uncertain", Boolean, nullable=False, default=False),
    Column("event", JSON, nullable=False, comment="SeriesTriaged as it was posted"),
    Column("triaged_at", UtcDateTime, nullable=False, index=True),
    Column("posted_at", UtcDateTime, nullable=False),
    Column("acknowledged_at", UtcDateTime, comment="first acknowledgement or verdict of a reader"),
    Column("acknowledged_by", String(64)),
    Column("superseded", Boolean, comment="whether a later revision is listed in its place; null: not known"),
    Column("leading_finding", String(16), comment="most probable kind of bleed of a positive"),
    Column("disagreement", Boolean, comment="whether header and pixels differ about a head; null: not known"),
    Column("blind", String(8), comment="why readers judge before they see it: shadow, chosen; empty: they see it"),
)

reviews = Table(
    "reviews",
    metadata,
    Column("review_id", String(36), primary_key=True),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("series_instance_uid", _uid, nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("action", String(16), nullable=False, comment="acknowledge, agree, disagree or unsure"),
    Column("finding_kind", String(16), comment="what the reader saw, by herald.signatures.FINDINGS"),
    Column("note", Text),
    Column("reader", String(64), nullable=False),
    Column("prediction_shown", Boolean, nullable=False, comment="whether the reader saw the prediction first"),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("published_at", UtcDateTime, comment="when SeriesReviewed was on the bus"),
    Column("opened_at", UtcDateTime, comment="when this reader first opened the series"),
    Column(
        "undone_at", UtcDateTime, comment="when it was taken back, or its result changed; it counts no more, and stays"
    ),
)

labels = Table(
    "labels",
    metadata,
    Column("label_id", Integer, primary_key=True, autoincrement=True),
    Column("accession_number", String(16), nullable=False, index=True),
    Column("haemorrhage", Boolean, nullable=False),
    Column("source", String(64), nullable=False),
    Column("imported_at", UtcDateTime, nullable=False),
    Column("kind", String(16), comment="label: somebody's answer; report: by rule from a report's text"),
    Column("detail", Text, comment="of a rule: which words decided; never the text itself"),
    Column("superseded_at", UtcDateTime, comment="when the same source said something else; it stays"),
)

adjudications = Table(
    "adjudications",
    metadata,
    Column("adjudication_id", Integer, primary_key=True, autoincrement=True),
    Column("study_instance_uid", _uid, nullable=False, index=True),
    Column("haemorrhage", Boolean, nullable=False),
    Column("finding_kind", String(16), comment="by herald.signatures.FINDINGS"),
    Column("note", Text),
    Column("reader", String(64), nullable=False),
    Column("occurred_at", UtcDateTime, nullable=False),
)

validation = Table(
    "validation",
    metadata,
    Column("entry", Integer, primary_key=True, autoincrement=False, comment="1, 2, 3, ... without a gap"),
    Column("series_instance_uid", _uid, nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("written_at", UtcDateTime, nullable=False, index=True),
    Column("row", Text, nullable=False, comment="canonical JSON of a ValidationRow"),
    Column("previous_sha256", String(64), nullable=False, comment="of the entry before"),
    Column("sha256", String(64), nullable=False, comment="of entry, written_at, row and previous_sha256"),
)

users = Table(
    "users",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("password_hash", String(256), nullable=False),
    Column("role", String(16), nullable=False, comment="reader, researcher or admin"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("subject", String(256), comment="issuer and subject of who logs in by OpenID Connect"),
)

audit = Table(
    "audit",
    metadata,
    Column("audit_id", Integer, primary_key=True, autoincrement=True),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("user", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("study_instance_uid", _uid),
    Column("series_instance_uid", _uid),
)

Index("ix_pages_open", pages.c.state, pages.c.due_at)
Index("ix_users_subject", users.c.subject, unique=True)  # two log-ins at once make one user; null is no subject
# all that the worklist filters, counts and sorts by: thousands of rows are gone through without reading their events
Index(
    "ix_results_worklist",
    results.c.disposition,
    results.c.acknowledged_at,
    results.c.superseded,
    results.c.triaged_at,
    results.c.posted_at,
    results.c.scanner,
    results.c.leading_finding,
    results.c.disagreement,
    results.c.probability,
    results.c.blind,
    results.c.accession_number,
    results.c.study_instance_uid,
    results.c.series_instance_uid,
    results.c.revision,
)
# log-ins ask how many failed lately
Index("ix_audit_lately", audit.c.action, audit.c.occurred_at)
Index("ix_audit_series", audit.c.series_instance_uid, audit.c.action)


# a defence against mistakes: that nothing was changed is proved by the hashes (herald.validation.chain)
_APPEND_ONLY = {
    "sqlite": tuple(
        f"create trigger if not exists validation_no_{verb} before {verb} on validation "
        "begin select raise(abort, 'the validation record is append-only'); end"
        for verb in ("update", "delete")
    ),
    "postgresql": (
        "create or replace function validation_append_only() returns trigger language plpgsql as "
        "$$ begin raise exception 'the validation record is append-only'; end $$",
        "drop trigger if exists validation_append_only on validation",
        "create trigger validation_append_only before update or delete or truncate on validation "
        "for each statement execute function validation_append_only()",
    ),
}

BUSY_S = 30.0
_CREATION_LOCK = 0x4865726C  # any number that nobody else locks in this database


class Ledger:
    """One database; `begin` is a transaction, `read` a connection for reading. Both raise LedgerError."""

    def __init__(self, config: LedgerConfig) -> None:
        self.engine: Engine = _engine(config.url)
        self.url = self.engine.url.render_as_string(hide_password=True)

    def create_tables(self) -> None:
        """Create the tables, columns and indexes that are missing; several services may do so at once."""
        with self.read() as connection:
            if _is_complete(connection):  # as nearly always, and then no lock has to be waited for
                return
        with self.begin() as connection:
            if connection.dialect.name == "postgresql":  # where IF NOT EXISTS alone can collide with another service
                connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _CREATION_LOCK})
            else:  # the driver begins no transaction for DDL, and looking and adding a column must be one
                connection.exec_driver_sql("begin immediate")
            for table in metadata.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                _add_missing_columns(connection, table)
                for index in table.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))
            for statement in _APPEND_ONLY.get(connection.dialect.name, ()):
                connection.exec_driver_sql(statement)

    @contextmanager
    def begin(self, on: Connection | None = None) -> Iterator[Connection]:
        """A transaction: committed at the end, rolled back on any error; on a new connection unless one is given."""
        with self._translated():
            if on is None:
                with self.engine.begin() as connection:
                    yield connection
            else:
                with on.begin():
                    yield on

    def connect(self) -> Connection:
        """A connection to keep and to close, for who writes so often that opening one each time would cost."""
        with self._translated():
            return self.engine.connect()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading."""
        with self._translated(), self.engine.connect() as connection:
            yield connection

    def check(self) -> None:
        """Raise LedgerError when the database does not answer."""
        with self.read() as connection:
            connection.execute(text("select 1"))

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise LedgerError(
                f"the ledger {self.url} refuses: {type(cause).__name__}: {cause}; "
                "check ledger.url and that the database runs"
            ) from error


def _is_complete(connection: Connection) -> bool:
    inspector = inspect(connection)
    columns, indexes = inspector.get_multi_columns(), inspector.get_multi_indexes()
    return all(
        {column.name for column in table.columns} <= {column["name"] for column in columns.get((None, table.name), ())}
        and {index.name for index in table.indexes} <= {index["name"] for index in indexes.get((None, table.name), ())}
        for table in metadata.sorted_tables
    )


def _add_missing_columns(connection: Connection, table: Table) -> None:
    """Give a table of an earlier version the columns that came since, which may be null."""
    there = {column["name"] for column in inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in there:
            quoted = connection.dialect.identifier_preparer.format_column(column)
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"alter table {table.name} add column {quoted} {kind}"))


def open_ledger(config: LedgerConfig) -> Ledger:
    """Open the ledger and create missing tables; raises LedgerError when it cannot be reached."""
    ledger = Ledger(config)
    ledger.create_tables()
    return ledger


def _engine(url: str) -> Engine:
    try:
        if not url.startswith("sqlite"):
            return create_engine(url, pool_pre_ping=True)
        # one connection per use: SQLite connections are cheap, and a pool would keep files of a removed ledger open
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_S})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"ledger.url cannot be used: {error}; use sqlite:///FILE or postgresql+psycopg://…"
        ) from error

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _record: object) -> None:
        use_wal(connection, BUSY_S)
        connection.execute("pragma synchronous = full")

    return engine
