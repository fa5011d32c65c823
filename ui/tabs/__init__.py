"""One module or package for each tab; each has `build(session)`, which lays it out and wires it."""
