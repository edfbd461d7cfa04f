"""Model definitions, simulation, training, export and the embedded model server."""
