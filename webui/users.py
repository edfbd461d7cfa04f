"""Readers, researchers and administrators: argon2 password hashes in the ledger, no default password."""

import hashlib
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import insert, select, update

from herald.errors import HeraldError
from herald.events import utc_now
from herald.ledger import Ledger, users

Role = Literal["reader", "researcher", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
SHORTEST_PASSWORD = 10  # NIST SP 800-63B asks for 8 at least

_hasher = PasswordHasher()


class UserError(HeraldError):
    """Raised when a user cannot be added as asked."""


@dataclass(frozen=True)
class User:
    """Somebody who may log in; the methods are what Flask-Login asks of a user."""

    name: str
    role: Role
    fingerprint: str
    """Of the password hash: a session ends when the password changes."""

    is_authenticated = True
    is_active = True
    is_anonymous = False

    def get_id(self) -> str:
        """What the session remembers."""
        return f"{self.fingerprint}:{self.name}"


def add_user(ledger: Ledger, name: str, password: str, role: str) -> None:
    """Add a user, or set password and role of a known one; raises UserError that says what is wrong."""
    if not name or len(name) > 64 or not name.isprintable() or name != name.strip():
        raise UserError(f"user name {name!r}: give 1 to 64 printable characters without blanks around them")
    if role not in ROLES:
        raise UserError(f"role {role!r} is unknown; use one of {', '.join(ROLES)}")
    if len(password) < SHORTEST_PASSWORD:
        raise UserError(f"the password of {name} is too short; use {SHORTEST_PASSWORD} characters or more")
    values = {"password_hash": _hasher.hash(password), "role": role}
    with ledger.begin() as connection:
        if not connection.execute(update(users).where(users.c.name == name).values(values)).rowcount:
            connection.execute(insert(users).values(**values, name=name, created_at=utc_now()))


def find_user(ledger: Ledger, name: str) -> User | None:
    """The user of that name, or None."""
    found = _read(ledger, name)
    return found[0] if found else None


def check_password(ledger: Ledger, name: str, password: str) -> User | None:
    """The user when the password is right, else None; both answers take the same time."""
    found = _read(ledger, name)
    try:
        _hasher.verify(found[1] if found else _nobody(), password)
    except (VerificationError, InvalidHashError):
        return None
    return found[0] if found else None


@cache
def _nobody() -> str:
    """A hash that no password has: checking it makes an unknown name take as long as a known one."""
    return _hasher.hash(secrets.token_hex())


def _read(ledger: Ledger, name: str) -> tuple[User, str] | None:
    with ledger.read() as connection:
        row = connection.execute(select(users).where(users.c.name == name)).mappings().first()
    if row is None:
        return None
    password_hash: str = row["password_hash"]
    fingerprint = hashlib.sha256(password_hash.encode()).hexdigest()[:16]
    return User(row["name"], row["role"], fingerprint), password_hash
