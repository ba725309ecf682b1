"""What happens on the host after a step: say what was skipped, save what failed, show why.

Read in this order: ``skips.py`` (`check` reads the flags of a step), ``monitor.py`` (`SkipMonitor`
does so without a wait, also inside an optimizer),
``capture.py`` (the inputs of a failed orthogonalization become two files), ``replay.py`` (those
files as text, for ``python -m normuon_fn replay``). ``own_stage.py`` stands alone: whether a
function of the user's can be a stage.
Nothing here may run inside a compiled step, change a result, or know how ranks exchange data.
"""
