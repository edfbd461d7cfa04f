import pytest
from sqlalchemy import select
from webui_site import PASSWORD, open_site

from herald.ledger import audit, users
from webui import session
from webui.users import UserError, add_user, check_password, find_user


@pytest.fixture
def site(tmp_path):
    with open_site(tmp_path) as site:
        yield site


def audited(site) -> list[tuple[str, str]]:
    with site.ledger.read() as connection:
        return [tuple(row) for row in connection.execute(select(audit.c.user, audit.c.action))]


def test_a_log_in_leads_to_where_the_reader_wanted_to_go(site):
    client = site.app.test_client()
    wanted = client.get("/?disposition=positive").location
    assert wanted.startswith("/login?next=")
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD, "next": "/?disposition=positive"})
    assert answer.location == "/?disposition=positive"


@pytest.mark.parametrize(
    "target", ["https://elsewhere.example/", "//elsewhere.example", "/\\elsewhere.example", "x", "/\tx"]
)
def test_a_log_in_never_leads_to_another_site(site, target):
    answer = site.app.test_client().post("/login", data={"name": "rita", "password": PASSWORD, "next": target})
    assert answer.location == "/"


@pytest.mark.parametrize(("name", "password"), [("rita", "wrong"), ("nobody", PASSWORD), ("", ""), ("RITA", PASSWORD)])
def test_a_wrong_name_and_a_wrong_password_get_the_same_answer(site, name, password):
    client = site.app.test_client()
    answer = client.post("/login", data={"name": name, "password": password})
    assert answer.status_code == 401
    assert "Name or password is wrong." in answer.text
    assert client.get("/").status_code == 302


def test_log_ins_failures_and_log_outs_are_audited_without_what_was_typed(site):
    client = site.client("rita")
    client.post("/logout")
    client.post("/login", data={"name": "rita", "password": "wrong"})
    client.post("/login", data={"name": "my secret password", "password": "wrong"})
    assert audited(site) == [
        ("rita", "log-in"),
        ("rita", "log-out"),
        ("rita", session.LOG_IN_FAILED),
        ("", session.LOG_IN_FAILED),
    ]


def test_after_five_wrong_passwords_even_the_right_one_must_wait(site):
    client = site.app.test_client()
    for _ in range(session.MOST_FAILURES_OF_USER_AT_ADDRESS):
        assert client.post("/login", data={"name": "rita", "password": "wrong"}).status_code == 401
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD})
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "300"
    assert site.client("ada").get("/").status_code == 200  # another user is not locked out
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD}, environ_overrides=elsewhere)
    assert answer.status_code == 303  # nor is the same user from elsewhere


def test_after_many_failures_an_address_must_wait_whatever_the_name(site, monkeypatch):
    monkeypatch.setattr(session, "MOST_FAILURES_AT_ADDRESS", 2)
    client = site.app.test_client()
    for name in ("one", "two"):
        client.post("/login", data={"name": name, "password": "wrong"})
    assert client.post("/login", data={"name": "rita", "password": PASSWORD}).status_code == 429


def test_a_logged_out_session_is_over(site):
    client = site.client("rita")
    answer = client.post("/logout")
    assert answer.headers["Clear-Site-Data"] == '"cache"'
    assert client.get("/").status_code == 302


def test_a_session_ends_after_its_hours_even_in_use(site, monkeypatch):
    import time

    client = site.client("rita")
    now = time.time()
    monkeypatch.setattr(session.time, "time", lambda: now + 11.9 * 3600)
    assert client.get("/").status_code == 200
    monkeypatch.setattr(session.time, "time", lambda: now + 12.1 * 3600)
    assert client.get("/").status_code == 302


def test_a_new_password_or_a_removed_user_ends_every_session(site):
    rita, remi = site.client("rita"), site.client("remi")
    add_user(site.ledger, "rita", "another password", "reader")
    with site.ledger.begin() as connection:
        connection.execute(users.delete().where(users.c.name == "remi"))
    assert rita.get("/").status_code == 302
    assert remi.get("/").status_code == 302


@pytest.mark.parametrize(("url", "secure"), [("https://herald.example", True), ("http://127.0.0.1:8080", False)])
def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(tmp_path, url, secure):
    with open_site(tmp_path, public_url=url) as site:
        answer = site.app.test_client().post("/login", data={"name": "rita", "password": PASSWORD})
        cookie = answer.headers["Set-Cookie"]
        assert ("Strict-Transport-Security" in answer.headers) == secure
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert ("Secure" in cookie) == secure


def test_passwords_are_kept_as_argon2_hashes_only(site):
    with site.ledger.read() as connection:
        hashes = connection.execute(select(users.c.password_hash)).scalars().all()
    assert all(value.startswith("$argon2id$") and PASSWORD not in value for value in hashes)


def test_adding_a_known_user_changes_password_and_role(site):
    add_user(site.ledger, "rita", "another password", "admin")
    assert check_password(site.ledger, "rita", PASSWORD) is None
    assert check_password(site.ledger, "rita", "another password").role == "admin"


@pytest.mark.parametrize(
    ("name", "password", "role", "reason"),
    [
        ("", PASSWORD, "reader", "1 to 64 printable"),
        (" rita", PASSWORD, "reader", "without blanks"),
        ("new", PASSWORD, "surgeon", "reader, researcher, admin"),
        ("new", "short", "reader", "10 characters or more"),
    ],
)
def test_a_user_that_cannot_be_is_refused_with_the_reason(site, name, password, role, reason):
    with pytest.raises(UserError, match=reason):
        add_user(site.ledger, name, password, role)
    assert find_user(site.ledger, "new") is None
