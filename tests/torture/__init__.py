"""Everything that a disk, a kernel, a machine or a peer may do to a checkpoint, and what must hold.

::

    operation   save, replace, both in the background, rotate, resume, load, export, offline
    injury      an error, a kill, a loss of power, a rank that is gone, a second writer, rot
    verdict     the five properties, looked up on the disk and in memory after every trial
    row         injury, operation, points at which it was injured, trials, how many were bad

P1 a load never mixes two saves and never returns bytes that were not saved. P2 an acknowledged step
can be loaded until rotation removes it. P3 so can earlier steps. P4 one documented class of error,
with rank, path and errno, on all live ranks in time; never a hang, never silence. P5 a failed call
leaves weights and averages bitwise unchanged, and the next one works without cleaning by hand.

By hand: ``python benchmarks/torture.py``, or ``python -m tests.torture --short``.
"""
