"""The whole node: from an association to the page and the row on the worklist, on each bus; and what goes wrong."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from aiosmtpd.controller import Controller
from conftest import running_kafka
from pydicom import dcmread
from sqlalchemy import select
from whole_node import WholeNode, free_port, series_of, smtp_sink, until, whole_node

from herald.check import check
from herald.ledger import deliveries, reviews, series
from herald.reconcile import reconcile
from herald.smtp_sink import SmtpSink
from herald.trace import trace
from serving.phantom import write_demo_study
from webui.users import add_user

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two simulated studies: one with a haemorrhage, one without."""
    folder = tmp_path_factory.mktemp("simulated")
    write_demo_study(folder)
    (folder / "truth.json").unlink()
    return folder


@pytest.fixture
def sink() -> Iterator[SmtpSink]:
    with smtp_sink() as sink:
        yield sink


def one_series(simulated: Path, disposition: str) -> Path:
    """The folder of the simulated series with or without a haemorrhage."""
    return simulated / {"positive": "bleed", "negative": "no-bleed"}[disposition]


def posted(session: requests.Session, url: str, **fields: str) -> requests.Response:
    """Fill in the form on a page and send it, as a browser would."""
    page = session.get(url, timeout=10)
    fields |= dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page.text))
    action = re.search(r'<form[^>]*method="post"[^>]*action="([^"]*(?:login|review|/page/)[^"]*)"', page.text)
    assert action is not None, page.text
    target = requests.compat.urljoin(url, action[1])
    return session.post(target, data=fields, headers={"Referer": url}, timeout=10)


def acknowledged(node: WholeNode) -> bool:
    return [page.state for page in node.pages()] == ["acknowledged"]


def test_a_bleed_is_paged_once_and_the_reader_s_review_stops_the_escalation(
    tmp_path: Path, bus_url: str, simulated: Path, sink: SmtpSink
) -> None:
    with whole_node(tmp_path / "node", sink.port, BUS__URL=bus_url) as node, node.running():
        add_user(node.ledger, "reader", "reader-password", "reader")
        report = node.send(simulated)
        assert report.failed == ()
        found = node.wait_for_results(series_of(report))
        assert sorted(row.disposition for row in found.values()) == ["negative", "positive"]
        assert sink.wait_for(1, timeout_s=60)
        positive = next(row for row in found.values() if row.disposition == "positive")

        web = node.config.webui.public_url
        with requests.Session() as session:
            assert posted(session, f"{web}/login", name="reader", password="reader-password").ok
            worklist = session.get(web, timeout=10).text
            assert all(f"/series/{uid}" in worklist for uid in found)
            page = f"{web}/series/{positive.series_instance_uid}/{positive.revision}"
            slice_ = positive.event["findings"][0]["slice"]
            picture = session.get(f"{page}/slice/{slice_}.png?window=brain&mask=1", timeout=10)
            assert picture.headers["Content-Type"] == "image/png"
            assert posted(session, page, verdict="agree", finding_kind="iph").ok
        until(lambda: acknowledged(node), "the review stops the page")
        with node.ledger.read() as connection:
            review = connection.execute(select(reviews)).one()
        assert (review.action, review.reader, review.series_instance_uid) == (
            "agree",
            "reader",
            positive.series_instance_uid,
        )

        accounted = reconcile(node.config)
        assert accounted.unaccounted == 0, accounted.problems
        assert accounted.instances_on_disk == len(report.stored)
        steps = trace(node.config, positive.series_instance_uid)
        assert len({step.step for step in steps}) >= 5
        assert [outcome for outcome in check(node.config) if not outcome.ok] == []
        assert len(sink.messages) == 1


def test_the_link_in_the_page_acknowledges_without_a_log_in(tmp_path: Path, simulated: Path, sink: SmtpSink) -> None:
    with whole_node(tmp_path / "node", sink.port) as node, node.running():
        node.wait_for_results(series_of(node.send(one_series(simulated, "positive"))))
        assert sink.wait_for(1, timeout_s=60)
        link = re.search(r"http://\S+/page/\S+", sink.messages[0].body)
        assert link is not None
        with requests.Session() as stranger:
            assert "Acknowledge" in stranger.get(link[0], timeout=10).text
            assert posted(stranger, link[0]).ok
        until(lambda: acknowledged(node), "the link stops the page")


