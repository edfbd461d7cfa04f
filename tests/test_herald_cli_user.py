"""`herald user`: who may log in, added, listed and removed at the command line."""

import json
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result
from webui_site import PASSWORD, Site, open_site

from herald.cli import app
from herald.errors import HeraldError
from herald.ledger import audit
from webui.users import admit, check_password, find_user


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with open_site(tmp_path) as site:
        monkeypatch.setenv("HERALD_LEDGER__URL", site.config.ledger.url)
        monkeypatch.setenv("HERALD_CONFIG", "")
        monkeypatch.chdir(tmp_path)
        yield site


def herald(*arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["user", *arguments], input=answer)
    if isinstance(result.exception, HeraldError):
        raise result.exception
    return result


def audited(site: Site) -> list[tuple[str, str, str]]:
    with site.ledger.read() as connection:
        statement = select(audit.c.user, audit.c.address, audit.c.action)
        return [tuple(row) for row in connection.execute(statement)]


def test_users_are_listed_with_role_and_way_of_log_in_and_never_a_hash(site: Site) -> None:
    admit(site.ledger, "https://idp.example 1", "olga [bold]", "reader")
    listed = json.loads(herald("list", "--json").stdout)
    assert [(user["name"], user["role"], user["log_in"]) for user in listed] == [
        ("ada", "admin", "password"),
        ("olga [bold]", "reader", "OpenID Connect"),
        ("remi", "researcher", "password"),
        ("rita", "reader", "password"),
    ]
    table = herald("list").stdout
    assert "olga [bold]" in table
    for text in (table, json.dumps(listed)):
        assert "argon2" not in text
        assert "oidc:" not in text


def test_an_empty_list_says_how_to_add_the_first_administrator(site: Site) -> None:
    for name in ("rita", "remi", "ada"):
        assert herald("remove", name, "--yes").exit_code == 0
    result = herald("list", "--json")
    assert json.loads(result.stdout) == []
    assert "herald user add NAME --role admin" in result.stderr


def test_a_removed_user_is_logged_out_at_once_and_their_password_is_gone(site: Site) -> None:
    rita = site.client("rita")
    assert rita.get("/").status_code == 200
    result = herald("remove", "rita", answer="y\n")
    assert result.exit_code == 0
    assert "rita may not log in any more" in result.stdout
    assert rita.get("/").status_code == 302
    assert check_password(site.ledger, "rita", PASSWORD) is None
    assert audited(site)[-1] == ("rita", "command line", "user-remove")
    herald("add", "rita", "--password", PASSWORD)
    assert rita.get("/").status_code == 302  # nor does the old session come alive with a new user of the name
    assert audited(site)[-1] == ("rita", "command line", "user-add-reader")


def test_who_comes_by_the_provider_must_be_refused_there_too(site: Site) -> None:
    admit(site.ledger, "https://idp.example 1", "olga", "reader")
    assert "take the role away there too" in herald("remove", "olga", "--yes").stderr
    assert "provider" not in herald("remove", "rita", "--yes").stderr


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_who_does_not_say_yes_removes_nobody(site: Site, answer: str) -> None:
    assert herald("remove", "rita", answer=answer).exit_code == 1
    assert find_user(site.ledger, "rita") is not None


def test_the_last_administrator_is_removed_only_by_who_says_so_in_advance(site: Site) -> None:
    with pytest.raises(HeraldError, match=r"ada is the last administrator.*herald user add NAME --role admin.*--yes"):
        herald("remove", "ada", answer="y\n")
    assert find_user(site.ledger, "ada") is not None
    result = herald("remove", "ada", "--yes")
    assert "no administrator is left" in result.stderr
    assert find_user(site.ledger, "ada") is None


def test_one_of_two_administrators_may_go(site: Site) -> None:
    herald("add", "bea", "--role", "admin", "--password", PASSWORD)
    assert herald("remove", "ada", answer="y\n").exit_code == 0
    assert find_user(site.ledger, "bea").role == "admin"


def test_an_unknown_name_is_said_with_where_to_look(site: Site) -> None:
    with pytest.raises(HeraldError, match="there is no user nobody; `herald user list`"):
        herald("remove", "nobody")
    assert audited(site) == []
