"""Which parameter gets which rule, and why.

A model, or named tensors, come in; one `Route` per parameter comes out, with its reason and how
sure it is. Reading order: `routes`, `route_table`, `words`, `names` (names and shapes alone),
`named_gates`, `fused_names`, `resolve`; then `uses`, `modules` (`routes_for`) and what that asks:
`heads`, `positions`, `routers`, `gates`, `adapters`, `low_rank`, `raw`, `parametrized`,
`convolutions`, `projections`, `feedforward`, `attention`, `mixers`. `doubts` warns once of what is
not certain. This wing must never know: plans, devices, ranks, and the values of tensors.
"""
