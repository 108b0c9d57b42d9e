"""What `mpilm doctor` asks of a machine, and `mpilm probe` measures on it."""
