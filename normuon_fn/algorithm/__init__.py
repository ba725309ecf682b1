"""The algorithm, as pure functions on stacks of matrices [n, rows, cols], one idea per file.

Read stages.py first (the order of the stages, and what state they keep), then momentum.py,
orthogonalize.py with coefficients.py, normalize.py, weight_decay.py; then work.py, updates.py and
bucket.py, where the stages meet one bucket, finishing.py and norms.py (what comes after the
variance), adamw.py, and guard.py, which decides what keeps its bits. Nothing here knows the names
of parameters, plans, or which matrices other ranks have.
"""
