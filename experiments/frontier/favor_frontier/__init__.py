"""The paper's controlled experiment as one command: reward against KL, DPO beside RLHF and the baselines."""
