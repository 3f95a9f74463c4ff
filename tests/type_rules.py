"""How the test run checks the types and shapes of annotated calls."""

from beartype import BeartypeConf, beartype

# An int is a fine float, as everywhere in Python.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
