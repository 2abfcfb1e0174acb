"""What sources with a fixed layout share: where it lies upstream, and which commit is meant."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator

from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.store import Store
from pipeline.sources.files import hub


class Hosted(BaseModel):
    """A source whose files have fixed names below `base`.

    A branch of the hub stands for the commit that it had when the source was first planned under
    this root; that is written down beside the shards, so that what upstream adds later makes
    nothing stale. To move on, name a commit: `base: hf://datasets/OWNER/NAME@COMMIT`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str  # hf://datasets/OWNER/NAME[@REVISION], or a folder or URL with a copy of its files

    _commits: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("base")
    @classmethod
    def _no_secrets(cls, base: str) -> str:
        link = base.startswith(("http://", "https://"))  # elsewhere ? is a letter of a name
        if (link and "?" in base) or re.search(r"//[^/]*@", base.replace("hf://datasets/", "")):
            raise ValueError("must hold no user, password or query: it is kept with every shard")
        return located(base.rstrip("/"))

    def attach(self, store: Store, folder: str) -> None:
        """Settles which commit each hub dataset is read at; asks the hub the first time only."""
        for base in self.bases():
            if base.startswith("hf://") and base not in self._commits:
                self._commits[base] = _commit(store, f"{folder}/revisions.json", base)

    def bases(self) -> list[str]:
        """Every place that files come from."""
        return [self.base]

    def url(self, path: str, base: str = "") -> str:
        """Where transfer.local finds a file of the layout."""
        base = base or self.base
        if not base.startswith("hf://"):
            return f"{base}/{path}"
        address = hub.parse(base)
        inner = f"{address.path}/{path}".lstrip("/")
        return hub.address(address.repo, self._commits.get(base, address.revision), inner)

    def decisive(self) -> dict[str, Any]:
        """The hub's commits: a copy elsewhere holds the same bytes, or is another source."""
        found = {
            hub.parse(base).repo: self._commits.get(base, "")
            for base in self.bases()
            if base.startswith("hf://")
        }
        return {"hub": found} if found else {}


def _commit(store: Store, path: str, base: str) -> str:
    address = hub.parse(base)
    if hub.COMMIT.fullmatch(address.revision):
        return address.revision
    name = f"{address.repo}@{address.revision}"
    try:
        known = store.read_json(path)
    except FileNotFoundError:
        known = {}
    except ValueError:
        raise SettingError(
            f"{store.url(path)}: is no JSON; delete it, and it is made anew"
        ) from None
    if name not in known:
        known[name] = hub.commit(address.repo, address.revision)
        store.write_json(path, known)
    return known[name]
