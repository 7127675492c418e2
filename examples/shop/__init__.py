"""A package that brings its migrations along, in the folder `migrations` beside this file."""
