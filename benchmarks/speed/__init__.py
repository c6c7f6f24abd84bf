"""How fast the library is, against its peers and against the machine: see README.md beside this."""
