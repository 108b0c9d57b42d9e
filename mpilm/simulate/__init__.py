"""Training on a machine that is only declared, in virtual time."""
