"""Teachers: model folders of Hugging Face, FLA or this project, loaded exactly into
`StudentForCausalLM`, and converted."""

__all__ = ["copy_sidecars", "load_teacher", "load_teacher_config"]


def __getattr__(name: str):
    """The loader's functions. It imports torch, and is imported when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loader

    return getattr(loader, name)
