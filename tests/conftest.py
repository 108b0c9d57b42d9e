"""What pytest must not import, though `--doctest-modules` asks for every file."""

collect_ignore = ["unit/simgrid_schedule.py"]  # for the system's Python, with SimGrid
