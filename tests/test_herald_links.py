from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from webui_site import add_page, triaged

import herald.links
from herald.config import LedgerConfig, WebuiConfig
from herald.errors import ConfigError, LinkError
from herald.events import utc_now
from herald.ledger import Ledger, open_ledger
from herald.links import (
    TOKEN_LENGTH,
    ReviewLink,
    follow_link,
    page_link,
    page_token,
    reply_address,
    reply_token,
)

CONFIG = WebuiConfig(secret_key="key-for-tests", public_url="https://herald.example/ct/")
PAGE = "0a1b2c3d-4e5f-5071-8293-a4b5c6d7e8f9"
OTHER_PAGE = "0a1b2c3d-4e5f-5072-8293-a4b5c6d7e8f9"


def token_of(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def test_the_link_starts_with_the_listening_address_when_no_public_url_is_set() -> None:
    url = page_link(WebuiConfig(secret_key="k", host="127.0.0.1", port=8081), PAGE)
    assert url.startswith("http://127.0.0.1:8081/page/")


def test_without_a_secret_key_no_link_is_signed() -> None:
    with pytest.raises(ConfigError, match=r"webui\.secret_key"):
        page_link(WebuiConfig(), PAGE)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(LedgerConfig(f"sqlite:///{tmp_path / 'ledger.sqlite'}"))
    for page_id, series in ((PAGE, "1.2.3.4"), (OTHER_PAGE, "1.2.3.5")):
        event = replace(triaged(1), study_instance_uid="1.2.3", series_instance_uid=series, revision=2)
        add_page(ledger, event, page_id)
    yield ledger
    ledger.close()


def follow(ledger: Ledger, token: str, config: WebuiConfig = CONFIG) -> ReviewLink:
    with ledger.read() as connection:
        return follow_link(config, connection, token)


def test_the_link_of_a_page_is_short_and_leads_to_the_series_of_that_page(ledger: Ledger) -> None:
    url = page_link(CONFIG, PAGE)
    assert url.startswith("https://herald.example/ct/page/")
    assert len(token_of(url)) == TOKEN_LENGTH
    assert follow(ledger, token_of(url)) == ReviewLink("1.2.3", "1.2.3.4", 2)
    assert follow(ledger, page_token(CONFIG, OTHER_PAGE)) == ReviewLink("1.2.3", "1.2.3.5", 2)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, TOKEN_LENGTH - 1), character=st.sampled_from("abcdefghijklmnopqrstuvwxyz234567-=+"))
def test_a_token_changed_in_one_character_is_refused(ledger: Ledger, position: int, character: str) -> None:
    token = page_token(CONFIG, PAGE)
    assume(token[position] != character)
    with pytest.raises(LinkError, match="not signed by this node"):
        follow(ledger, token[:position] + character + token[position + 1 :])


@pytest.mark.parametrize("token", ["", "a.b.c", "é" * TOKEN_LENGTH, "1" * TOKEN_LENGTH, "a" * TOKEN_LENGTH, "a" * 5000])
def test_a_page_token_that_is_rubbish_is_refused(ledger: Ledger, token: str) -> None:
    with pytest.raises(LinkError):
        follow(ledger, token)


def test_a_page_token_of_another_key_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LinkError, match="not signed by this node"):
        follow(ledger, page_token(replace(CONFIG, secret_key="another"), PAGE))


def test_a_token_of_a_page_that_the_ledger_does_not_have_is_refused_and_says_so(ledger: Ledger) -> None:
    with pytest.raises(LinkError, match="no longer has"):
        follow(ledger, page_token(CONFIG, "ffffffff-4e5f-5071-8293-a4b5c6d7e8f9"))


def test_a_link_from_a_clock_slightly_ahead_is_good(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    token = page_token(CONFIG, PAGE)
    earlier = utc_now() - timedelta(seconds=90)
    monkeypatch.setattr(herald.links, "utc_now", lambda: earlier)
    assert follow(ledger, token).study_instance_uid == "1.2.3"


def test_a_page_token_expires_as_links_do(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    token = page_token(CONFIG, PAGE)
    later = utc_now() + timedelta(hours=CONFIG.link_hours)
    monkeypatch.setattr(herald.links, "utc_now", lambda: later - timedelta(minutes=2))
    follow(ledger, token)
    monkeypatch.setattr(herald.links, "utc_now", lambda: later + timedelta(minutes=1))
    with pytest.raises(LinkError, match=r"expired: links are valid for 72 hours; log in"):
        follow(ledger, token)


def test_a_reply_address_carries_the_token_through_mail_systems_that_change_its_case(ledger: Ledger) -> None:
    token = page_token(CONFIG, PAGE)
    address = reply_address("herald@hospital.example", token)
    assert address == f"herald+{token}@hospital.example"
    assert len(address.partition("@")[0]) <= 64  # RFC 5321 4.5.3.1.1
    assert reply_token("Herald@hospital.example", address.upper()) == token
    assert follow(ledger, address.upper()[7:39]) == ReviewLink("1.2.3", "1.2.3.4", 2)


@pytest.mark.parametrize(
    "recipient",
    ["", "herald@hospital.example", "herald+short@hospital.example", "x+{}@hospital.example", "herald+{}@elsewhere"],
)
def test_an_address_that_is_not_a_reply_to_a_page_has_no_token(recipient: str) -> None:
    assert reply_token("herald@hospital.example", recipient.format("a" * TOKEN_LENGTH)) is None
