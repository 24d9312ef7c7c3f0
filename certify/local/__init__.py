"""Lipschitz bounds in a neighbourhood of an input, by bound propagation among the gates that are not decided there."""

from certify.local import operators as operators  # fills the table
