"""Making the parts of a command's output on the machines of a cluster."""
