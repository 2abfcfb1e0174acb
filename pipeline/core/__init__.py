"""The contract between the stages, and between the pipeline and training. Imports nothing else of ours."""
