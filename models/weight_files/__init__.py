"""Files of weights that other projects wrote: read as plain data, handed over by name and shape."""
