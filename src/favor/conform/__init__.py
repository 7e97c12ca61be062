"""Whether a trainer does DPO as the equations say, seen from outside."""