def test_a_late_slice_is_triaged_as_the_next_revision_and_pages_nobody_again(
    tmp_path: Path, simulated: Path, sink: SmtpSink
) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    for path in one_series(simulated, "positive").glob("*.dcm"):
        last = dcmread(path, stop_before_pixels=True).InstanceNumber == 1
        (late if last else early).mkdir(exist_ok=True)
        shutil.copy(path, late if last else early)
    with whole_node(tmp_path / "node", sink.port) as node, node.running():
        first = node.send(early)
        (uid,) = series_of(first)
        assert node.wait_for_results([uid])[uid].disposition == "positive"
        assert sink.wait_for(1, timeout_s=60)

        second = node.send(late)
        assert (len(second.stored), second.failed) == (1, ())
        until(lambda: node.results()[uid].revision == 2, "the late slice makes revision 2")
        result = node.results()[uid]
        assert result.disposition == "positive"
        assert result.event["instance_count"] == len(first.stored) + 1
        until(lambda: "covered" in outcomes(node), "the notifier has seen revision 2")
        with node.ledger.read() as connection:
            of_page = select(deliveries.c.revision, deliveries.c.outcome).where(deliveries.c.page_id.is_not(None))
            assert sorted((row.revision, row.outcome) for row in connection.execute(of_page)) == [
                (1, "sent"),
                (2, "covered"),
            ]
        assert [(page.revision, page.state) for page in node.pages()] == [(1, "sent")]
        assert len(sink.messages) == 1, "the finding was paged already"

        page = f"{node.config.webui.public_url}/series/{uid}"
        add_user(node.ledger, "reader", "reader-password", "reader")
        with requests.Session() as session:
            assert posted(
                session, f"{node.config.webui.public_url}/login", name="reader", password="reader-password"
            ).ok
            worklist = session.get(node.config.webui.public_url, timeout=10).text
            assert f"/series/{uid}/2" in worklist
            assert f"/series/{uid}/1" not in worklist, "superseded"
            assert session.get(f"{page}/2", timeout=10).ok
        assert [step.revision for step in trace(node.config, uid) if step.step == "closed"] == [1, 2]
        assert reconcile(node.config).unaccounted == 0


def test_in_shadow_mode_nothing_is_sent_but_it_is_recorded_what_would_have_been(
    tmp_path: Path, simulated: Path, sink: SmtpSink
) -> None:
    with whole_node(tmp_path / "node", sink.port, NOTIFIER__MODE="shadow") as node, node.running():
        node.wait_for_results(series_of(node.send(one_series(simulated, "positive"))))
        (page,) = until(node.pages, "the page is recorded")
        assert page.mode == "shadow"
        assert "Suspected intracranial haemorrhage" in page.body
        until(lambda: "shadow" in outcomes(node), "the delivery that was not made is recorded")
    assert sink.messages == []


def outcomes(node: WholeNode) -> list[str]:
    with node.ledger.read() as connection:
        return list(connection.execute(select(deliveries.c.outcome)).scalars())


def test_a_series_waits_for_a_model_server_that_is_down_and_is_triaged_when_it_is_back(
    tmp_path: Path, simulated: Path, sink: SmtpSink
) -> None:
    with whole_node(tmp_path / "node", sink.port) as node, node.running("receiver", "router", "notifier", "webui"):
        report = node.send(one_series(simulated, "positive"))
        until(lambda: published(node) == 1, "the receiver announces the series")
        fault = next(outcome for outcome in check(node.config) if outcome.what == "models")
        assert not fault.ok
        assert "herald run serving" in fault.detail
        assert node.results() == {}
        with node.running("serving"):
            found = node.wait_for_results(series_of(report))
        assert [row.disposition for row in found.values()] == ["positive"]
        assert sink.wait_for(1, timeout_s=60)


