"""From one trained policy, the family that a slider over beta would give."""
