"""What `diffrep.dist` is made of."""
