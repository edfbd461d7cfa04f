"""Every instance is accounted for, or named with the reason; and what happened can be told step by step."""

import errno
import os
import re
import time
from dataclasses import replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from receiver_fakes import config_under, ct_series, receiving, send_all
from sqlalchemy import Table, delete, insert, select, update
from typer.testing import CliRunner

import herald.reconcile
from herald import cli
from herald.bus import open_bus
from herald.config import Config, LedgerConfig
from herald.errors import StoreError
from herald.events import Disposition, SeriesReceived, SeriesTriaged, utc_now
from herald.ledger import Ledger, deliveries, instances, metadata, open_ledger, pages, results, reviews, series
from herald.reconcile import GRACE_S, REBUILT, reconcile
from herald.store import file_sha256
from herald.trace import trace


def run(config: Config, *statements: object) -> None:
    ledger = open_ledger(config.ledger)
    with ledger.begin() as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[call-overload]
    ledger.close()


def rows(config: Config, table: Table) -> list[dict[str, object]]:
    ledger = open_ledger(config.ledger)
    with ledger.read() as connection:
        found = [dict(row) for row in connection.execute(select(table)).mappings()]
    ledger.close()
    return found


def received(config: Config, images: list[Dataset]) -> SeriesReceived:
    with receiving(config) as receiver:
        assert set(send_all(receiver.port, images)) == {0}
        return receiver.bus.wait_for(1)[0]


def triage(config: Config, event: SeriesReceived, disposition: Disposition = "negative") -> SeriesTriaged:
    """Record a result as the web UI does."""
    now = utc_now()
    triaged = SeriesTriaged(
        study_instance_uid=event.study_instance_uid,
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        occurred_at=now + timedelta(milliseconds=20),
        disposition=disposition,
        reasons=("not a head",) if disposition == "not_eligible" else (),
        started_at=now,
        classified_at=now + timedelta(milliseconds=10),
    )
    row = {
        "series_instance_uid": event.series_instance_uid,
        "revision": event.revision,
        "study_instance_uid": event.study_instance_uid,
        "accession_number": event.accession_number,
        "disposition": disposition,
        "event": {
            "reasons": list(triaged.reasons),
            "started_at": str(triaged.started_at),
            "classified_at": str(triaged.classified_at),
        },
        "triaged_at": triaged.occurred_at,
        "posted_at": now + timedelta(milliseconds=40),
    }
    run(config, insert(results).values(row))
    return triaged


def forget(config: Config) -> None:
    """Delete the ledger with all its tables."""
    ledger = Ledger(config.ledger)
    metadata.drop_all(ledger.engine)
    ledger.close()


def encoded(image: Dataset) -> bytes:
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def aged(config: Config) -> None:
    """Make every file so old that its row should be there, and its series still may be open."""
    then = time.time() - GRACE_S - 5.0
    for path in config.store.root.glob("*/*/*.dcm"):
        os.utime(path, (then, then))


@pytest.fixture
def config(tmp_path: Path, ledger_url: str) -> Config:
    return replace(config_under(tmp_path), ledger=LedgerConfig(url=ledger_url))


def test_an_empty_node_has_nothing_to_account_for(config: Config) -> None:
    found = reconcile(config)
    assert (found.instances_on_disk, found.instances_in_ledger, found.unaccounted, found.problems) == (0, 0, 0, ())


def test_every_instance_is_counted_under_its_disposition(config: Config) -> None:
    triage(config, received(config, ct_series(8)), "positive")
    triage(config, received(config, ct_series(9)), "not_eligible")
    received(config, ct_series(10))
    found = reconcile(config)
    assert found.dispositions == {"not_eligible": 9, "positive": 8}
    assert (found.waiting, found.unaccounted) == (10, 0), "the third series is still on its way"
    assert (found.instances_on_disk, found.instances_in_ledger, found.series_revisions) == (27, 27, 3)


