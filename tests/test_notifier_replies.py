"""A page is answered by e-mail: real SMTP to the real server, which asks the real web UI."""

import logging
import smtplib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from email.message import EmailMessage
from email.policy import SMTP
from itertools import count
from uuid import UUID

import pytest
import requests
from notifier_fakes import free_port
from sqlalchemy import select
from webui_site import Site, add_page, open_site, running, triaged

from herald import links
from herald.bus import open_bus
from herald.config import Config, LedgerConfig, NotifierConfig
from herald.errors import ConfigError
from herald.events import SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import audit, results, reviews
from herald.links import page_link, page_token, reply_address
from notifier.replies import serve_replies
from webui.service import serve as serve_webui

ADDRESS = "herald@hospital.example"
READER = "Kim Reader <kim.reader@hospital.example>"
WHO = "e-mail reply (k...@hospital.example)"

numbers = count(1)


@contextmanager
def listening(config: Config, port: int, service: Callable[[Config, threading.Event], None]) -> Iterator[None]:
    """A service in a thread until the end of the block, from when it answers."""
    with running(service, config) as stop:
        for _ in range(1000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            stop.wait(0.03)
        else:
            raise AssertionError("the service does not answer")
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A web UI that serves, and the settings of the notifier beside it."""
    with open_site(tmp_path_factory.mktemp("replies")) as site:
        port = free_port()
        site.config = replace(
            site.config,
            webui=replace(site.config.webui, port=port),
            notifier=NotifierConfig(
                mode="live",
                webui_url=f"http://127.0.0.1:{port}",
                reply_address=ADDRESS,
                reply_port=free_port(),
            ),
        )
        with listening(site.config, port, serve_webui):
            yield site


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Config]:
    with listening(site.config, site.config.notifier.reply_port, serve_replies):
        yield site.config


@dataclass
class Paged:
    """A positive study with its page, and the token that the page's e-mail carries."""

    event: SeriesTriaged
    page_id: str
    token: str

    @property
    def address(self) -> str:
        return reply_address(ADDRESS, self.token)


@pytest.fixture
def paged(site: Site) -> Paged:
    return page(site)


def page(site: Site, *, posted: bool = True) -> Paged:
    number = next(numbers)
    event = site.add(number) if posted else triaged(number)
    page_id = str(UUID(int=(number << 96) | number))
    add_page(site.ledger, event, page_id, recipient=READER)
    return Paged(event, page_id, page_token(site.config.webui, page_id))


def answer(to: str, text: str = "On my way", **headers: str) -> EmailMessage:
    email = EmailMessage()
    email["From"] = READER
    email["To"] = to
    email["Subject"] = "Re: Herald: suspected intracranial haemorrhage"
    for name, value in headers.items():
        email[name.replace("_", "-")] = value
    email.set_content(text)
    return email


def send(config: Config, email: EmailMessage | bytes, to: str, mail_from: str = "kim.reader@hospital.example") -> str:
    """The server's last answer, as its mail system would see it."""
    content = email if isinstance(email, bytes) else email.as_bytes(policy=SMTP)
    with smtplib.SMTP("127.0.0.1", config.notifier.reply_port, local_hostname="mail.example", timeout=30) as smtp:
        try:
            smtp.ehlo()
            code, text = smtp.mail(mail_from)
            if code == 250:
                code, text = smtp.rcpt(to)
            if code == 250:
                code, text = smtp.data(content)
        except smtplib.SMTPResponseException as error:
            code, text = error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else b""
        return f"{code} {text.decode()}"


def reviewed(site: Site, paged: Paged) -> list[tuple[str, str]]:
    statement = select(reviews.c.action, reviews.c.reader).where(
        reviews.c.study_instance_uid == paged.event.study_instance_uid
    )
    with site.ledger.read() as connection:
        return [(row.action, row.reader) for row in connection.execute(statement)]


def acknowledged_by(site: Site, paged: Paged) -> str | None:
    statement = select(results.c.acknowledged_by).where(
        results.c.series_instance_uid == paged.event.series_instance_uid
    )
    with site.ledger.read() as connection:
        return connection.execute(statement).scalar_one()


def test_an_answer_to_the_address_of_a_page_acknowledges_it_and_is_on_the_bus(
    site: Site, server: Config, paged: Paged
) -> None:
    assert send(server, answer(paged.address), paged.address).startswith("250 2.0.0")
    assert reviewed(site, paged) == [("acknowledge", WHO)]
    assert acknowledged_by(site, paged) == WHO
    with site.ledger.read() as connection:
        noted = select(audit.c.user, audit.c.action).where(audit.c.study_instance_uid == paged.event.study_instance_uid)
        assert [tuple(row) for row in connection.execute(noted)] == [(WHO, "acknowledge-reply")]
    bus = open_bus(server.bus)
    try:
        while (delivery := bus.fetch("test", ("reviews",), 20)) is not None:
            bus.ack(delivery)
            event = delivery.event
            if event.study_instance_uid == paged.event.study_instance_uid:
                break
        assert isinstance(event, SeriesReviewed)
        assert (event.action, event.reader) == ("acknowledge", WHO)
    finally:
        bus.close()


def test_the_case_of_the_address_does_not_matter(site: Site, server: Config, paged: Paged) -> None:
    assert send(server, answer(paged.address), paged.address.upper()).startswith("250")
    assert acknowledged_by(site, paged) == WHO


@pytest.mark.parametrize("where", ["subject", "quoted text", "quoted link", "html"])
def test_where_the_mail_system_knows_no_subaddresses_the_token_in_the_text_counts(
    site: Site, server: Config, paged: Paged, where: str
) -> None:
    email = answer(ADDRESS, "Seen.\n")
    if where == "subject":
        email.replace_header("Subject", f"Re: haemorrhage Ref: {paged.token}")
    elif where == "quoted text":
        email.set_content(f"Seen.\n\nAm 22.11. schrieb Herald:\n> Suspected haemorrhage\n> Ref: {paged.token}\n")
    elif where == "quoted link":
        email.set_content(f"Seen: {page_link(server.webui, paged.page_id)}\n", cte="base64")
    else:
        email.set_content(f"<p>Seen</p><blockquote>Ref:&nbsp;<b>{paged.token}</b></blockquote>", subtype="html")
    assert send(server, email, ADDRESS).startswith("250")
    assert acknowledged_by(site, paged) == WHO


def test_the_message_id_of_a_page_proves_nothing(site: Site, server: Config, paged: Paged) -> None:
    message_id = f"<{paged.page_id}@hospital.example>"
    said = send(server, answer(ADDRESS, In_Reply_To=message_id, References=message_id), ADDRESS)
    assert said.startswith("550 5.7.1 Nothing was acknowledged: it names no page")
    assert reviewed(site, paged) == []


def test_a_forged_or_expired_token_is_refused_with_what_to_do(
    site: Site, server: Config, paged: Paged, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = page_token(replace(server.webui, secret_key="another"), paged.page_id)
    said = send(server, answer(ADDRESS), reply_address(ADDRESS, forged))
    assert said.startswith("550")
    assert "was not signed by this node" in said
    assert "log in and use the worklist" in said
    later = utc_now() + timedelta(hours=server.webui.link_hours + 1)
    monkeypatch.setattr(links, "utc_now", lambda: later)
    said = send(server, answer(paged.address), paged.address)
    assert said.startswith("550")
    assert "has expired" in said
    assert reviewed(site, paged) == []


def test_a_good_token_in_the_text_makes_up_for_a_damaged_address(site: Site, server: Config, paged: Paged) -> None:
    damaged = reply_address(ADDRESS, "a" * len(paged.token))
    assert send(server, answer(damaged, f"> Ref: {paged.token}"), damaged).startswith("250")
    assert acknowledged_by(site, paged) == WHO


@pytest.mark.parametrize("to", ["postmaster@hospital.example", "herald@elsewhere.example", "heraldx@hospital.example"])
def test_mail_for_anybody_else_is_refused(server: Config, to: str) -> None:
    said = send(server, answer(to), to)
    assert said.startswith("550 5.1.1")
    assert ADDRESS in said


@pytest.mark.parametrize(
    "headers",
    [
        {"Auto_Submitted": "auto-replied (vacation)"},
        {"Auto_Submitted": "auto-generated; owner-email=x@hospital.example"},
        {"Precedence": "bulk"},
        {"X_Autoreply": "yes"},
        {"Content_Type": 'multipart/report; report-type="disposition-notification"; boundary="b"'},
        {},
    ],
    ids=["vacation", "generated", "bulk", "older responder", "receipt", "bounce"],
)
def test_what_a_machine_sends_on_its_own_acknowledges_nothing(
    site: Site, server: Config, paged: Paged, headers: dict[str, str]
) -> None:
    email = answer(paged.address, f"I am away. Ref: {paged.token}")
    for name, value in headers.items():
        del email[name.replace("_", "-")]
        email[name.replace("_", "-")] = value
    said = send(server, email, paged.address, mail_from="" if not headers else "kim.reader@hospital.example")
    assert said.startswith("550 5.7.1 Nothing was acknowledged: only a person can")
    assert reviewed(site, paged) == []


def test_an_answer_that_says_it_is_not_automatic_acknowledges(site: Site, server: Config, paged: Paged) -> None:
    assert send(server, answer(paged.address, "Not me!", Auto_Submitted="no"), paged.address).startswith("250")
    assert acknowledged_by(site, paged) == WHO


def test_while_the_web_ui_is_away_the_mail_system_is_asked_to_try_again(site: Site, paged: Paged) -> None:
    away = free_port()
    config = replace(
        site.config,
        notifier=replace(site.config.notifier, reply_port=free_port(), webui_url=f"http://127.0.0.1:{away}"),
        webui=replace(site.config.webui, port=away),
    )
    with listening(config, config.notifier.reply_port, serve_replies):
        assert send(config, answer(paged.address), paged.address).startswith("451 4.4.1")
        assert reviewed(site, paged) == []
        with listening(config, away, serve_webui):
            assert send(config, answer(paged.address), paged.address).startswith("250")
    assert acknowledged_by(site, paged) == WHO


@pytest.mark.parametrize("missing", ["result", "token", "ledger"])
def test_what_can_still_be_mended_is_tried_again(site: Site, missing: str) -> None:
    paged = page(site, posted=missing != "result")
    config = replace(site.config, notifier=replace(site.config.notifier, reply_port=free_port()))
    if missing == "token":
        config = replace(config, webui=replace(config.webui, token="another"))
    if missing == "ledger":
        config = replace(config, ledger=LedgerConfig(url="sqlite:////nowhere/ledger.sqlite"))
    with listening(config, config.notifier.reply_port, serve_replies):
        assert send(config, answer(paged.address), paged.address).startswith("451")
    assert reviewed(site, paged) == []


def test_of_two_answers_at_once_one_is_first_and_both_are_taken(site: Site, server: Config, paged: Paged) -> None:
    gate = threading.Barrier(2)
    said = []

    def reply(name: str) -> None:
        email = answer(paged.address)
        email.replace_header("From", f"{name}@hospital.example")
        gate.wait(20)
        said.append(send(server, email, paged.address)[:3])

    threads = [threading.Thread(target=reply, args=(name,)) for name in ("anna", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["250", "250"]
    both = {f"e-mail reply ({letter}...@hospital.example)" for letter in "ab"}
    assert {reader for _, reader in reviewed(site, paged)} == both
    assert acknowledged_by(site, paged) in both


def test_an_answer_that_is_too_large_is_refused_before_it_is_read(
    site: Site, server: Config, paged: Paged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifier.replies.LARGEST_MESSAGE_BYTES", 1000)
    assert send(server, answer(paged.address, "x\n" * 1000), paged.address).startswith("552")
    assert reviewed(site, paged) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00 no header at all",
        b"From: =?utf-8?b?////?= <\r\nSubject: =?x?q?\r\n\r\nhello",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain; charset=none\r\n\r\n\xff",
        b"Content-Type: text/plain\r\n\r\n" + 5000 * b"long ",
        b"Content-Transfer-Encoding: base64\r\nContent-Type: text/plain\r\n\r\n!!!!=",
        b"From: [\r\nAuto-Submitted:\r\nTo: @@@\r\n\r\n",
    ],
)
def test_a_message_that_is_no_message_is_refused_in_words(server: Config, content: bytes) -> None:
    said = send(server, content, ADDRESS)
    assert said.startswith("550 5.7.1 Nothing was acknowledged")


def test_neither_tokens_nor_whole_addresses_are_logged(
    server: Config, paged: Paged, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("mail.log").setLevel(logging.WARNING)
        send(server, answer(paged.address), paged.address)
    assert "was acknowledged by" in caplog.text
    assert paged.token not in caplog.text
    assert "kim" not in caplog.text.lower()


def test_the_web_ui_takes_acknowledgements_only_with_its_token_and_a_reader(site: Site, paged: Paged) -> None:
    url = f"{site.config.notifier.webui_url}/api/acknowledgements/{paged.event.series_instance_uid}/1"
    good = {"Authorization": f"Bearer {site.config.webui.token}"}
    assert requests.post(url, json={"reader": "x"}, timeout=30).status_code == 401
    assert requests.post(url, json={"reader": " "}, headers=good, timeout=30).status_code == 400
    assert requests.post(url, data=b"[", headers=good, timeout=30).status_code == 400
    assert reviewed(site, paged) == []
    first = requests.post(url, json={"reader": "anna"}, headers=good, timeout=30).json()
    second = requests.post(url, json={"reader": "ben"}, headers=good, timeout=30).json()
    assert (first["reader"], first["first"]) == ("anna", True)
    assert second == {"reader": "anna", "at": first["at"], "first": False}


@pytest.mark.parametrize("address", ["", "herald", "Herald <herald@hospital.example>", "@hospital.example", "herald@"])
def test_an_address_that_cannot_be_answered_is_a_fault_of_the_configuration(site: Site, address: str) -> None:
    config = replace(site.config, notifier=replace(site.config.notifier, reply_address=address))
    with pytest.raises(ConfigError, match=r"notifier\.reply_address"):
        serve_replies(config, threading.Event())


def test_a_port_that_is_taken_is_a_fault_of_the_configuration(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = replace(site.config, notifier=replace(site.config.notifier, reply_port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"notifier\.reply_port"):
            serve_replies(config, threading.Event())


def test_a_stop_does_not_wait_for_who_holds_a_connection_open(site: Site) -> None:
    config = replace(site.config, notifier=replace(site.config.notifier, reply_port=free_port()))
    with listening(config, config.notifier.reply_port, serve_replies):
        smtp = smtplib.SMTP("127.0.0.1", config.notifier.reply_port, local_hostname="mail.example", timeout=30)
        smtp.ehlo()
    smtp.close()
