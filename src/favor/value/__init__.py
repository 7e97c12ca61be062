"""`favor value`: what each pair is worth to a model, how many labels are wrong, and which."""
