"""The rooms whose array types the tests check."""

CHECKED = (
    *("models", "losses", "data", "pretrained", "evaluation", "embeddings", "exporting", "tools"),
    *("report_page.load_run", "report_page.select_examples"),
    *("training.device_augment", "training.step"),
)
"""The rooms that have array types: they are checked at every call, at trace time under jit."""
