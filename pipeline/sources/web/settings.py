"""How strangers' servers are asked, and what it is called when a link gave no picture."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

USER_AGENT = "Mozilla/5.0 (compatible; {token}/0.1; offline text-to-image data set builder)"

#: A site that turns away "img2dataset" by name means tools that read such lists: also this one.
KNOWN_AS = "img2dataset"


def listed(value: Any) -> Any:
    """A list as `--set` gives it: "noai,noindex"; "" is an empty one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class HttpSettings(BaseModel):
    """How strangers' servers are asked. Limits hold for each worker process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout: Annotated[float, Field(gt=0)] = 10  # seconds without a byte, connecting included
    deadline: Annotated[float, Field(gt=0)] = 60  # seconds for one link, tries and waits included
    retries: Annotated[int, Field(ge=0)] = 2  # tries more, after 429, 5xx, resets, timeouts
    max_bytes: Annotated[int, Field(gt=0)] = 30_000_000  # of one picture
    max_redirects: Annotated[int, Field(ge=0)] = 5  # of one link
    thread_count: Annotated[int, Field(ge=1)] = 256  # links under way (no threads: img2dataset's
    # name is kept)
    host_concurrency: Annotated[int, Field(ge=1)] = 8  # connections to one host
    host_rate: Annotated[float, Field(ge=0)] = 20  # requests to one host a second; 0: no limit
    host_failures: Annotated[int, Field(ge=0)] = 20  # in a row, then a shard gives it up; 0: never
    #: The name that sites may call this crawler by, in robots.txt and X-Robots-Tag.
    user_agent_token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "microdit"
    disallowed_header_directives: Annotated[tuple[str, ...], BeforeValidator(listed)] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
    )  # of X-Robots-Tag; empty: the header is not looked at
    robots: bool = True  # honour robots.txt
    allow_private_hosts: bool = False  # also ask loopback, private and metadata addresses

    def tokens(self) -> tuple[str, ...]:
        """The names that sites may call this crawler by."""
        return (self.user_agent_token, KNOWN_AS)

    def user_agent(self) -> str:
        return USER_AGENT.format(token=self.user_agent_token)


class FetchError(Exception):
    """A link that gave no picture: `reason` as rejects have it, the message says what happened.

    It never quotes a link: its query may hold a signature.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # A header's bytes that are no UTF-8 come as half surrogate pairs, which no parquet takes.
        super().__init__(detail.encode("utf-8", "backslashreplace").decode())
        self.reason = reason
