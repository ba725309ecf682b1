"""What happens between runs: state goes to a file and comes back, or comes from another optimizer.

Read in this order: ``checkpoint.py`` (`save` and `load`: what a file must agree with),
``file_format.py`` (bytes, digests, the write that is complete or absent), ``description.py`` (what
a file says of itself), ``meaning.py`` (which options and routes a state depends on),
``converters.py`` (`convert_state` from other optimizers), ``names.py`` (`names_in`: their order).
Nothing here may unpickle, change a tensor before all of a file is checked, or know how a step runs.
"""
