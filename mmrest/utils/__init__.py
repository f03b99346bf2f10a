def register_all_modules(init_default_scope: bool = True) -> None:
    """Do nothing, since importing mmrest registers its classes.

    MMEngine's hub and inferencers call it for configs and models with the scope
    ``mmrest``.

    Args:
        init_default_scope (bool): Ignored. Default: True.
    """
