"""WHAT the network learns: how latents are noised, what is predicted, which path a sampler takes.
One file an objective, one line an objective in this table.

An objective is a frozen dataclass of numbers that meets `training.objectives.denoiser.Denoiser`.
Resolve a name with ``pkgutil.resolve_name``. No torch here.
"""

OBJECTIVES: dict[str, str] = {
    "edm": "training.objectives.edm:EDM",
    "flow": "training.objectives.flow:Flow",
}
