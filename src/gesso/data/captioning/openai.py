"""Captions by any server that speaks OpenAI's chat completions: the company's own, vLLM, llama.cpp, Ollama, ..."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from gesso.data.captioning.plugins import Settings
from gesso.errors import ResourceError, UserError

_MODEL = "gpt-4o-mini"
_PROMPT = "Describe this picture in one sentence, as a caption for training an image model. Answer with it alone."
_SIDE = 1024
"""Longest side of what is sent: larger pictures cost more and are made smaller by the servers anyway."""
_LONGEST_WAIT = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Endpoint:
    """Requests to one server, `batch_size` at a time; refused and failed ones are tried again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        base = settings.endpoint.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        parts = urlsplit(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("not an address", where="--endpoint", fix="use a URL such as http://localhost:8000/v1")
        self._headers = {"Content-Type": "application/json"}
        key = os.environ.get(settings.key_env or "OPENAI_API_KEY", "")
        if settings.key_env is not None and not key:
            raise UserError(f"{settings.key_env} is not set", where="--key-env", fix="put the key there")
        if not key and parts.hostname == "api.openai.com":
            raise UserError("there is no key", where=self._url, fix="put it in the environment as OPENAI_API_KEY")
        # A key of OpenAI's goes to no other server unless it was named for it.
        if key and (settings.key_env is not None or parts.hostname == "api.openai.com"):
            if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
                raise UserError("the key would go over the net unencrypted", where=self._url, fix="use https")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        """All of them at once."""
        with ThreadPoolExecutor(max(len(pictures), 1)) as threads:
            return list(threads.map(self._one, pictures))

    def _one(self, picture: Image.Image) -> str | UserError:
        body = json.dumps(self._request(picture)).encode()
        wait, reason = self._settings.backoff, ""
        for attempt in range(self._settings.retries + 1):
            request = urllib.request.Request(self._url, data=body, headers=self._headers)
            try:
                with self._opener.open(request, timeout=self._settings.timeout) as answer:
                    return _content(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"the server answered {error.code}{_told(error)}"
                if error.code in (400, 413, 415, 422):
                    return UserError(reason)
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ResourceError(reason, where=self._url, fix="check the address, the key and --model") from None
                pause = _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(cause, ConnectionRefusedError):
                    raise ResourceError("nobody answers there", where=self._url, fix="start the server") from None
                reason, pause = f"no answer: {cause or type(error).__name__}", None
            if attempt < self._settings.retries:
                time.sleep(min(wait if pause is None else pause, _LONGEST_WAIT))
                wait *= 2
        return UserError(f"{reason}, after {self._settings.retries + 1} attempts", fix="run the command again later")

    def _request(self, picture: Image.Image) -> dict[str, Any]:
        small = picture.copy()
        small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=92)
        data = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "text", "text": self._settings.prompt or _PROMPT},
            {"type": "image_url", "image_url": {"url": data}},
        ]
        return {
            "model": self._settings.model or _MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._settings.max_tokens,
        }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another server: it is an error instead."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _content(data: bytes) -> str | UserError:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return UserError(f"the server's answer is not understood: {data[:80]!r}")
    return content if isinstance(content, str) else UserError(f"the server's answer holds no text: {content!r}")


def _told(error: urllib.error.HTTPError) -> str:
    try:
        message = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f": {str(message)[:200]}"


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None