def published(node: WholeNode) -> int:
    with node.ledger.read() as connection:
        return len(connection.execute(select(series).where(series.c.published_at.is_not(None))).all())


class Refusing:
    """An SMTP server's answer to every message: no."""

    async def handle_DATA(self, server: object, session: object, envelope: object) -> str:  # noqa: N802
        return "554 5.7.1 no pages here"


def test_an_smtp_server_that_refuses_is_named_in_the_trace_and_the_result_is_on_the_worklist_all_the_same(
    tmp_path: Path, simulated: Path
) -> None:
    port = free_port()
    controller = Controller(Refusing(), hostname="127.0.0.1", port=port)
    controller.start()
    try:
        with whole_node(tmp_path / "node", port) as node, node.running():
            found = node.wait_for_results(series_of(node.send(one_series(simulated, "positive"))))
            (uid,) = found
            until(lambda: {page.state for page in node.pages()} <= {"failed", "exhausted"} and node.pages(), "given up")
            assert any("no pages here" in step.detail for step in trace(node.config, uid))
    finally:
        controller.stop()


def test_the_receiver_takes_series_while_the_broker_is_down_and_they_are_triaged_when_it_is_back(
    tmp_path: Path, simulated: Path, sink: SmtpSink
) -> None:
    with running_kafka(tmp_path / "kafka") as broker:
        url = f"kafka://{broker.servers}"
        with whole_node(tmp_path / "node", sink.port, BUS__URL=url) as node, node.running():
            first = node.send(one_series(simulated, "negative"))
            node.wait_for_results(series_of(first))
            broker.kill()
            report = node.send(one_series(simulated, "positive"))
            assert report.failed == ()
            until(lambda: closed(node) == 2, "the series is closed without a broker")
            assert published(node) == 1
            broker.start()
            found = node.wait_for_results(series_of(report), timeout_s=180)
            assert found[series_of(report)[0]].disposition == "positive"
            assert sink.wait_for(1, timeout_s=60)


def closed(node: WholeNode) -> int:
    with node.ledger.read() as connection:
        return len(connection.execute(select(series).where(series.c.closed_at.is_not(None))).all())


def test_bad_input_gets_a_named_reason_and_the_node_goes_on(tmp_path: Path, simulated: Path, sink: SmtpSink) -> None:
    bad = tmp_path / "bad"
    good = sorted(one_series(simulated, "negative").glob("*.dcm"))
    two_slices = changed(good[:2], bad / "two", "1.2.826.0.1.3680043.8.498.2")
    no_pixels = changed(good, bad / "none", "1.2.826.0.1.3680043.8.498.3", without="PixelData")
    (bad / "letter.txt").write_text("not DICOM", encoding="utf-8")
    with whole_node(tmp_path / "node", sink.port) as node, node.running():
        report = node.send(bad)
        assert [outcome.path.name for outcome in report.failed] == ["letter.txt"]
        found = node.wait_for_results([two_slices, no_pixels])
        assert found[two_slices].disposition == "not_eligible"
        assert "too few slices: 2" in found[two_slices].event["reasons"][0]
        assert found[no_pixels].disposition == "failed"
        assert "no PixelData" in found[no_pixels].event["reasons"][0]
        assert any("no PixelData" in step.detail for step in trace(node.config, no_pixels))
        after = node.send(one_series(simulated, "negative"))
        assert node.wait_for_results(series_of(after))[series_of(after)[0]].disposition == "negative"
        assert reconcile(node.config).unaccounted == 0


def changed(paths: list[Path], folder: Path, series_instance_uid: str, without: str = "") -> str:
    """Copies of instances as another series, optionally without one element; returns its UID."""
    folder.mkdir(parents=True)
    for number, path in enumerate(paths, start=1):
        ds = dcmread(path)
        ds.SeriesInstanceUID = series_instance_uid
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{series_instance_uid}.{number}"
        if without:
            del ds[without]
        ds.save_as(folder / path.name)
    return series_instance_uid
