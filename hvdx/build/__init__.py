"""Builds Horovod's wheel for the frameworks of the current environment.

    target    what is to be built: frameworks, compiler, MPI, GPU; and its key
    edits     the few substitutions without which Horovod 0.28.1 does not compile
    cache     finished wheels, one folder per key, shared by all environments
    wheel     sdist -> edited tree -> wheel
    progress  what the user sees meanwhile
    causes    a failed build's log -> cause and remedy
    install   the command: all of the above in order

No framework is ever imported here: their versions are read from their metadata, and a child
process imports what was built.
"""
