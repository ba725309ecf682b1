"""Everything that is decided once, on the host, before the first step.

Read make_plan.py first, then parameters.py (what one parameter brings into a plan), layout.py and
reading.py (how a tensor is read as matrices), grouping.py, sharing.py and order.py (what is done
together, by whom, and in which order), buckets.py (by which kind of work), plan.py (the result) and
checks.py. tensors.py is where a step finds its matrices by the plan. Nothing here reads the value
of a tensor or compiles anything.
"""
