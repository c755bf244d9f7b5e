"""Several devices and several processes: the mesh, where arrays lie, who speaks."""
