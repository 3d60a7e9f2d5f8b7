"""Parts of files on web servers, as much of a file system as shards need.

fsspec's own needs aiohttp and a thread with an event loop, which does not survive the fork of a loader's worker.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from typing import Any

TRIES = 4  # at a part of a shard, in the middle of a run
FEW_TRIES = 2  # at what is asked before a run: a mistyped address should not take long to say
PATIENCE = 60.0  # seconds for one answer


class Http:
    """The few methods of an fsspec file system that `store` calls. Raises OSError."""

    def cat_file(self, place: str, start: int | None = None, end: int | None = None) -> bytes:
        headers = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        response = _answer(place, "GET", headers, TRIES if headers else FEW_TRIES)
        with response:
            if headers and response.status != 206:
                raise OSError(f"{place}: the server sends whole files only, so no part can be read by itself: dataset.streaming=true")
            return response.read()

    def info(self, place: str) -> dict[str, Any]:
        with _answer(place, "HEAD", {}) as response:
            size = response.headers.get("Content-Length")
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            return {"size": int(size) if size else None, "ETag": tag}

    def exists(self, place: str) -> bool:
        try:
            _answer(place, "HEAD", {}).close()
        except FileNotFoundError:
            return False
        return True

    def open(self, place: str) -> Any:
        """The file from its beginning, to be read to its end."""
        return _answer(place, "GET", {}, TRIES)


def _answer(place: str, method: str, headers: dict[str, str], tries: int = FEW_TRIES) -> http.client.HTTPResponse:
    """The server's answer; tried again after a while where the trouble may pass."""
    failure = OSError(place)
    for tried in range(tries):
        try:
            return urllib.request.urlopen(urllib.request.Request(place, method=method, headers=headers), timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"{place}: not found (HTTP {error.code})") from None
            if error.code == 416:  # asked for bytes behind the end
                raise OSError(f"{place}: is shorter than it should be (HTTP 416)") from None
            failure = OSError(f"{place}: HTTP {error.code} {error.reason}")
            if error.code < 500 and error.code not in (408, 429):
                raise failure from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            failure = OSError(f"{place}: {getattr(error, 'reason', error)}")
        if tried + 1 < tries:
            time.sleep(0.2 * 4**tried)
    raise failure
