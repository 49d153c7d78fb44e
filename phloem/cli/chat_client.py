"""A small streaming client of `/v1/chat/completions`, on the standard library: for `chat` and `up`."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from phloem.shared.errors import PhloemError, unavailable

UNREACHABLE = "gateway_unreachable"
_DONE = "[DONE]"


class ChatClient:
    """Talks to one gateway; every call opens a connection of its own. Blocking: not for an event loop.

    `timeout_s` bounds the silence on a connection. All methods raise `PhloemError`: `gateway_unreachable`
    (retryable) when there is no connection, else what the gateway answered.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._parts = _checked_url(self.url)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def models(self) -> list[str]:
        """Ids of the models that are served."""
        connection, response = self._request("GET", "/v1/models", None)
        try:
            return [str(model["id"]) for model in json.loads(response.read())["data"]]
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise PhloemError("bad_answer", f"{self.url} is not an OpenAI-compatible server") from error
        finally:
            connection.close()

    def is_healthy(self) -> bool:
        """Whether `/health` answers."""
        try:
            connection, _ = self._request("GET", "/health", None)
        except PhloemError:
            return False
        connection.close()
        return True

    def stream(self, model: str, messages: list[dict[str, str]], **options: float) -> Iterator[str]:
        """Yields pieces of the answer's text as they arrive; closing the iterator ends the request."""
        body = {"model": model, "messages": messages, "stream": True, **options}
        connection, response = self._request("POST", "/v1/chat/completions", json.dumps(body))
        try:
            for event in _events(response, self.url):
                for choice in event.get("choices", ()):
                    text = choice.get("delta", {}).get("content")
                    if text:
                        yield text
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: str | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends and returns once the head of a 200 has come; the caller closes the connection."""
        connection = self._connection()
        headers = {**self._headers, "content-type": "application/json"} if body else self._headers
        try:
            connection.request(method, self._parts.path + path, body, headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            raise _error_of(response)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        except BaseException:
            connection.close()
            raise

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout_s)

    def _unreachable(self, error: Exception) -> PhloemError:
        return unavailable(f"no answer from {self.url}: {error}", code=UNREACHABLE)


def _checked_url(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PhloemError("invalid_url", f"{url!r} is not an http:// or https:// URL", http_status=400)
    return parts


# Any: events are JSON whose fields are read one by one, missing ones allowed.
def _events(response: http.client.HTTPResponse, url: str) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event up to [DONE]. Raises what an error event says."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip().decode()
        if data == _DONE:
            return
        event = json.loads(data)
        if "error" in event:
            raise _error_from_json(event, 500)
        yield event
    raise PhloemError("stream_broken", f"the stream from {url} ended without [DONE]", retryable=True)


def _error_of(response: http.client.HTTPResponse) -> PhloemError:
    try:
        return _error_from_json(json.loads(response.read(65536)), response.status)
    except ValueError:
        return PhloemError("http_error", f"HTTP {response.status} {response.reason}")


def _error_from_json(body: Any, status: int) -> PhloemError:
    """From OpenAI's error shape."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return PhloemError("http_error", f"HTTP {status}", retryable=status == 503)
    return PhloemError(
        str(error.get("code") or error.get("type") or "http_error"),
        str(error.get("message") or f"HTTP {status}"),
        retryable=status in (429, 503),
        http_status=status,
    )