def test_a_result_that_never_came_is_named_after_its_time(config: Config) -> None:
    event = received(config, ct_series(8))
    long_ago = utc_now() - timedelta(hours=1)
    run(config, update(series).values(published_at=long_ago))
    found = reconcile(config)
    assert found.unaccounted == 8
    assert found.problems == (
        f"series {event.series_instance_uid} revision 1 was published and has no disposition; "
        "see `herald trace` and `herald dead-letters` (8 instances)",
    )
    run(config, update(series).values(published_at=None, closed_at=utc_now()))
    assert reconcile(config).unaccounted == 0
    run(config, update(series).values(closed_at=None), update(instances).values(received_at=long_ago))
    assert "does the receiver run?" in reconcile(config).problems[0]


def test_a_late_image_that_no_revision_holds_is_named(config: Config) -> None:
    triage(config, received(config, ct_series(8)))
    (first, *_) = rows(config, instances)
    late = utc_now() + timedelta(seconds=5)
    run(config, update(instances).where(instances.c.path == first["path"]).values(received_at=late))
    found = reconcile(config)
    assert (found.dispositions, found.unaccounted) == ({"negative": 7}, 1)
    assert str(first["path"]) in found.problems[0]
    assert reconcile(config, rebuild=True).unaccounted == 0
    assert [(row["revision"], row["closed_at"] is None) for row in rows(config, series)] == [(1, False), (2, True)]


def test_a_file_that_is_gone_or_changed_is_named(config: Config) -> None:
    triage(config, received(config, ct_series(8)))
    gone, changed, *_ = sorted((config.store.root).glob("*/*/*.dcm"))
    gone.unlink()
    changed.write_bytes(b"short")
    found = reconcile(config)
    assert (found.unaccounted, found.dispositions) == (2, {"negative": 6})
    assert "is in the ledger and not on disk" in "\n".join(found.problems)
    assert "has 5 bytes" in "\n".join(found.problems)


def test_a_file_without_a_row_is_named_and_rebuild_restores_it(config: Config) -> None:
    event = received(config, ct_series(8))
    triage(config, event)
    run(config, delete(instances).where(instances.c.sop_instance_uid == rows(config, instances)[3]["sop_instance_uid"]))
    found = reconcile(config)
    assert (found.waiting, found.unaccounted, found.dispositions) == (1, 0, {"negative": 7}), "its row may follow"
    aged(config)
    found = reconcile(config)
    assert found.unaccounted == 1
    assert "run `herald reconcile --rebuild`" in found.problems[0]
    found = reconcile(config, rebuild=True)
    assert (found.unaccounted, found.dispositions) == (0, {"negative": 8}), "it was there when revision 1 was triaged"


def test_a_lost_ledger_is_rebuilt_from_the_files_and_its_series_are_triaged_again(config: Config) -> None:
    images = ct_series(10)
    event = received(config, images)
    before = {row["path"]: row for row in rows(config, instances)}
    run(config, delete(instances), delete(series))
    aged(config)
    assert reconcile(config).unaccounted == 10
    found = reconcile(config, rebuild=True)
    assert (found.instances_in_ledger, found.waiting, found.unaccounted) == (10, 10, 0)
    for row in rows(config, instances):
        old = before[row["path"]]
        same = ("sha256", "size_bytes", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "conflict")
        assert {key: row[key] for key in same} == {key: old[key] for key in same}
    with receiving(replace(config, receiver=replace(config.receiver, quiet_s=0.3))) as receiver:
        (again,) = receiver.bus.wait_for(1)
    assert (again.series_instance_uid, again.instance_count) == (event.series_instance_uid, 10)
    assert again.accession_number == "A-1"
    assert reconcile(config, rebuild=True) == reconcile(config)


