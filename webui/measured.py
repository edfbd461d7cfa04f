"""What Prometheus is told of the web UI's requests: names of endpoints, never paths, for these hold UIDs."""

import time

from flask import Flask, Response, g, request

from herald.metrics import WEBUI_LOG_INS_FAILED, WEBUI_REQUESTS, WEBUI_SECONDS, WEBUI_STREAMS

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}
LOG_INS = {"session.open_session", "oidc.finish"}
REFUSALS = (401, 403, 429)


def measure(app: Flask) -> None:
    """Count every request of the application, and the streams that are open."""
    app.before_request_funcs.setdefault(None, []).insert(0, _started)
    app.after_request(_answered)


def _started() -> None:
    g.started_at = time.perf_counter()


def _answered(response: Response) -> Response:
    endpoint = request.endpoint or "unknown"
    method = request.method if request.method in METHODS else "other"  # a client may name any
    WEBUI_REQUESTS.labels(endpoint, method, str(response.status_code)).inc()
    if "started_at" in g:
        WEBUI_SECONDS.labels(endpoint).observe(time.perf_counter() - g.started_at)
    if endpoint in LOG_INS and response.status_code in REFUSALS:
        WEBUI_LOG_INS_FAILED.inc()
    if response.mimetype == "text/event-stream":
        WEBUI_STREAMS.inc()
        response.call_on_close(WEBUI_STREAMS.dec)
    return response
