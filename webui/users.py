"""Readers, researchers and administrators: argon2 password hashes in the ledger, or who a provider says they are."""

import hashlib
import secrets
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import count
from typing import Literal, cast, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from herald.errors import HeraldError, LedgerError
from herald.events import utc_now
from herald.ledger import Ledger, users

Role = Literal["reader", "researcher", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
SHORTEST_PASSWORD = 10  # NIST SP 800-63B asks for 8 at least
LONGEST_NAME = 64
LONGEST_SUBJECT = 256

_hasher = PasswordHasher()


class UserError(HeraldError):
    """Raised when a user cannot be added or removed as asked."""


@dataclass(frozen=True)
class User:
    """Somebody who may log in; the methods are what Flask-Login asks of a user."""

    name: str
    role: Role
    fingerprint: str
    """Of the password hash: a session ends when the password changes."""
    subject: str | None = None
    """Issuer and subject of who logs in by OpenID Connect."""

    is_authenticated = True
    is_active = True
    is_anonymous = False

    def get_id(self) -> str:
        """What the session remembers."""
        return f"{self.fingerprint}:{self.name}"


@dataclass(frozen=True)
class Account:
    """A user as `herald user list` tells it."""

    name: str
    role: str
    log_in: Literal["password", "OpenID Connect"]
    created_at: datetime


def add_user(ledger: Ledger, name: str, password: str, role: str) -> None:
    """Add a user, or set password and role of a known one; raises UserError that says what is wrong."""
    if not _is_name(name):
        raise UserError(f"user name {name!r}: give 1 to {LONGEST_NAME} printable characters without blanks around them")
    if role not in ROLES:
        raise UserError(f"role {role!r} is unknown; use one of {', '.join(ROLES)}")
    if len(password) < SHORTEST_PASSWORD:
        raise UserError(f"the password of {name} is too short; use {SHORTEST_PASSWORD} characters or more")
    values = {"password_hash": _hasher.hash(password), "role": role}
    same = users.c.name == name
    with ledger.begin() as connection:
        if connection.execute(update(users).where(same, users.c.subject.is_(None)).values(values)).rowcount:
            return
        if connection.execute(select(users.c.name).where(same)).first():
            raise UserError(
                f"{name} logs in by OpenID Connect, which gives the role; choose another name, or remove {name} first"
            )
        connection.execute(insert(users).values(**values, name=name, created_at=utc_now()))


def admit(ledger: Ledger, subject: str, wished_name: str, role: Role) -> User:
    """The user of an OpenID Connect subject, with this role; made at the first log-in, under a name nobody else has.

    A name once given stays: reviews and the audit speak of it.
    """
    own = users.c.subject == subject
    for _ in range(3):
        try:
            with ledger.begin() as connection:
                # the update comes first: on SQLite it takes the write lock, so that two log-ins cannot both insert
                if not connection.execute(update(users).where(own).values(role=role)).rowcount:
                    taken = {_confusable(name) for name in connection.scalars(select(users.c.name))}
                    name = next(name for name in _names_like(wished_name) if _confusable(name) not in taken)
                    values = {"name": name, "role": role, "subject": subject, "created_at": utc_now()}
                    connection.execute(insert(users).values(**values, password_hash=_no_password()))
                row = connection.execute(select(users).where(own)).mappings().one()
            return _user(dict(row))
        except LedgerError as error:
            if not isinstance(error.__cause__, IntegrityError):
                raise  # else somebody took the name, or made this very user, at the same moment, on PostgreSQL
    raise UserError(f"no free name for {wished_name!r} was found; try again")


def end_sessions(ledger: Ledger, subject: str) -> str:
    """End every session of an OpenID Connect subject, who may come again; its name, empty when it is not known."""
    own = users.c.subject == subject
    with ledger.begin() as connection:
        connection.execute(update(users).where(own).values(password_hash=_no_password()))
        return connection.execute(select(users.c.name).where(own)).scalar() or ""


def remove_user(ledger: Ledger, name: str) -> None:
    """Remove a user, whose sessions end at once; raises UserError when there is none."""
    with ledger.begin() as connection:
        if not connection.execute(delete(users).where(users.c.name == name)).rowcount:
            raise UserError(f"there is no user {name}; `herald user list` names them")


def list_users(ledger: Ledger) -> list[Account]:
    """Every user, by name."""
    statement = select(users.c.name, users.c.role, users.c.subject, users.c.created_at).order_by(users.c.name)
    with ledger.read() as connection:
        return [
            Account(name, role, "OpenID Connect" if subject else "password", created_at)
            for name, role, subject, created_at in connection.execute(statement)
        ]


def find_user(ledger: Ledger, name: str) -> User | None:
    """The user of that name, or None."""
    row = _read(ledger, name)
    return _user(row) if row else None


def check_password(ledger: Ledger, name: str, password: str) -> User | None:
    """The user when the password is right, else None; both answers take the same time."""
    row = _read(ledger, name)
    known = row if row and not row["subject"] else None
    try:
        _hasher.verify(known["password_hash"] if known else _nobody(), password)
    except (VerificationError, InvalidHashError):
        return None
    return _user(known) if known else None


@cache
def _nobody() -> str:
    """A hash that no password has: checking it makes an unknown name take as long as a known one."""
    return _hasher.hash(secrets.token_hex())


def _no_password() -> str:
    """Stands where a password hash would; another each time, so that sessions end with it."""
    return f"oidc:{secrets.token_hex(16)}"


def _is_name(name: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()


def _names_like(wished: str) -> Iterator[str]:
    """Names that may be given to who wishes this one, best first."""
    printable = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFKC", wished))
    name = " ".join(printable.split())[: LONGEST_NAME - 10].strip() or "user"
    yield name
    yield from (f"{name} ({number})" for number in count(2))


def _confusable(name: str) -> str:
    """The same for names that people would take for one another."""
    return unicodedata.normalize("NFKC", name).casefold()


def _user(row: dict[str, str]) -> User:
    fingerprint = hashlib.sha256(row["password_hash"].encode()).hexdigest()[:16]
    return User(row["name"], cast(Role, row["role"]), fingerprint, row["subject"])


def _read(ledger: Ledger, name: str) -> dict[str, str] | None:
    if not _is_name(name):  # PostgreSQL takes no NUL
        return None
    with ledger.read() as connection:
        row = connection.execute(select(users).where(users.c.name == name)).mappings().first()
    return dict(row) if row else None