def test_rebuild_keeps_what_was_triaged(config: Config) -> None:
    triage(config, received(config, ct_series(8)))
    run(config, delete(instances), delete(series))
    found = reconcile(config, rebuild=True)
    assert (found.dispositions, found.unaccounted) == ({"negative": 8}, 0)
    (row,) = rows(config, series)
    assert (row["revision"], row["close_reason"]) == (1, REBUILT)


def test_a_file_in_the_store_that_is_no_dicom_is_named_and_left_alone(config: Config) -> None:
    received(config, ct_series(8))
    stray = next(config.store.root.glob("*/*")) / "9.9.dcm"
    stray.write_text("notes of somebody")
    aged(config)
    found = reconcile(config, rebuild=True)
    assert found.unaccounted == 1
    assert "9.9.dcm" in found.problems[0]
    assert stray.exists()


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the folder of this name be unreadable, for root too."""
    list_names, status = os.listdir, os.stat

    def refuse(path: Path | str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def listdir(folder: Path | str) -> list[str]:
        if Path(folder).name == name:
            refuse(folder)
        return list_names(folder)

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, Path) and name in path.parent.parts:
            refuse(path)
        return status(path, *args, **kwargs)

    monkeypatch.setattr("os.listdir", listdir)  # which Path.iterdir asks
    monkeypatch.setattr("os.stat", stat)


def test_a_folder_of_the_disk_beside_the_studies_is_passed_over(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triage(config, received(config, ct_series(8)))
    (config.store.root / "lost+found").mkdir(mode=0o700)
    deny(monkeypatch, "lost+found")
    found = reconcile(config, rebuild=True)
    assert (found.dispositions, found.unaccounted) == ({"negative": 8}, 0)
    assert "lost+found" not in caplog.text


def test_an_unreadable_study_costs_no_other_its_recovery_and_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable, other = received(config, ct_series(8)), received(config, ct_series(9))
    run(config, delete(instances), delete(series))
    deny(monkeypatch, unreadable.study_instance_uid)
    with receiving(replace(config, receiver=replace(config.receiver, quiet_s=0.3))) as receiver:
        (again,) = receiver.bus.wait_for(1)
    assert (again.series_instance_uid, again.instance_count) == (other.series_instance_uid, 9)
    (named,) = [r.getMessage() for r in caplog.records if unreadable.study_instance_uid in r.getMessage()]
    assert "Permission denied; check the disk and the rights on store.root" in named


@pytest.mark.parametrize("denied", ["study", "series"])
def test_reconcile_names_a_folder_that_it_cannot_read_and_accounts_for_every_other_file(
    config: Config, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    unreadable, other = received(config, ct_series(8)), received(config, ct_series(9))
    for event in (unreadable, other):
        triage(config, event)
    name = getattr(unreadable, f"{denied}_instance_uid")
    deny(monkeypatch, name)
    for rebuild in (False, True):
        found = reconcile(config, rebuild=rebuild, verify=True)
        assert (found.instances_on_disk, found.dispositions) == (9, {"negative": 9})
        assert (found.unaccounted, found.unreadable) == (8, 1)
        (told,) = found.problems
        assert re.fullmatch(rf"cannot read \S+/{name}: Permission denied; .* store\.root \(8 instances\)", told)


def test_the_command_names_a_folder_that_cannot_be_read_and_fails_though_no_row_is_about_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    triage(config, received(config, ct_series(8)))
    (config.store.root / "1.2.3").mkdir()
    deny(monkeypatch, "1.2.3")
    found = reconcile(config)
    assert (found.dispositions, found.unaccounted, found.unreadable) == ({"negative": 8}, 0, 1)
    assert "1.2.3: Permission denied" in found.problems[0]
    monkeypatch.setattr(cli, "_config", lambda: config)
    answer = CliRunner().invoke(cli.app, ["reconcile"])
    assert answer.exit_code == 1
    assert "1.2.3: Permission denied" in answer.stderr
    assert "1 folders or files of the store cannot be read" in answer.stderr


def test_reconcile_of_a_file_that_cannot_be_read_names_it_and_accounts_for_every_other(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    triage(config, received(config, ct_series(8)))
    broken = min(config.store.root.glob("*/*/*.dcm"))

    def sha256(path: Path) -> str:
        if path == broken:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return file_sha256(path)

    monkeypatch.setattr(herald.reconcile, "file_sha256", sha256)
    found = reconcile(config, verify=True)
    assert (found.dispositions, found.unaccounted, found.unreadable) == ({"negative": 7}, 1, 1)
    assert f"{broken}: Input/output error" in found.problems[0]


def test_a_store_that_cannot_be_read_at_all_is_refused_and_not_accounted_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    triage(config, received(config, ct_series(8)))
    deny(monkeypatch, config.store.root.name)
    with pytest.raises(StoreError, match=r"store\.root"):
        reconcile(config)


def test_what_retention_has_removed_is_accounted_for(config: Config) -> None:
    triage(config, received(config, ct_series(8)))
    gone, back, *_ = sorted(config.store.root.glob("*/*/*.dcm"))
    gone.unlink()
    removed = instances.c.path.in_([path.relative_to(config.store.root).as_posix() for path in (gone, back)])
    run(config, update(instances).where(removed).values(removed_at=utc_now()))
    found = reconcile(config)
    assert (found.removed, found.waiting, found.unaccounted) == (1, 1, 0), "the one that is back is being recorded"
    aged(config)
    found = reconcile(config)
    assert (found.removed, found.unaccounted, found.dispositions) == (1, 1, {"negative": 6})
    assert "the ledger says it was removed; run `herald reconcile --rebuild`" in found.problems[0]
    found = reconcile(config, rebuild=True)
    assert (found.removed, found.unaccounted, found.dispositions) == (1, 0, {"negative": 7})


def test_what_happens_between_looking_at_the_files_and_at_the_ledger_is_no_loss(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    triage(config, received(config, ct_series(8)))
    placed, removed, noted, *_ = sorted(config.store.root.glob("*/*/*.dcm"))
    sizes = {path.relative_to(config.store.root).as_posix(): path.stat().st_size for path in (removed, noted)}
    listed = dict(herald.reconcile._instance_files(config.store.root, unreadable=lambda *_: None))
    del listed[placed.relative_to(config.store.root).as_posix()]

    def before(*_: object) -> list[tuple[str, int]]:
        return [*listed.items()]

    removed.unlink()
    noted.unlink()
    run(config, update(instances).where(instances.c.path.in_(sizes)).values(removed_at=utc_now()))
    monkeypatch.setattr(herald.reconcile, "_instance_files", before)
    found = reconcile(config)
    assert (found.instances_on_disk, found.removed, found.unaccounted) == (6, 2, 0)
    assert found.dispositions == {"negative": 6}


def test_verify_finds_a_changed_byte_and_says_how_far_it_is(config: Config) -> None:
    triage(config, received(config, ct_series(8)))
    changed = min(config.store.root.glob("*/*/*.dcm"))
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert reconcile(config).unaccounted == 0, "its size is right"
    progress: list[tuple[int, int]] = []
    found = reconcile(config, verify=True, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(done, 8) for done in range(1, 9)]
    assert (found.unaccounted, found.dispositions) == (1, {"negative": 7})
    assert f"{changed.name} has other bytes than were received" in found.problems[0]


def test_a_deleted_ledger_is_rebuilt_row_by_row_from_the_files(config: Config) -> None:
    images = ct_series(8)
    other = ct_series(9, StationName=None, Modality="MR")
    event = received(config, images)
    received(config, other)
    changed = dcmread(BytesIO(encoded(images[3])))
    changed.PixelData = bytes(reversed(images[3].PixelData))
    received(config, [changed])  # other bytes under the same UID: both are kept
    triage(config, event)
    before = {str(row["path"]): row for row in rows(config, instances)}
    series_before = {str(row["series_instance_uid"]): row for row in rows(config, series)}  # the newest revisions
    conflicting = [path for path, row in before.items() if row["conflict"]]
    assert [re.fullmatch(r".*/[0-9.]+\.[0-9a-f]{16}\.dcm", path) is not None for path in conflicting] == [True]

    forget(config)
    found = reconcile(config, rebuild=True)
    assert (found.instances_on_disk, found.instances_in_ledger, found.waiting, found.unaccounted) == (18, 18, 18, 0)

    after = {str(row["path"]): row for row in rows(config, instances)}
    assert after.keys() == before.keys()
    for path, row in after.items():
        known = {name: value for name, value in before[path].items() if name not in ("calling_address", "received_at")}
        assert {name: row[name] for name in known} == known
        assert row["calling_address"] == "", "no file says it"
        assert abs(row["received_at"] - before[path]["received_at"]) < timedelta(seconds=1)  # type: ignore[operator]
    series_after = {str(row["series_instance_uid"]): row for row in rows(config, series)}
    assert series_after.keys() == series_before.keys()
    for uid, row in series_after.items():
        assert (row["revision"], row["closed_at"], row["published_at"]) == (1, None, None), "it is triaged again"
        for name in ("study_instance_uid", "accession_number", "modality", "scanner", "calling_ae_title"):
            assert row[name] == series_before[uid][name], name
        assert row["instance_count"] == series_before[uid]["instance_count"]


def test_of_a_lost_ledger_a_revision_that_has_a_prediction_is_not_made_again(config: Config) -> None:
    event = received(config, ct_series(8))
    folder = config.store.root / event.study_instance_uid / event.series_instance_uid / "predictions"
    folder.mkdir()
    (folder / "3.npz").write_bytes(b"what the model saw")
    forget(config)
    reconcile(config, rebuild=True)
    assert [(row["revision"], row["closed_at"]) for row in rows(config, series)] == [(4, None)]


def test_20_000_instances_are_accounted_for_within_seconds(tmp_path: Path) -> None:
    config = config_under(tmp_path)
    ledger = open_ledger(config.ledger)
    now = utc_now() - timedelta(hours=1)
    with ledger.begin() as connection:
        for number in range(40):
            study, uid = f"1.2.{number}", f"1.2.{number}.1"
            folder = config.store.root / study / uid
            folder.mkdir(parents=True)
            content = [_synthetic(study, uid, folder, f"{uid}.{image}", now) for image in range(500)]
            connection.execute(insert(instances), content)
            known = {"study_instance_uid": study, "series_instance_uid": uid, "revision": 1}
            at = {"first_image_at": now, "last_image_at": now, "closed_at": now, "published_at": now}
            connection.execute(insert(series).values(**known, **at, instance_count=500))
            done = {"disposition": "negative", "event": {}, "triaged_at": now, "posted_at": now}
            connection.execute(insert(results).values(**known, **done))
    ledger.close()
    started = time.perf_counter()
    found = reconcile(config)
    took_s = time.perf_counter() - started
    assert (found.dispositions, found.unaccounted) == ({"negative": 20_000}, 0)
    assert took_s < 10.0, "100,000 take 2.4 s on a quiet machine"


def _synthetic(study: str, uid: str, folder: Path, sop_instance_uid: str, at: datetime) -> dict[str, object]:
    (folder / f"{sop_instance_uid}.dcm").write_bytes(b"0123456789")
    return {
        "path": f"{study}/{uid}/{sop_instance_uid}.dcm",
        "sop_instance_uid": sop_instance_uid,
        "series_instance_uid": uid,
        "study_instance_uid": study,
        "sop_class_uid": "1.2",
        "transfer_syntax_uid": "1.2",
        "sha256": "0" * 64,
        "size_bytes": 10,
        "calling_ae_title": "CT1",
        "calling_address": "10.0.0.1",
        "received_at": at,
    }


# --- trace ---


def test_the_steps_of_a_series_are_told_in_order_with_their_latency(config: Config) -> None:
    event = received(config, ct_series(8))
    triage(config, event, "not_eligible")
    now = utc_now() + timedelta(seconds=1)
    common = {
        "study_instance_uid": event.study_instance_uid,
        "series_instance_uid": event.series_instance_uid,
        "revision": 1,
    }
    page = {
        "page_id": "p",
        "step": 0,
        "state": "acknowledged",
        "mode": "live",
        "channel": "smtp",
        "recipient": "oncall@hospital.example",
        "subject": "s",
        "body": "b",
        "finding_at": now,
        "due_at": now,
        "sent_at": now + timedelta(seconds=1),
        "acknowledged_at": now + timedelta(seconds=61),
        "acknowledged_by": "reader",
        **common,
    }
    sent = {
        "occurred_at": now + timedelta(seconds=1),
        "series_instance_uid": event.series_instance_uid,
        "revision": 1,
        "page_id": "p",
        "channel": "smtp",
        "recipient": "oncall@hospital.example",
        "outcome": "sent",
    }
    review = {
        "review_id": "r",
        "action": "agree",
        "reader": "reader",
        "prediction_shown": True,
        "occurred_at": now + timedelta(seconds=61),
        "undone_at": now + timedelta(seconds=70),
        **common,
    }
    run(config, insert(pages).values(page), insert(deliveries).values(sent), insert(reviews).values(review))

    steps = trace(config, event.series_instance_uid)
    names = [step.step for step in steps]
    assert names[:2] == ["first image", "last image"]
    assert [name for name in names if name in ("closed", "published", "disposition", "on the worklist")] == [
        "closed",
        "published",
        "disposition",
        "on the worklist",
    ]
    assert {"taken up by the router", "classified", "page due", "page sent", "delivery"} <= set(names)
    assert names.index("review") < names.index("review undone")
    assert [step.at for step in steps] == sorted(step.at for step in steps)
    assert steps[0].after_s is None
    assert steps[names.index("page acknowledged")].after_s is not None
    assert sum(step.after_s or 0 for step in steps) == pytest.approx((steps[-1].at - steps[0].at).total_seconds())
    assert "not a head" in steps[names.index("disposition")].detail
    sop_instance_uid = str(rows(config, instances)[0]["sop_instance_uid"])
    for other in ("A-1", event.study_instance_uid, sop_instance_uid):
        assert trace(config, other) == steps


def test_dead_letters_and_refusals_are_part_of_the_trace(config: Config) -> None:
    event = received(config, ct_series(8))
    bus = open_bus(config.bus)
    bus.publish(event)
    delivery = bus.fetch("router", ("series",), timeout_s=5.0)
    assert delivery is not None
    bus.dead_letter(delivery, "ServingError: the model is broken", "traceback")
    bus.close()
    with receiving(config) as receiver:
        bad = ct_series(1, StudyInstanceUID=None)
        assert send_all(receiver.port, bad) == [0xC001]
    (dead,) = [step for step in trace(config, event.series_instance_uid) if step.step == "dead letter"]
    assert "ServingError: the model is broken" in dead.detail
    (refused,) = trace(config, str(bad[0].SOPInstanceUID))
    assert refused.step == "refused"
    assert "0xC001" in refused.detail


def test_a_late_image_shows_as_a_second_revision(config: Config) -> None:
    images = ct_series(9)
    received(config, images[:8])
    event = received(config, images[8:])
    details = {step.step: step.detail for step in trace(config, event.series_instance_uid)}
    assert details["opened again"] == "late images make revision 2"
    assert details["closed"].startswith("revision 2: 9 instances, released-and-even")


def test_of_what_is_unknown_nothing_is_told(config: Config) -> None:
    assert trace(config, "1.2.3.4.5") == []
