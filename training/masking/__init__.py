"""WHICH patches the backbone sees. One file a scheme, one line a scheme in this table.

A scheme is a function ``draw(noise, ratio) -> TokenMask | None``: ``noise`` is uniform on
[0, 1), float (B, T), and comes from the caller, because randomness in this project is a
function of (seed, sample key); ``ratio`` is the share of tokens to drop; None means that the
backbone sees everything. Resolve a name with ``pkgutil.resolve_name``.
"""

MASKS: dict[str, str] = {
    "deferred": "training.masking.deferred:draw",
    "none": "training.masking.tokens:keep_all",
}
