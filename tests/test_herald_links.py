from dataclasses import replace
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import herald.links
from herald.config import WebuiConfig
from herald.errors import ConfigError, LinkError
from herald.events import utc_now
from herald.links import ReviewLink, sign_link, verify_link

CONFIG = WebuiConfig(secret_key="key-for-tests", public_url="https://herald.example/ct/")


def token_of(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


uids = st.from_regex(r"[12]\.[0-9]{1,20}(\.[0-9]{1,15}){0,2}", fullmatch=True)


@settings(deadline=None)
@given(study=uids, series=uids, revision=st.integers(1, 99))
def test_a_signed_link_leads_back_to_the_series_revision_it_was_made_for(
    study: str, series: str, revision: int
) -> None:
    url = sign_link(CONFIG, study, series, revision)
    assert url.startswith("https://herald.example/ct/page/")
    assert verify_link(CONFIG, token_of(url)) == ReviewLink(study, series, revision)


def test_the_link_starts_with_the_listening_address_when_no_public_url_is_set() -> None:
    url = sign_link(WebuiConfig(secret_key="k", host="127.0.0.1", port=8081), "1", "2", 1)
    assert url.startswith("http://127.0.0.1:8081/page/")


@pytest.mark.parametrize("position", [0, 10, -1])
def test_a_link_changed_in_one_character_is_refused(position: int) -> None:
    token = list(token_of(sign_link(CONFIG, "1.2.3", "1.2.3.4", 1)))
    token[position] = "A" if token[position] != "A" else "Q"
    with pytest.raises(LinkError, match="not signed by this node"):
        verify_link(CONFIG, "".join(token))


@pytest.mark.parametrize("token", ["", ".", "a.b.c", "é", "x" * 5000])
def test_a_token_that_is_rubbish_is_refused(token: str) -> None:
    with pytest.raises(LinkError):
        verify_link(CONFIG, token)


def test_a_link_signed_with_another_key_is_refused() -> None:
    token = token_of(sign_link(replace(CONFIG, secret_key="another"), "1.2.3", "1.2.3.4", 1))
    with pytest.raises(LinkError):
        verify_link(CONFIG, token)


def test_a_token_signed_for_another_purpose_with_the_same_key_is_refused() -> None:
    from itsdangerous import URLSafeTimedSerializer

    token = URLSafeTimedSerializer(CONFIG.secret_key, salt="session").dumps(["1.2.3", "1.2.3.4", 1])
    with pytest.raises(LinkError):
        verify_link(CONFIG, str(token))


@pytest.mark.parametrize("payload", [["1.2.3"], {"a": 1}, ["1", "2", "three"], "text", None])
def test_a_signed_token_of_another_shape_is_refused(payload: object) -> None:
    token = herald.links._serializer(CONFIG).dumps(payload)
    with pytest.raises(LinkError):
        verify_link(CONFIG, str(token))


def test_a_link_older_than_its_hours_is_refused_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    token = token_of(sign_link(CONFIG, "1.2.3", "1.2.3.4", 1))
    later = utc_now() + timedelta(hours=CONFIG.link_hours)
    monkeypatch.setattr(herald.links, "utc_now", lambda: later - timedelta(minutes=1))
    verify_link(CONFIG, token)
    monkeypatch.setattr(herald.links, "utc_now", lambda: later + timedelta(minutes=1))
    with pytest.raises(LinkError, match=r"expired: links are valid for 72 hours; log in"):
        verify_link(CONFIG, token)


def test_a_link_from_a_clock_slightly_ahead_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    token = token_of(sign_link(CONFIG, "1.2.3", "1.2.3.4", 1))
    earlier = utc_now() - timedelta(seconds=30)
    monkeypatch.setattr(herald.links, "utc_now", lambda: earlier)
    assert verify_link(CONFIG, token).study_instance_uid == "1.2.3"


def test_without_a_secret_key_no_link_is_signed() -> None:
    with pytest.raises(ConfigError, match=r"webui\.secret_key"):
        sign_link(WebuiConfig(), "1.2.3", "1.2.3.4", 1)
