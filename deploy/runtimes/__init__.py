"""Files that hold a network of their own, the libraries that run them, and what such a file says of itself."""
