"""Which revisions of a series are listed: the newest, and an earlier one that nothing later may hide yet.

`results.superseded` keeps the answer, for the worklist and for whatever else writes results.
"""

from sqlalchemy import and_, exists, or_

from herald.ledger import results

ANALYSED = ("positive", "negative")

_newer = results.alias("newer")
_is_newer = and_(_newer.c.series_instance_uid == results.c.series_instance_uid, _newer.c.revision > results.c.revision)
_newer_analysed = _newer.c.disposition.in_(ANALYSED)
# what no failure may hide; in shadow mode a negative neither, or being listed would tell blind readers of a positive
_WAITS = and_(
    results.c.acknowledged_at.is_(None),
    results.c.disposition.in_(ANALYSED),
    or_(results.c.disposition == "positive", results.c.blind.is_not_distinct_from("shadow")),
)
SUPERSEDED = exists().where(_is_newer, or_(_newer_analysed, ~_WAITS))
"""Whether a later revision is listed in the place of a row of `results`."""
NEWEST_ANALYSED = and_(results.c.disposition.in_(ANALYSED), ~exists().where(_is_newer, _newer_analysed))
"""Whether a row is the newest of its series that was searched for haemorrhage."""
