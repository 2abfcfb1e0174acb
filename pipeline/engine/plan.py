"""What a run will do, from the commit records alone: done, left, stale, failing, and the bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core import facts, failures
from pipeline.core.catalog import Catalog, Head
from pipeline.core.commits import differences
from pipeline.core.errors import SettingError
from pipeline.core.samples import FAILED
from pipeline.core.stage import Job, Stage
from pipeline.core.store import Store, fingerprint, size


@dataclass(frozen=True)
class Choice:
    """Which shards a run is to do."""

    shards: str = ""  # "00000-00031,00100"; "" is all
    stale: bool = False  # also those made from other inputs
    force: bool = False  # all of them, made or not
    fraction: float | None = None  # this share of the shards
    limit: int | None = None  # the first shards, to about as many samples
    retry_failed: bool = False  # also those with samples that failed to download

    def again(self) -> bool:
        """Whether shards are made although they are there as they should be."""
        return self.force or self.retry_failed

    def matcher(self) -> Callable[[Job], bool]:
        """Whether a job is chosen; to be asked of each, in order.

        Raises:
            SettingError: not a list of ids and ranges, a fraction not in (0, 1], a limit below 1,
                or options that exclude each other.
        """
        if self.force and self.retry_failed:
            raise SettingError(
                "--force --retry-failed: the one fetches everything again, the other only what "
                "failed; give one of them"
            )
        tests: list[Callable[[Job], bool]] = []
        if self.shards:
            ranges = [_range(part.strip(), self.shards) for part in self.shards.split(",")]
            tests.append(lambda job: any(a <= _order(job.shard.id) <= b for a, b in ranges))
        if self.fraction is not None:
            if not 0 < self.fraction <= 1:
                raise SettingError(f"--fraction {self.fraction}: write a share, e.g. 0.01")
            share = self.fraction
            # By the id alone: the shards of 0.01 are among those of 0.1.
            tests.append(lambda job: _place(job.shard.id) < share)
        if self.limit is not None:
            if self.limit < 1:
                raise SettingError(f"--limit {self.limit}: at least 1")
            tests.append(_Limit(self.limit))
        return lambda job: all(test(job) for test in tests)


class _Limit:
    """Takes jobs until those before hold enough samples."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def __call__(self, job: Job) -> bool:
        chosen = self.left > 0
        self.left -= job.samples
        return chosen


@dataclass
class GroupPlan:
    """One output group of a stage, against what the stage would make now."""

    done: int = 0
    left: int = 0
    stale: Counter[str] = field(default_factory=Counter)  # why -> shards
    failing: dict[str, str] = field(default_factory=dict)  # shard -> why, of those left
    shards: int = 0  # that are there, stale ones included; so too the counts below
    splits: Counter[str] = field(default_factory=Counter)  # split -> samples
    rejects: Counter[str] = field(default_factory=Counter)  # reason -> samples
    bytes: int = 0


@dataclass
class Plan:
    """Counts and names only: its memory does not grow with what a job holds."""

    groups: dict[str, GroupPlan] = field(default_factory=dict)
    pending: dict[str, tuple[str, ...]] = field(default_factory=dict)  # shard -> groups to make
    done: int = 0  # shards with nothing to do
    outdated: int = 0  # shards made from other inputs, which are left as they are
    need_bytes: int = 0  # what the pending shards will take
    clashes: list[str] = field(default_factory=list)  # groups that would mix what may not be mixed

    @property
    def stale(self) -> Counter[str]:
        return sum((group.stale for group in self.groups.values()), Counter[str]())

    def jobs(self, stage: Stage, catalog: Catalog) -> Iterator[Job]:
        """The pending jobs, made one at a time as they are asked for."""
        left = dict(self.pending)
        for job in stage.plan(catalog) if left else ():
            wanted = left.pop(job.shard.id, ())
            if wanted:
                yield replace(job, groups={g: i for g, i in job.groups.items() if g in wanted})
            if not left:
                return


def plan(stage: Stage, catalog: Catalog, choice: Choice = Choice()) -> Plan:
    """Compares what the stage would make with what is committed.

    Raises:
        SettingError: --shards names a shard that is not there.
    """
    chosen = choice.matcher()
    result = Plan({group: summarise(catalog, group) for group in stage.groups()})
    outdated: dict[str, dict[str, dict[str, Any]]] = {}
    names: dict[tuple[str, ...], tuple[str, ...]] = {}  # shared: many shards, few combinations
    wants: dict[str, str] = {}  # group -> the facts of what would be made: the same for all shards
    matched = total = 0
    for job in stage.plan(catalog):
        total += 1
        wanted = []
        outdated_one = False
        for group, inputs in job.groups.items():
            head = catalog.heads(group).get(job.shard.id)
            found = result.groups[group]
            is_stale = head is not None and head.fingerprint != fingerprint(inputs)
            if head is None:
                found.left += 1
            elif is_stale:
                outdated.setdefault(group, {})[job.shard.id] = inputs
                outdated_one = True
            else:
                found.done += 1
            again = choice.retry_failed and not is_stale and _failed(head)
            if head is None or choice.force or (is_stale and choice.stale) or again:
                wanted.append(group)
        if not chosen(job):
            continue
        matched += 1
        if wanted:
            key = tuple(wanted)
            result.pending[job.shard.id] = names.setdefault(key, key)
            result.need_bytes += sum(_need(stage, job, g, result.groups[g]) for g in key)
            for group in key:
                if group not in wants:
                    wants[group] = facts.of(group, job.groups[group])
        elif outdated_one:
            result.outdated += 1
        else:
            result.done += 1
    if choice.shards and not matched:
        raise SettingError(
            f"--shards {choice.shards}: none of the {total} input shards of {stage.source} has "
            "such a name"
        )
    if choice.fraction is not None and total and not matched:
        raise SettingError(
            f"--fraction {choice.fraction}: none of the {total} input shards of {stage.source} "
            "falls into it; take a larger one, or --limit"
        )
    for group, shards in outdated.items():
        result.groups[group].stale = _explain(catalog, group, shards)
    result.clashes = _clashes(catalog, result.pending, wants)
    return result


