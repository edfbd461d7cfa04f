"""Log-in, log-out, and who may see what: every view needs a log-in unless it says otherwise."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Flask,
    abort,
    current_app,
    flash,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_login import LoginManager, current_user, login_user, logout_user  # type: ignore[import-untyped]

from webui import record
from webui.context import context
from webui.users import Role, User, check_password, find_user

blueprint = Blueprint("session", __name__)

LOG_IN_FAILED = "log-in-failed"
FAILURES_WITHIN = timedelta(minutes=5)
MOST_FAILURES_OF_USER_AT_ADDRESS = 5
MOST_FAILURES_AT_ADDRESS = 30
MOST_FAILURES_OF_USER = 50

_UNTIL = "until"

View = TypeVar("View", bound=Callable[..., ResponseReturnValue])

_public: set[object] = set()
_allowed: dict[object, tuple[Role, ...]] = {}


def public(view: View) -> View:
    """Mark a view that needs no log-in."""
    _public.add(view)
    return view


def allow(*roles: Role) -> Callable[[View], View]:
    """Mark a view that only these roles may use."""

    def mark(view: View) -> View:
        _allowed[view] = roles
        return view

    return mark


def user() -> User:
    """Who is logged in; only for views that need a log-in."""
    who: User = current_user._get_current_object()
    return who


def address() -> str:
    """Where the request comes from."""
    return request.remote_addr or ""


def init_app(app: Flask) -> None:
    """Make log-in part of an application."""
    # without Flask-Login's own context processor, an error page needs no look into the ledger
    manager = LoginManager(app, add_context_processor=False)
    manager.session_protection = "basic"
    manager.user_loader(_load_user)
    app.before_request(_require_log_in)
    app.register_blueprint(blueprint)


def _load_user(user_id: str) -> User | None:
    """The user of this session unless it ran out, the password changed or the user is gone."""
    if session.get(_UNTIL, 0.0) < time.time():
        return None
    _, _, name = user_id.partition(":")
    found = find_user(context().ledger, name)
    return found if found is not None and found.get_id() == user_id else None


def _require_log_in() -> ResponseReturnValue | None:
    if request.endpoint is None or request.endpoint == "static":
        return None
    view = current_app.view_functions[request.endpoint]
    if view in _public:
        return None
    if not current_user.is_authenticated:
        if request.method in ("GET", "HEAD"):
            return redirect(url_for("session.log_in", next=request.full_path.rstrip("?")))
        abort(401)
    if view in _allowed and user().role not in _allowed[view]:
        abort(403)
    return None


@blueprint.get("/login")
@public
def log_in() -> ResponseReturnValue:
    """I give my name and password."""
    return render_template("session/log_in.html", next=_local(request.args.get("next", "")))


@blueprint.post("/login")
@public
def open_session() -> ResponseReturnValue:
    """I log in and come to where I wanted to go."""
    name, password = request.form.get("name", "").strip(), request.form.get("password", "")
    target = _local(request.form.get("next", ""))
    ledger = context().ledger
    known = find_user(ledger, name) is not None
    # what was typed for an unknown name may be a password: it is not written down
    noted = name if known else ""
    if _too_many_failures(noted):
        page = render_template("session/log_in.html", next=target, name=name, problem="too many")
        return page, 429, {"Retry-After": str(int(FAILURES_WITHIN.total_seconds()))}
    who = check_password(ledger, name, password)
    if who is None:
        record.add_audit(ledger, noted, address(), LOG_IN_FAILED)
        return render_template("session/log_in.html", next=target, name=name, problem="wrong"), 401
    session.clear()  # a session that somebody else prepared is not carried on
    session.permanent = True
    session[_UNTIL] = time.time() + context().config.webui.session_hours * 3600
    login_user(who)
    record.add_audit(ledger, who.name, address(), "log-in")
    return redirect(target or url_for("worklist.index"), 303)


@blueprint.post("/logout")
def log_out() -> ResponseReturnValue:
    """I log out; pictures leave the browser's cache."""
    record.add_audit(context().ledger, user().name, address(), "log-out")
    logout_user()
    session.clear()
    flash("You are logged out.")
    response = make_response(redirect(url_for("session.log_in"), 303))
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


def _too_many_failures(name: str) -> bool:
    ledger, here = context().ledger, address()

    def failures(of: str | None, at: str | None) -> int:
        return record.count_audit(ledger, LOG_IN_FAILED, FAILURES_WITHIN, user=of, address=at)

    if failures(None, here) >= MOST_FAILURES_AT_ADDRESS:
        return True
    if not name:
        return False
    return failures(name, here) >= MOST_FAILURES_OF_USER_AT_ADDRESS or failures(name, None) >= MOST_FAILURES_OF_USER


def _local(target: str) -> str:
    """A path of this site, or nothing: a link must not lead from our log-in to somebody else's site."""
    parts = urlsplit(target)
    local = not parts.scheme and not parts.netloc and target.startswith("/") and not target.startswith("//")
    return target if local and "\\" not in target and target.isprintable() else ""
