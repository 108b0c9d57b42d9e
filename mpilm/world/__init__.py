"""Where ranks live: the interface (base), real MPI (mpi) and virtual time (virtual)."""