def preflight(stage: Stage, store: Store, todo: Plan, quota: int | None = None) -> str:
    """A line that says what the run will need.

    Raises:
        SettingError: a group would mix shards of different facts; or the disk, or the quota that
            the user set for the root, does not hold it.
    """
    if todo.clashes:
        raise SettingError(todo.clashes[0])
    free = store.free_bytes()
    need = todo.need_bytes
    stale = f", {todo.outdated} stale (--stale redoes them)" if todo.outdated else ""
    text = (
        f"{stage.name} {stage.source}: {len(todo.pending)} shards left, {todo.done} done{stale}; "
        f"needs about {size(need)}" + ("" if free is None else f" of {size(free)} free")
    )
    if free is not None and need > free:
        raise SettingError(
            f"--root {store.root}: {stage.name} {stage.source} needs about {size(need)}, "
            f"{size(free)} is free there; free some, choose another --root, or do a part with "
            "--shards"
        )
    if quota is not None:
        used = sum(entry.bytes for entry in store.walk(""))
        if used + need > quota:
            raise SettingError(
                f"--quota {size(quota)}: {size(used)} is used under {store.root}, "
                f"{stage.name} {stage.source} needs about {size(need)} more; raise it, free some "
                "(`pipeline prune`), or do a part with --shards"
            )
        text += f"; {size(used)} of the quota of {size(quota)} is used"
    return text


def summarise(catalog: Catalog, group: str) -> GroupPlan:
    heads = catalog.heads(group)
    failed = failures.read(catalog.store, group)
    found = GroupPlan(
        shards=len(heads), failing={s: e for s, e in failed.items() if s not in heads}
    )
    for head in heads.values():
        found.splits[head.split] += head.samples
        found.rejects.update(dict(head.rejects))
        found.bytes += head.bytes
    return found


def _clashes(
    catalog: Catalog, pending: dict[str, tuple[str, ...]], wants: dict[str, str]
) -> list[str]:
    """Why shards that would be made cannot stand beside those that would stay, a line a group."""
    found = []
    for group, wanted in wants.items():
        stay = Counter(
            head.facts
            for shard, head in catalog.heads(group).items()
            if group not in pending.get(shard, ())
        )
        for there, count in stay.items():
            if lines := facts.clashes(wanted, there, rounding=wanted not in stay):
                found.append(
                    f"{catalog.store.url(group)}: {count} of its shards were made by or with "
                    f"others ({'; '.join(lines)}), and one group holds one kind; go on with what "
                    "made them, make all of them anew with --stale, or give what is new a name "
                    "(a folder) or a --root of its own"
                )
                break
    return found


def _failed(head: Head | None) -> bool:
    """Whether samples of the shard failed to download."""
    return head is not None and any(reason == FAILED for reason, _ in head.rejects)


def _place(shard: str) -> float:
    """A shard's place in [0, 1), by its id."""
    return int.from_bytes(hashlib.sha256(f"fraction:{shard}".encode()).digest()[:8], "big") / 2**64


def _need(stage: Stage, job: Job, group: str, found: GroupPlan) -> int:
    """Bytes of one shard of a group: as its shards took so far, or as the stage reckons."""
    return found.bytes // found.shards if found.shards else stage.estimate(job, group)


def _explain(catalog: Catalog, group: str, shards: dict[str, dict[str, Any]]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for commit in catalog.scan(group):
        if commit.shard in shards:
            reasons["; ".join(differences(commit.inputs, shards[commit.shard]))] += 1
    return reasons


def _range(part: str, text: str) -> tuple[tuple[int, str], tuple[int, str]]:
    low, dash, high = part.partition("-")
    if not low or (dash and not high):
        raise SettingError(f"--shards {text}: write ids and ranges, e.g. 00000-00031,00100")
    return _order(low), _order(high or low)


def _order(shard: str) -> tuple[int, str]:
    """Ids compare as numbers where they are numbers: "32" names shard 00032."""
    return (int(shard), "") if shard.isdigit() else (-1, shard)
