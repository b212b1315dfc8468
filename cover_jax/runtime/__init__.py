"""The devices of a run and its processes: the mesh, what lies where, who does what, random keys by name."""
