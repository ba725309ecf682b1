"""What happens on the host after a step: say what was skipped, save what failed, show why.

Read in this order: ``skips.py`` (`check` and `SkipMonitor` read the flags of a step),
``capture.py`` (the inputs of a failed orthogonalization become two files), ``replay.py`` (those
files as text, for ``python -m normuon_fn replay``).
Nothing here may run inside a compiled step, change a result, or know how ranks exchange data.
"""
