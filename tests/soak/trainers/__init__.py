"""Any run of a trainer that a user can set up, against a plain loop and an oracle.

::

    seed -draw-> Case          a trainer, its settings, and lives of one job: from where each
                               starts (fresh or any checkpoint), on how many ranks, how it ends
    Case -plans-> Plans        a plain loop of torch and averages in float64: what must come of it
    Case -run-> verdict        the lives in real trainers, each held against its plan
    fault -shorten-> script    fewer lives, settings and steps that still fail, as a script
"""
