"""Weights as a folder that diffusers loads where this package is not installed.

`pipeline` and `transformer` are the folder's own code, `bundle` puts the model's files beside them.
"""
