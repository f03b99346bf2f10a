def register_all_modules(init_default_scope: bool = True) -> None:
    """Do nothing: importing mmrest registers its classes.

    MMEngine's hub and inferencers call it where a config or model is named with the
    scope ``mmrest``.

    Args:
        init_default_scope (bool): Ignored. Default: True.
    """
