"""Configs of strangers: values put at random into genuine ones."""

import copy
import random

VALUES = [
    *(None, True, False, "", "x", "{}", "{0..9}", "a\nb", "\x00", [], {}, [[]], [1], {"a": 1}),
    *(0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(2**40)),
    *(0.0, -0.5, 0.5, 1.5, 1e-320, 1e30, 1.7e308, float("inf"), float("nan")),
]


def leaves(tree, path=()):
    """Return the path of every value inside nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += leaves(value, (*path, key))
    return found


def mutated(tree, rng: random.Random):
    """Return a copy with one to three values replaced, removed, or scaled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        paths = leaves(tree)
        if not paths:
            return tree
        *inner, key = rng.choice(paths)
        place = tree
        for step in inner:
            place = place[step]
        value = place[key]
        kind = rng.random()
        if kind < 0.1:
            del place[key]
        elif kind < 0.5 and isinstance(value, int | float) and not isinstance(value, bool):
            place[key] = value * rng.choice([-1, 0, 2, 3, 1000, 10**9])
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return tree
