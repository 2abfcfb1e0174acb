"""Where the server is, as whom it is asked, and how patiently."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from captioning.captioner import BadSetting, Settings

KEY_VARIABLE = "MICRODIT_ENDPOINT_KEY"  # the only place a key is taken from


@dataclass(frozen=True)
class EndpointSettings(Settings):
    """Beside what all captioners are told: where the server is, and how to treat it.

    A key comes from $MICRODIT_ENDPOINT_KEY alone. Of these settings `model`, `revision` and
    `tokenizer` decide what is written.
    """

    url: str = "http://127.0.0.1:8000/v1"  # of the API, with its version
    model: str = ""  # by the name under which the server has it
    revision: str = ""  # yours to change when the server's weights do: captions become stale
    tokenizer: str = ""  # folder or cached hub id: counts tokens where the server does not
    concurrency: int = 32  # requests at once, of one worker
    timeout_s: float = 120.0  # of one request, in all
    retries: int = 10  # with the back-off below, about four minutes without a server
    backoff_s: float = 1.0  # before the first retry; doubles up to a minute

    def __post_init__(self) -> None:
        super().__post_init__()
        completions_url(self.url)
        if not self.model.strip():
            raise BadSetting(
                "model: empty; give the name under which the server has it, e.g. "
                "llava-hf/llava-1.5-7b-hf"
            )
        if self.concurrency < 1:
            raise BadSetting(f"concurrency={self.concurrency}: use 1 or more")
        if not 0 < self.timeout_s < float("inf"):
            raise BadSetting(f"timeout_s={self.timeout_s}: use seconds, more than 0")
        if self.retries < 0:
            raise BadSetting(f"retries={self.retries}: use 0 or more")
        if not 0 < self.backoff_s < float("inf"):
            raise BadSetting(f"backoff_s={self.backoff_s}: use seconds, more than 0")
        for prompt in self.prompts:
            if prompt.raw:
                raise BadSetting(
                    f"prompt={prompt.text[:60]!r}: has a slot, but the server puts the picture "
                    "where its model wants it; give the question alone"
                )

    def decisive(self) -> dict[str, Any]:
        return {**super().decisive(), "model": self.model, "tokenizer": self.tokenizer}


def completions_url(url: str) -> str:
    """ "http://host:8000", ".../v1" or ".../v1/chat/completions", as the last of them.

    Raises:
        BadSetting: it is no http address, or it holds what messages would give away.
    """
    example = "e.g. http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:  # which may quote what was to be a password
        raise BadSetting(f"url: no address: its host or port cannot be read; {example}") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise BadSetting(
            f"url=…{host or ''}…: a user, a password, a query or a fragment in it would end up in "
            f"logs; put the key into ${KEY_VARIABLE} and give the plain address, {example}"
        )
    if parts.scheme not in ("http", "https") or not host:
        shown = "…" if "@" in url else url  # "user:password@host" without its http://
        raise BadSetting(f"url={shown}: no http or https address; {example}")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


def read_key() -> str:
    """The key, or "": for the Authorization header and nothing else.

    Raises:
        BadSetting: it cannot stand in a header.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise BadSetting(f"${KEY_VARIABLE}: no key: it has characters that no header can hold")
    return key
