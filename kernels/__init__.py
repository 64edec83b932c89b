"""Imported as proteus_deploy.kernels. Under the bare name it is an empty shell that refuses use.

transformers probes for a distribution called `kernels` with a real import whenever a folder of that
name is on sys.path (as it is for `python` started in a clone), so a plain refusal would break it.
"""

if __name__ != "proteus_deploy.kernels":
    globals()["__path__"] = []  # no submodule can be found under the bare name

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import proteus_deploy.kernels; the bare name 'kernels' is not this project's")
