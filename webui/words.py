"""What the pages call things: labels of the models and of the ledger in a reader's words."""

from datetime import datetime

from herald.events import utc_now

FINDINGS = {
    "any": "Any haemorrhage",
    "iph": "Intraparenchymal",
    "ivh": "Intraventricular",
    "sah": "Subarachnoid",
    "edh_sdh": "Epidural or subdural",
}
HEADS = {"contrast": "Contrast agent", "orientation": "Orientation", "kernel": "Kernel", "region": "Region"}
LABELS = {
    "non_contrast": "without contrast",
    "contrast": "with contrast",
    "soft": "soft tissue",
    "bone": "bone",
    "other": "not a head",
}
DISPOSITIONS = {"positive": "Positive", "negative": "Negative", "not_eligible": "Not eligible", "failed": "Failed"}
ACTIONS = {"acknowledge": "acknowledged", "agree": "agreed", "disagree": "disagreed", "unsure": "unsure"}
PAGE_STATES = {
    "due": "due",
    "sent": "sent, not acknowledged",
    "acknowledged": "acknowledged",
    "escalated": "not acknowledged, next step taken",
    "exhausted": "nobody acknowledged",
    "withdrawn": "withdrawn",
    "failed": "could not be sent",
}


def percent(probability: float | None) -> str:
    """A probability as a whole percentage that never rounds to certainty."""
    if probability is None:
        return "–"
    if 0 < probability < 0.01:
        return "< 1 %"
    if 0.99 < probability < 1:
        return "> 99 %"
    return f"{round(probability * 100)} %"


def ago(time: datetime | None, now: datetime | None = None) -> str:
    """How long ago, in the largest unit that tells enough."""
    if time is None:
        return "–"
    seconds = max(0, int(((now or utc_now()) - time).total_seconds()))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} days"


def clock(time: datetime | None) -> str:
    """A time in UTC to the second."""
    return "–" if time is None else time.strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float | None) -> str:
    """A latency."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def now_iso() -> str:
    """Now, for a browser whose clock may be wrong."""
    return utc_now().isoformat()
