"""What judges one completion, in a process of its own: `function(item: dict, completion: str) -> float`.

One module per scorer. It imports what it needs at its top, since an item's time limit runs from when the module is
there; and none of it is JAX, for which a process that compares answers should not wait. So this is not in `tasks/`.
"""
