"""`favor audit`: is a judge to be trusted? Biases measured, people's labels stretched, soft labels."""
