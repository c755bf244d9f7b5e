"""A campaign of faults: real commands are killed, raced, starved and fed damaged files.

    make faults                       # all of it, up to 40 minutes on two cores
    make faults FAULTS="--share 0.1 --seed 7 kills races"

It writes `docs/reliability.md`. A trial has survived if every loss of the run is the one that an
undisturbed run has, to the bit, or the command ended in time with one line that says why.
"""
