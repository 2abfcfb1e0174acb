"""What a finished run tells whoever started it."""

from __future__ import annotations

from pipeline.engine.report import Report
from pipeline.stages.caption_text import facts


def summarise(report: Report) -> None:
    """The facts of a finished run on standard output: a line, and one for all that needs a look."""
    rate = f", {report.samples / report.seconds:.0f} samples/s" if report.samples else ""
    elsewhere = f"{report.elsewhere} made by another run, " if report.elsewhere else ""
    stale = f"{report.outdated} stale, " if report.outdated else ""
    print(
        f"{report.stage} {report.source}: {report.shards} shards made ({report.samples} samples"
        f"{rate}), {report.skipped} already done, {elsewhere}{stale}{report.failed} failed, "
        f"{report.seconds:.1f} s"
    )
    spent = report.spent()
    if total := sum(spent.values()):
        shares = ", ".join(f"{name} {count / total:.0%}" for name, count in spent.items())
        print(f"  workers' time: {shares}")
    if report.counters["captions"]:
        print(f"  {facts(report.counters, report.seconds)}")
    if report.page:
        print(f"  pictures with what was made of them: {report.page}")
    for group, found in report.groups.items() if len(report.groups) > 1 else ():
        if found["samples"]:
            print(f"  {group}: {found['bytes'] / found['samples']:,.0f} bytes a sample")
    for reason, count in sorted(report.rejects.items()):
        print(f"  rejected: {count} {reason} (see rejects/ in the group)")
    for reason, count in report.stale.most_common():
        print(f"  stale: {count} shards: {reason}; --stale redoes them")
    if report.retries:
        print(f"  retried: {report.retries} times, after an error or a dead worker")
    for shard, error in sorted(report.failures.items()):
        print(f"  failed: shard {shard}: {error}")
    if report.failed > len(report.failures):
        rest = report.failed - len(report.failures)
        print(f"  failed: and {rest} more (see failures/ in the group)")
