"""Which site a series came from, and whether pages of that site are sent."""

from typing import Literal

from herald.config import Config
from herald.events import SeriesTriaged

Mode = Literal["shadow", "live"]


def site_of(event: SeriesTriaged, config: Config) -> str:
    """Name of the site that sent the series, by calling AE title or scanner; "" when it is of none."""
    for site in config.notifier.sites:
        if event.calling_ae_title.strip() in site.calling_ae_titles or event.scanner.strip() in site.scanners:
            return site.name
    return ""


def mode_of(site: str, config: Config) -> Mode:
    """Whether pages of a site are sent; of no site, or of one that is gone, as `notifier.mode` says."""
    for known in config.notifier.sites:
        if known.name == site and known.mode:
            return known.mode
    return config.notifier.mode
