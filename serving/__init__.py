if __name__ != "proteus_deploy.serving":
    raise ImportError("import proteus_deploy.serving; the bare name 'serving' is not this project's")
