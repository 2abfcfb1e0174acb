"""Samples taken out of a root: from lists, and with --purge from every byte."""
