import socket
import threading
from dataclasses import replace

import pytest
import requests
from sqlalchemy import select

from herald.bus import open_bus
from herald.errors import BusError, ConfigError
from herald.events import SeriesReviewed
from herald.ledger import reviews
from webui import api
from webui import publisher as publishing
from webui.service import serve


def agree(site, number: int) -> None:
    event = site.add(number)
    form = {"verdict": "agree", **site.shown(event)}
    answer = site.client("rita").post(f"/series/{event.series_instance_uid}/1/review", data=form)
    assert answer.status_code == 303  # the reader gets success whatever the bus does


def unpublished(site) -> int:
    with site.ledger.read() as connection:
        return len(connection.execute(select(reviews).where(reviews.c.published_at.is_(None))).all())


def test_a_review_is_published_as_an_event_and_noted(site):
    agree(site, 1)
    assert site.publisher.publish_pending() == 1
    (event,) = site.bus.published
    assert isinstance(event, SeriesReviewed)
    assert (event.action, event.reader) == ("agree", "rita")
    assert unpublished(site) == 0
    assert site.publisher.publish_pending() == 0


def test_reviews_wait_in_the_ledger_while_the_bus_is_down_and_go_out_in_order(site):
    site.bus.down = True
    agree(site, 1)
    agree(site, 2)
    with pytest.raises(BusError):
        site.publisher.publish_pending()
    assert unpublished(site) == 2
    site.bus.down = False
    assert site.publisher.publish_pending() == 2
    assert [event.study_instance_uid[-2:] for event in site.bus.published] == [".1", ".2"]


def test_the_publisher_starts_with_what_is_left_over_and_tries_again_until_the_bus_is_back(site, monkeypatch):
    monkeypatch.setattr(publishing, "RETRY_S", 0.01)
    site.bus.down = True
    agree(site, 1)
    stop, refused, published = threading.Event(), threading.Event(), threading.Event()
    publish = site.bus.publish

    def watched(event):
        try:
            publish(event)
            published.set()
        except BusError:
            refused.set()
            raise

    site.bus.publish = watched
    thread = threading.Thread(target=site.publisher.run, args=(stop,))
    thread.start()
    try:
        assert refused.wait(10)
        site.bus.down = False
        assert published.wait(10)
        published.clear()
        agree(site, 2)  # wakes it
        assert published.wait(10)
    finally:
        stop.set()
        thread.join(10)
    assert unpublished(site) == 0


def test_the_service_answers_finishes_a_request_under_way_and_stops(site, monkeypatch, unused_port):
    config = replace(site.config, webui=replace(site.config.webui, port=unused_port))
    entered, release, answers = threading.Event(), threading.Event(), []
    check = api.context

    def slow():
        entered.set()
        assert release.wait(10)
        return check()

    stop = threading.Event()
    service = threading.Thread(target=serve, args=(config, stop))
    service.start()
    url = f"http://127.0.0.1:{unused_port}/health"
    pause = threading.Event()
    for _ in range(200):
        try:
            assert requests.get(url, timeout=10).json()["status"] == "ok"
            break
        except requests.ConnectionError:
            pause.wait(0.05)
    monkeypatch.setattr(api, "context", slow)
    asking = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=10).status_code))
    asking.start()
    assert entered.wait(10)
    stop.set()
    release.set()
    asking.join(10)
    service.join(10)
    assert answers == [200]
    assert not service.is_alive()
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


def test_the_service_publishes_what_was_left_over_on_the_real_bus(site, unused_port):
    agree(site, 1)
    stop = threading.Event()
    config = replace(site.config, webui=replace(site.config.webui, port=unused_port))
    service = threading.Thread(target=serve, args=(config, stop))
    service.start()
    bus = open_bus(config.bus)
    try:
        delivery = bus.fetch("test", ("reviews",), timeout_s=10)
        assert delivery is not None
        assert delivery.event.reader == "rita"
        bus.ack(delivery)
    finally:
        stop.set()
        service.join(10)
        bus.close()


def test_a_port_that_is_taken_is_a_configuration_error_that_names_it(site, unused_port):
    import socket

    config = replace(site.config, webui=replace(site.config.webui, port=unused_port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", unused_port))
        other.listen()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{unused_port}"):
            serve(config, threading.Event())


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
