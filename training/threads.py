"""CPU threads: as many as there is time for, and polite to other processes."""

import os

from pipeline.core.limits import allowed_cpus, usable_cpus


def share_cores() -> None:
    """Call before torch is imported; what the user has set stays.

    Torch's OpenMP threads wait for each other in a busy loop. Where another process holds one of
    the cores, the loop takes the time that the awaited thread needs: a training step of 0.23 s on
    two cores took 3 to 7 s beside one busy process, and 0.5 s with a wait this short. On idle cores
    there is no difference.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Torch sees which CPUs it may run on, but not that a container has a share of their time; with
    # a thread for each it is stopped for most of the time.
    if (cpus := usable_cpus()) < allowed_cpus():
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))
