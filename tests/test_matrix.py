"""Every loss composes with everything, or is refused with a reason: no third outcome."""

import pytest
from matrix import CELLS, WITHIN, model_settings, outcome


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell))
def test_cell(cell):
    kind, what = outcome(cell)
    if kind == "refused":
        coupled = any(name in cell.variant for name in ("aot", "bco")) and cell.passes == "one"
        by_token = "LD" in cell.variant and cell.reference == "stored"
        nothing_frozen = "weights" in model_settings(cell) and cell.weights == "full"
        assert coupled or by_token or nothing_frozen, what
        assert any(s in what for s in ("set loss.passes=two", "set reference.mode=live", "add [model.lora]")), what
    else:
        assert what <= WITHIN.get(cell.variant, 1e-5)
