"""The contract: between the stages, and with training. Imports nothing else of ours."""
