if __name__ != "proteus_deploy.export":
    raise ImportError("import proteus_deploy.export; the bare name 'export' is not this project's")
