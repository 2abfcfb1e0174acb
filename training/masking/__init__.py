"""WHICH patches the network sees, and where. One file a scheme, one line a scheme in this table.

A scheme is a frozen dataclass, see `training.masking.scheme.Scheme`; its fields become settings of
a stage by themselves, of the same names and types. No scheme imports torch before it draws a mask,
so that settings can be checked without it.
"""

MASKS: dict[str, str] = {
    "deferred": "training.masking.deferred:Deferred",
    "naive": "training.masking.naive:Naive",
    "maskdit": "training.masking.maskdit:MaskDiT",
    "block": "training.masking.block:Block",
    "tread": "training.masking.tread:Tread",
    "none": "training.masking.none:Unmasked",
}
