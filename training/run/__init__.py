"""One training from its settings to its weights: checks, costs, stages, callbacks."""
