"""Results to the web UI: an idempotent HTTP PUT of every disposition, with a token."""

from urllib.parse import urlsplit

import requests

from herald.config import Config, required_secret
from herald.errors import ChannelRefused, ChannelUnavailable
from herald.events import SeriesTriaged

TIMEOUT_S = (3.0, 15.0)
"""To connect, and to wait for each part of the answer."""


class WebuiChannel:
    """The web UI's results; the same revision may be posted any number of times."""

    def __init__(self, config: Config) -> None:
        self.recipient = config.notifier.webui_url.rstrip("/")
        self._token = required_secret(config.webui.token, "webui.token")
        self._session = requests.Session()
        # an internal address: a proxy for the internet must not come between
        self._proxies = {"no_proxy": urlsplit(self.recipient).hostname or ""}

    def put(self, event: SeriesTriaged) -> None:
        """Return when the web UI has recorded the result (2xx).

        Raises ChannelUnavailable while it cannot be reached, is busy or fails (5xx), else ChannelRefused.
        """
        url = f"{self.recipient}/api/results/{event.series_instance_uid}/{event.revision}"
        try:
            response = self._session.put(
                url,
                data=event.to_json(),
                headers={"Content-Type": "application/json"},
                auth=self._authorize,
                timeout=TIMEOUT_S,
                proxies=self._proxies,
                allow_redirects=False,  # a redirect to a log-in page is no success
            )
        except ValueError as error:
            raise ChannelRefused(f"{url} is no URL: {error}; check notifier.webui_url") from error
        except requests.RequestException as error:
            raise ChannelUnavailable(
                f"the web UI {self.recipient} cannot be reached: {error}; "
                "check notifier.webui_url and that the web UI runs"
            ) from error
        if response.ok and response.status_code < 300:
            return
        said = f"the web UI {self.recipient} answered {response.status_code} {response.reason}"
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise ChannelUnavailable(f"{said}; it will be tried again")
        if response.status_code in (401, 403):
            raise ChannelRefused(f"{said}; webui.token must be the same for the notifier and the web UI")
        raise ChannelRefused(f"{said} to {url}: {response.text[:200].strip()}; check notifier.webui_url and versions")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As `auth`, not as a plain header, which a .netrc entry would replace."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request
