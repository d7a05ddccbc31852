"""Any sequence of calls that a user can make, on any layout, against an oracle.

::

    seed -draw-> Case            a model, a layout, averages, actions; the same on all ranks
    Case -run->  verdict         each action on the model, on a twin without an EMA, on the oracle
    fault -shorten-> script      the shortest sequence that still fails, as a script of its own
"""
