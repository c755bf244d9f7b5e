"""Define what to evaluate: the config's section, and what only the command can say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from clip_jax.sections import EvalSection

# Fields whose names in eval.json are those of earlier versions.
JSON_NAMES = {"neighbors": "neighbours"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """What to evaluate; `from_section` fills in what the config's section says.

    Attributes:
      data: the source that is scored; train_data, val_data: labeled ones to learn from.
      classnames: a file or a shipped data set; empty takes the names that the data has (a folder of
        class folders, TFDS), and leaves classification out where it has none.
      templates, ablate: prompts and names of lists; `ablate` are compared, each by itself.
      batch_size: images at a time.
      dataset, pretrained: for the results; empty takes the data's name and nothing.
      neighbors: training images whose votes "knn" counts.
      shots: labeled images a class in "few_shot".
      confuse_equal_captions: score retrieval as CLIP_benchmark does, where equal captions of
        different images are wrong answers.
      scoring: what the `.npy` of an image is: "multilabel", a one for each of its classes, or a
        name in `groups.GROUP_SCORES`; empty reads none.
    """

    data: str
    classnames: str
    templates: Sequence[str]
    ablate: Sequence[str]
    tasks: Sequence[str]
    train_data: str
    val_data: str = ""
    batch_size: int
    dataset: str = ""
    pretrained: str = ""
    neighbors: int = 20
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    confuse_equal_captions: bool = False
    scoring: str = ""

    @classmethod
    def from_section(cls, section: EvalSection, **changes: Any) -> "EvalSpec":
        """Take the section's fields, and `changes` to them and to the other fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in vars(section).items() if name in names}
        return cls(**given | changes)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by their names in eval.json, without a `scoring` that reads nothing."""
        return {
            JSON_NAMES.get(name, name): value
            for name, value in vars(self).items()
            if value or name != "scoring"
        }
