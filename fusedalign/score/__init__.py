"""Log-probabilities on their own: of a batch, of a data set, of a file that survives what interrupts it."""
