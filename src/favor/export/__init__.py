"""A trained model made ready for others: one folder, its weights compared with the run's, a card that says what it is."""
