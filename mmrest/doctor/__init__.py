"""``python -m mmrest.doctor``: what is installed, what fits, and how to mend the rest.

``probe`` collects the facts, ``checks`` judges them, ``__main__`` prints. All of it
is the standard library alone, since it must run where nothing else does.
"""
