"""Several devices and processes: the mesh, the place of arrays, and what processes exchange."""
